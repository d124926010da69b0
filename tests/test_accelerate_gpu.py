"""`accelerate` with a static capacity on a GPU: no wait for the host, CUDA graphs, torch.compile's mode for small batches."""

import copy

import pytest
import torch
from graphs import captured
from test_accelerate import LENGTHS, build, result, text

import fastattn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OTHERS = (3, 20, 1, 9, 2)


def on_gpu(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


def both(dtype=torch.float32, capacity=64):
    model = build("bert").eval().to("cuda", dtype)
    ours = copy.deepcopy(model)
    return model, ours, fastattn.accelerate(ours, capacity=capacity, strict=True)


@pytest.mark.parametrize("train", [False, True])
def test_nothing_waits_for_the_host(train):
    _, ours, _ = both()
    ours.train(train)
    inputs = on_gpu(text())
    for mode in ("default", "error"):  # the first call compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = ours(**inputs).last_hidden_state
            if train:
                out.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_graph(dtype):
    """A captured call is replayed on batches of other lengths."""
    model, ours, handle = both(dtype)
    inputs = on_gpu(text())

    @torch.no_grad()
    def step():
        return (result(ours, inputs),)

    graph, (out,) = captured(step)
    for lengths in (LENGTHS, OTHERS, (24, 24, 24, 24, 24)):
        for name, x in on_gpu(text(lengths=lengths)).items():
            inputs[name].copy_(x)
        graph.replay()
        assert torch.equal(out, step()[0])
        assert handle.overflowed == (sum(lengths) > 64)
        if not handle.overflowed and dtype == torch.float32:
            torch.testing.assert_close(out, result(model, inputs), rtol=2e-5, atol=2e-5)


def test_compile_reduce_overhead():
    """CUDA graphs by torch.compile, the documented way."""
    model, ours, _ = both()
    compiled = torch.compile(ours, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for lengths in (LENGTHS, OTHERS, LENGTHS, OTHERS):
            inputs = on_gpu(text(lengths=lengths))
            torch.testing.assert_close(result(compiled, inputs).clone(), result(model, inputs), rtol=2e-5, atol=2e-5)
