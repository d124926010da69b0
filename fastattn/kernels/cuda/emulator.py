"""The CUDA kernels on a CPU: the sources in csrc compiled with the emulator, at first use, in a checkout of the repository.

The emulator executes a kernel thread by thread, with the tensor-core instructions lane by lane, and checks every access to
memory; what it finds is raised as `EmulatorError`. It is for tests.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fastattn.kernels.cuda.library import Kernel

ROOT = Path(__file__).resolve().parent.parent.parent.parent
FOLDER = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"
LIBRARY = FOLDER / "_cuda.so"
READ, WRITE, WRITE_SOME = 0, 1, 3  # how a launch uses a buffer: see csrc/emulator


class EmulatorError(RuntimeError):
    """A kernel did what it must not: the message lists each finding with its place in the source."""


def problems() -> list[str]:
    """Why the emulator cannot be had here; empty where it can."""
    if not (ROOT / "csrc" / "build.py").exists():
        return ["the emulator is built from a checkout of the repository, and this is an installed package"]
    if platform.machine() not in ("x86_64", "AMD64"):
        return [f"the emulator switches stacks on x86-64 only, and this is {platform.machine()}"]
    if shutil.which("g++") is None:
        return ["the emulator is compiled with g++, which was not found"]
    missing = [name for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None and shutil.which(name) is None]
    return [f"the emulator is built with {name}: pip install {name}" for name in missing]


@contextmanager
def watching(kernel: Kernel, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Check what a launch inside does to the tensors that the kernel names. Raises EmulatorError with all findings."""
    checks = interface(build())
    for name, tensor in zip(kernel.tensors, tensors, strict=True):
        access = READ if name not in kernel.written else WRITE if kernel.whole else WRITE_SOME
        dims = ctypes.c_int64 * tensor.dim()
        sizes, strides = dims(*tensor.shape), dims(*tensor.stride())
        checks.fastattn_emulator_watch(
            name.encode(), tensor.data_ptr(), tensor.element_size(), tensor.dim(), sizes, strides, access
        )
    try:
        yield
    finally:
        reports = checks.fastattn_emulator_finish().decode()
    if reports:
        raise EmulatorError(f"{kernel.name}: the emulator reports\n{reports}")


@functools.cache
def build() -> Path:
    """Compile what has changed since the last time; one process at a time."""
    import fcntl  # not on Windows, where this module is imported all the same

    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        csrc_build().emulated(LIBRARY, FOLDER)
    return LIBRARY


def csrc_build() -> ModuleType:
    """csrc/build.py, which is not part of the package."""
    return _import("fastattn_csrc_build", ROOT / "csrc" / "build.py")


@functools.cache
def module() -> ModuleType:
    return _import("fastattn.emulated._cuda", build())


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def interface(path: Path) -> ctypes.CDLL:
    """A library with an emulator in it, and the two functions that tell it what to watch and ask it what it found."""
    library = ctypes.CDLL(str(path))
    numbers = ctypes.POINTER(ctypes.c_int64)
    library.fastattn_emulator_watch.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, numbers, numbers, ctypes.c_int,
    ]  # fmt: skip
    library.fastattn_emulator_watch.restype = None
    library.fastattn_emulator_finish.restype = ctypes.c_char_p
    return library
