"""The backends of attention as pytest parameters, each with the device it runs on here and the reason it may be skipped for."""

import importlib.util

import pytest
import torch

from fastattn.ops.attention import AttentionProblem

GPU = torch.cuda.is_available()
TRITON_DEVICE = "cuda" if GPU else "cpu"


def device_of(backend: str) -> str:
    return TRITON_DEVICE if backend == "triton" else "cpu"


def triton_marks() -> list:
    marks = [pytest.mark.gpu if GPU else pytest.mark.interpreter]
    if importlib.util.find_spec("triton") is None:
        return [*marks, pytest.mark.skip(reason="triton is not installed")]
    from fastattn.kernels.triton import attention

    problem = AttentionProblem(TRITON_DEVICE, torch.float32, 1, 1, 1, 1, 16, False, False, False, False)
    reasons = attention.unsupported(problem)
    return [*marks, pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "none")]


TRITON = pytest.param("triton", marks=triton_marks())
BACKENDS = ["eager", "cpu", TRITON]
