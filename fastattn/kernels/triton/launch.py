"""What the Triton backends share on the host: a launch as data, running it, and what no Triton kernel serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastattn.kernels.triton.primitives import INTERPRET

LONGEST_ROW = 2**23  # elements from one row of a matrix to the next: the addresses inside a tile of 128 rows take 32 bits


class Launch(NamedTuple):
    """One kernel launch, as data: tests compile it for other architectures without running it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Any  # a NamedTuple: tile sizes, num_warps, num_stages


def settle_keys(*modules: ModuleType) -> None:
    """Make the key of every device function of these modules, each before those that call it.

    Under its key a compiled kernel lies in Triton's cache. Triton puts the constants of a called function into it only if that
    function's own key was made earlier: which kernel came first in a process would decide whether another one is found.
    """
    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITFunction) and function.__module__ == module.__name__:
                _ = function.cache_key


class GPU(NamedTuple):
    """What a choice of tiles depends on: the compute capability, 90 for 9.0, and the name of the device, if it is there."""

    sm: int
    name: str | None = None


def refusals(problem) -> list[str]:
    """Why no Triton kernel serves a problem, whatever the op."""
    reasons = []
    on_paper = _recording is not None
    if problem.device != "cuda" and not INTERPRET.value and not on_paper:
        reasons.append(f"tensors are on {problem.device}")
    if problem.device == "cuda" and capability(torch.device("cuda", torch.cuda.current_device())) < 80:
        reasons.append("the GPU's compute capability is below 8.0")
    if INTERPRET.value and not on_paper and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        reasons.append(f"Triton {triton.__version__} cannot interpret with NumPy {numpy.__version__} (2.4 or later)")
    if problem.dtype == torch.float64:
        reasons.append("fp64 is served by eager and cpu")
    return reasons


def gpu_of(device: torch.device) -> GPU:
    """The GPU; the interpreter, which has none, runs what an sm_90 would."""
    return _gpu(device) if _recording is None else _recording.gpu


@cache
def _gpu(device: torch.device) -> GPU:
    if device.type != "cuda":
        return GPU(90)
    major, minor = torch.cuda.get_device_capability(device)
    return GPU(10 * major + minor, torch.cuda.get_device_name(device))


def gpu_here() -> GPU:
    """The current GPU, for explanations; where there is none, an H100's capability."""
    return gpu_of(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))


def capability(device: torch.device) -> int:
    return gpu_of(device).sm


def _version(module: ModuleType) -> tuple[int, int]:
    major, minor, *_ = module.__version__.split(".")
    return int(major), int(minor)


def precision(dtype: torch.dtype) -> str:
    """The input precision of tl.dot: fp32 is IEEE unless PyTorch's own switch says TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def matrix(x: Tensor) -> Tensor:
    """x as a matrix of its last dimension, with adjacent elements in a row: a view, or where there is none, a copy."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    adjacent = (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) < LONGEST_ROW
    return x if adjacent else x.contiguous()


def vector(size: int, tensors: list[Tensor], integers: list[int]) -> int:
    """How many elements of `size` bytes make 16, if every tensor starts, and every stride and width ends, on such a unit; else 1.

    Strides and widths are passed to kernels in these units: multiplied by the constant inside, they let the compiler see
    16-byte loads, which a run-time integer alone would not.
    """
    unit = 16 // size
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors) and not any(n % unit for n in integers)
    return unit if aligned else 1


def matrix_arguments(matrices: dict[str, Tensor | None], **widths: int) -> dict[str, Any]:
    """Matrices, each with the step from row to row as `<name>_m`, and widths; steps and widths in units of VECTOR elements."""
    present = [x for x in matrices.values() if x is not None]
    numbers = {**{f"{name}_m": 0 if x is None else x.stride(0) for name, x in matrices.items()}, **widths}
    unit = vector(min(x.element_size() for x in present), present, list(numbers.values()))
    return {**matrices, **{name: number // unit for name, number in numbers.items()}, "VECTOR": unit}


class _Recording(NamedTuple):
    gpu: GPU
    launches: list[Launch]


_recording: _Recording | None = None


@contextmanager
def recorded(gpu: GPU) -> Iterator[list[Launch]]:
    """Inside, nothing is launched: what would be, on that GPU, is in the list. Tensors of the CPU are taken, results hold
    nothing. For a process of one thread, as those that compile ahead are."""
    global _recording
    before, _recording = _recording, _Recording(gpu, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def run(launch: Launch) -> None:
    if launch.programs == 0:
        return
    if _recording is not None:
        _recording.launches.append(launch)
        return
    device = next(x.device for x in launch.arguments.values() if isinstance(x, Tensor))
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.config._asdict())
