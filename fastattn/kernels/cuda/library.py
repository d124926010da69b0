"""The compiled CUDA kernels: which library serves a device, why none does, and the one launch that all ops use.

For tensors on a GPU it is the module `fastattn._cuda` that `setup.py` built. With FASTATTN_EMULATE=1, tensors on a CPU go to the
same sources compiled with the emulator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.cuda import emulator

RECORD = Path(__file__).parent.parent.parent / "_build.json"


def problems(device: str) -> list[str]:
    """Why no library serves tensors on this kind of device; empty where one does."""
    if device == "cuda":
        return _gpu_problems()
    if device != "cpu":
        return [f"tensors are on {device}"]
    if os.environ.get("FASTATTN_EMULATE") != "1":
        return ["tensors are on cpu, and FASTATTN_EMULATE=1 is not set"]
    return emulator.problems()


class Kernel(NamedTuple):
    """A kernel and its request, made once by a class of the compiled module; tensors and numbers of rows come with a launch."""

    name: str
    request: Any
    device: torch.device
    tensors: tuple[str, ...]  # whose addresses a launch takes, in this order
    written: tuple[str, ...]  # of these; for the emulator, which checks every access
    whole: bool = True  # whether each element of them is written


def launch(kernel: Kernel, tensors: Sequence[Tensor], *numbers: int) -> None:
    """Launch a kernel on the current stream of its device. `tensors` are those that it names; they stay alive until the launch
    has been made. `numbers` are what else its request takes."""
    addresses = [x.data_ptr() for x in tensors]
    device = kernel.device
    if device.type == "cpu":
        with emulator.watching(kernel, tensors):
            kernel.request.launch(*addresses, *numbers, 0)
        return
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if device.index == torch.cuda.current_device():
        kernel.request.launch(*addresses, *numbers, stream)
    else:
        with torch.cuda.device(device):
            kernel.request.launch(*addresses, *numbers, stream)


def compiled(device: torch.device) -> ModuleType:
    """The module that launches kernels on this device."""
    return emulator.module() if device.type == "cpu" else module()


@functools.cache
def module() -> ModuleType:
    """The module that `setup.py` built. Raises ImportError where there is none."""
    return importlib.import_module("fastattn._cuda")


def host_module() -> ModuleType:
    """The same functions for what runs on the host: of the built module, or where there is none, of the emulator's."""
    return module() if importlib.util.find_spec("fastattn._cuda") else emulator.module()


def build_record() -> dict[str, Any] | None:
    """What the build decided: cuda, reason, nvcc, archs; None where the package was never built."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else None


def _gpu_problems() -> list[str]:
    if importlib.util.find_spec("fastattn._cuda") is None:
        record = build_record()
        return [f"the CUDA kernels are not built: {record['reason'] if record else 'the package was not installed by pip'}"]
    if not torch.cuda.is_available():
        return ["PyTorch sees no CUDA device"]
    if torch.cuda.get_device_capability() < (8, 0):
        return ["the GPU's compute capability is below 8.0"]
    return []


def rows_aligned(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether every row of x starts at a multiple of 16 bytes; `strides`, in elements, lead from row to row."""
    return x.data_ptr() % 16 == 0 and strides_aligned(x.dtype, strides)


def strides_aligned(dtype: torch.dtype, strides: Sequence[int]) -> bool:
    """The same of a tensor that PyTorch is to allocate, which it does at such a multiple."""
    return all(stride * dtype.itemsize % 16 == 0 for stride in strides)
