"""Environment of the tests: without a GPU, Triton kernels are interpreted and CUDA kernels emulated; no cache of inductor."""

import os
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # it ignores edits of a fake kernel

import pytest
import quick_interpreter
import torch
from failures import Failures

GPU = torch.cuda.is_available()
MARGIN = 512  # elements
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    os.environ["FASTATTN_EMULATE"] = "1"
    quick_interpreter.quicken()


def pytest_addoption(parser):
    parser.addoption("--failures", type=Path, metavar="FILE", help="append each failure to FILE as it happens")


def pytest_configure(config):
    path = config.getoption("--failures")
    if path is not None and not hasattr(config, "workerinput"):  # a worker of pytest-xdist hands its reports on
        config.pluginmanager.register(Failures(path))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    from fastattn import planned

    planned.PLANS.clear()  # what a test puts in the place of a decision is asked


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is allocated and not written stays NaN; results lie between margins of NaN, which must be there afterwards."""
    buffers, new_empty = [], torch.Tensor.new_empty

    def between_margins(x, *size, **options):
        sizes = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if x.device.type == "meta":
            return new_empty(x, sizes, **options)
        dtype = options.get("dtype") or x.dtype
        buffer = torch.full(
            (sizes.numel() + 2 * MARGIN,), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=x.device
        )
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + sizes.numel()].view(sizes)

    def strided_between_margins(x, sizes, strides, **options):
        if 0 in sizes:
            return x.new_empty(0, **options).as_strided(sizes, strides)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return x.new_empty(extent, **options).as_strided(sizes, strides, MARGIN)

    def poison(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", between_margins)
        patch.setattr(torch.Tensor, "new_empty_strided", strided_between_margins)
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        yield
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        assert not buffer.is_floating_point() or margins.isnan().all(), "something was written outside of a result"


@pytest.fixture
def capturing(monkeypatch):
    """Calls on CPU tensors are captured as if these were on a GPU."""
    from pretended_graphs import pretend

    return pretend(monkeypatch)


@pytest.fixture
def alone(monkeypatch):
    """Whatever else could answer for a Triton or a CUDA kernel raises."""
    import fastattn.kernels.cpu.attention as cpu
    import fastattn.kernels.eager.attention as eager

    def refuse(*args, **kwargs):
        raise AssertionError("a request to a kernel was answered by something else")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    for module in (cpu, eager):
        monkeypatch.setattr(module, "forward", refuse)
        monkeypatch.setattr(module, "backward", refuse)


@pytest.fixture
def matmul_precision():
    """PyTorch's switch for fp32 products on GPUs; left as it was."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before
