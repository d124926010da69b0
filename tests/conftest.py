"""Environment of the tests: kernels are interpreted where there is no GPU, allocations are NaN, inductor's cache is off."""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # it ignores edits of a fake kernel

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is allocated and not written stays NaN."""

    def poison(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def alone(monkeypatch):
    """Whatever else could answer for a Triton kernel raises."""
    import fastattn.kernels.cpu.attention as cpu
    import fastattn.kernels.eager.attention as eager

    def refuse(*args, **kwargs):
        raise AssertionError("a Triton request was answered by something else")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    for module in (cpu, eager):
        monkeypatch.setattr(module, "forward", refuse)
        monkeypatch.setattr(module, "backward", refuse)
