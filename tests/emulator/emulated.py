"""A library with the emulator in it: NumPy arrays are watched, a kernel runs, the reports come back."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from fastattn.kernels.cuda import emulator

READ, WRITE, READ_AND_WRITE, WRITE_SOME = 0, 1, 2, 3


class Emulated:
    def __init__(self, path: Path):
        self.library = emulator.interface(path)

    def watch(self, name: str, array: np.ndarray, access: int) -> None:
        dims = ctypes.c_int64 * array.ndim
        strides = dims(*(stride // array.itemsize for stride in array.strides))
        address = array.ctypes.data_as(ctypes.c_void_p)
        self.library.fastattn_emulator_watch(
            name.encode(), address, array.itemsize, array.ndim, dims(*array.shape), strides, access
        )

    def finish(self) -> list[str]:
        return self.library.fastattn_emulator_finish().decode().splitlines()
