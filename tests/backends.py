"""The backends as pytest parameters: the device each runs on here, the reason it may be skipped for, and what it takes."""

import importlib.util

import pytest
import torch

from fastattn.lowering import Prepared
from fastattn.ops.attention_plans import AttentionProblem

GPU = torch.cuda.is_available()
KERNEL_DEVICE = "cuda" if GPU else "cpu"  # of Triton and CUDA kernels: interpreted and emulated where there is no GPU


def device_of(backend: str) -> str:
    return KERNEL_DEVICE if backend in ("triton", "cuda") else "cpu"


def dtype_of(backend: str) -> torch.dtype:
    """The dtype in which a backend's meaning is proven: the most precise one it takes."""
    return torch.float16 if backend == "cuda" else torch.float32


def head_dim_of(backend: str) -> int:
    """The least head dimension a backend takes."""
    return 32 if backend == "cuda" else 16


def _marks(backend: str, without_gpu: pytest.MarkDecorator) -> list:
    marks = [pytest.mark.gpu if GPU else without_gpu]
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return [*marks, pytest.mark.skip(reason="triton is not installed")]
    module = importlib.import_module(f"fastattn.kernels.{backend}.attention")
    D = head_dim_of(backend)
    problem = AttentionProblem(KERNEL_DEVICE, dtype_of(backend), B=1, H=1, M=1, N=1, D=D, Hkv=1, Dv=D)
    reasons = module.unsupported(problem)
    return [*marks, pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "none")]


TRITON = pytest.param("triton", marks=_marks("triton", pytest.mark.interpreter))
CUDA = pytest.param("cuda", marks=_marks("cuda", pytest.mark.emulator))
BACKENDS = ["eager", "cpu", TRITON, CUDA]


def run_forward(module, q, k, v, mask, scale):
    """out and lse by a backend's module, of a plan made for this call."""
    if not hasattr(module, "forward_plan"):  # the specification, where a GPU is pretended
        return module.forward(q, k, v, mask, scale, True)
    prepared = Prepared(mask)
    return module.forward_plan(q, k, v, prepared, scale, True, True)(q, k, v, prepared)


def run_backward(module, *given):
    """dq, dk and dv; given: dout, dlse, q, k, v, out, lse, mask, scale."""
    if not hasattr(module, "backward_plan"):
        return module.backward(*given)
    *tensors, mask, scale = given
    prepared = Prepared(mask)
    return module.backward_plan(*tensors, prepared, scale)(*tensors, prepared)
