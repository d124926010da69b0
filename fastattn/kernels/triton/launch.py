"""What the Triton backends share on the host: a launch as data, running it, and what no Triton kernel serves."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor

from fastattn.kernels.triton.primitives import INTERPRET

LONGEST_ROW = 2**23  # elements from one row of a matrix to the next: the addresses inside a tile of 128 rows take 32 bits


class Launch(NamedTuple):
    """One kernel launch, as data: tests compile it for other architectures without running it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Any  # a NamedTuple: tile sizes, num_warps, num_stages


def refusals(problem) -> list[str]:
    """Why no Triton kernel serves a problem, whatever the op."""
    reasons = []
    if problem.device != "cuda" and not INTERPRET.value:
        reasons.append(f"tensors are on {problem.device}")
    if problem.device == "cuda" and capability(torch.device("cuda", torch.cuda.current_device())) < 80:
        reasons.append("the GPU's compute capability is below 8.0")
    if INTERPRET.value and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        reasons.append(f"Triton {triton.__version__} cannot interpret with NumPy {numpy.__version__} (2.4 or later)")
    if problem.dtype == torch.float64:
        reasons.append("fp64 is served by eager and cpu")
    return reasons


@cache
def capability(device: torch.device) -> int:
    """A GPU's compute capability, 90 for 9.0; the interpreter, which has none, runs what an sm_90 would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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


def run(launch: Launch) -> None:
    if launch.programs == 0:
        return
    device = next(x.device for x in launch.arguments.values() if isinstance(x, Tensor))
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.config._asdict())
