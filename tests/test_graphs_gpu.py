"""Calls as CUDA graphs, replayed on a GPU: `graphed`, and `accelerate` with cuda_graphs.

What decides about them is tested without a GPU, in test_graphs.py, test_graphs_refused.py and test_accelerate_graphs.py.
"""

import copy
import threading
import warnings

import pytest
import test_accelerate_graphs as accelerated
import test_graphs as alone
import torch
from test_accelerate import MODELS, L, result, text
from test_accelerate_graphs import ONE_BUCKET, both, close, graphs_of, proven
from test_graphs import Small, assert_equal, models, tensors, x
from torch import nn

from fastattn.graphs import graphed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def moved(inputs):
    return tuple(y.cuda() for y in inputs)


@pytest.mark.parametrize("name", ["bert", "masked_lm", "clip", "clip_text", "clip_image"])
def test_models_replay_on_a_gpu(name):
    call, inputs = models()[name]
    (call if isinstance(call, nn.Module) else call.__self__).cuda()
    replayed = graphed(call)
    held = []
    for seed in range(3):
        if name in ("bert", "masked_lm", "clip_text"):
            inputs = alone.text((3, 24, 9), seed)
        with torch.inference_mode():
            expected = tensors(call(*moved(inputs)))
            held.append((tensors(replayed(*moved(inputs))), expected))
    for out, expected in held:
        for one, other in zip(out, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    assert not replayed.not_captured


@pytest.mark.parametrize("change", alone.CHANGES)
@torch.no_grad()
def test_a_change_is_captured_anew_on_a_gpu(change):
    model = Small().eval().cuda()
    call, given = graphed(model), x().cuda()
    call(given)
    held = [y.detach() for y in model.state_dict().values()]  # what is new lies elsewhere
    change(model)
    model.cuda()
    assert_equal(call(given), model(given))
    assert held and call._calls.graphs.captures == 2


@torch.no_grad()
def test_a_capture_that_fails_on_a_gpu():
    """A read on the host inside; what comes after is as if it had not been tried."""

    class Reads(nn.Module):
        def forward(self, y):
            return y * float(y.sum())

    call, given = graphed(Reads().eval()), x().cuda()
    before = torch.cuda.current_stream()
    torch.cuda.manual_seed(3)
    random = torch.cuda.get_rng_state()
    for _ in range(2):
        torch.testing.assert_close(call(given), given * given.sum())
    (why,) = call.not_captured
    assert "its capture failed with" in why and call.not_captured[why] == 2
    assert torch.cuda.current_stream() == before and torch.equal(torch.cuda.get_rng_state(), random)
    torch.cuda.empty_cache()
    torch.rand(3, device="cuda")
    model = Small().eval().cuda()
    call = graphed(model)
    assert_equal(call(given), model(given))
    assert not call.not_captured


@torch.no_grad()
def test_streams_and_threads_on_a_gpu():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).eval().cuda()
    call, wrong = graphed(model, limit=2), []

    def work(seed):
        torch.cuda.set_device(0)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            generator = torch.Generator("cuda").manual_seed(seed)
            for turn in range(30):
                given = torch.randn(64 + 64 * (turn % 2), 256, device="cuda", generator=generator)
                if not torch.allclose(call(given), model(given), atol=1e-4):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and call._calls.graphs.captures == 2


@torch.no_grad()
def test_dropped_graphs_free_their_memory():
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).eval().cuda()
    given = torch.randn(8192, 1024, device="cuda")
    model(given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    call = graphed(model)
    call(given)
    assert torch.cuda.memory_reserved() >= before + given.nbytes
    call.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26  # workspaces of cuBLAS on the side stream stay


def on_gpu(inputs):
    return {name: y.cuda() for name, y in inputs.items()}


def both_on_gpu(name="bert", **settings):
    model, ours, handle = both(name, **settings)
    return model.cuda(), ours.cuda(), handle


@pytest.mark.parametrize("name", MODELS)
def test_replays_on_a_gpu(name):
    """Outputs are looked at when all calls are over: none is written to by a later one."""
    model, ours, handle = both_on_gpu(name)
    held = []
    with torch.inference_mode():
        proven(ours, on_gpu(text()))
        for lengths in (*ONE_BUCKET, (L, L), (24, 24, 24, 0, 13), *ONE_BUCKET):
            inputs = on_gpu(text(lengths=lengths))
            held.append((result(ours, inputs), result(model, inputs)))
    for out, expected in held:
        close(out, expected)
    assert graphs_of(ours if name != "bert_masked_lm" else ours.bert).captures == 3
    assert handle.report.not_captured.total() == 1


@pytest.mark.parametrize(("how", "reads"), [("capacity", 0), ("host", 0), ("device", 1)])
def test_reads_on_a_gpu(how, reads):
    """As PyTorch itself counts what waits. A mask in the host's memory is served in the first call too, which is no replay."""
    model, ours, _ = both_on_gpu(capacity=64 if how == "capacity" else None)
    inputs = on_gpu(text(lengths=ONE_BUCKET[1]))
    given = {**inputs, "attention_mask": inputs["attention_mask"].cpu()} if how == "host" else inputs
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        for _ in range(2):  # the first proves the layers
            close(ours(**given).last_hidden_state, expected, inputs["attention_mask"])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = ours(**given).last_hidden_state
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert sum("called a synchronizing CUDA operation" in str(one.message) for one in told) == reads
        close(out, expected, inputs["attention_mask"])


@pytest.mark.parametrize("change", accelerated.CHANGES.values(), ids=accelerated.CHANGES)
@torch.no_grad()
def test_a_change_is_never_replayed_from_before_on_a_gpu(change):
    model, ours, _ = both_on_gpu()
    inputs = on_gpu(text())
    for _ in range(2):  # in the first one transformers' own hooks come, and then all is looked at again
        proven(ours, {**inputs, "output_hidden_states": True})
    ours(**inputs)
    for m in (model, ours):
        change(m)
    for _ in range(3):
        close(result(ours, inputs), result(model, inputs))
    assert graphs_of(ours).captures == 2 and len(graphs_of(ours)) == 1


@torch.no_grad()
def test_moved_away_and_back_on_a_gpu():
    model, ours, handle = both_on_gpu()
    inputs = on_gpu(text())
    for _ in range(2):
        proven(ours, inputs)
    ours.cpu()
    close(result(ours, text()), result(model, inputs).cpu())
    ours.cuda()
    for _ in range(3):
        close(result(ours, inputs), result(model, inputs))
    handle.restore()
    close(result(ours, inputs), result(model, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast_and_half_precision_on_a_gpu(dtype):
    """As near to the exact result as the model itself, in the dtype that it has."""
    model, ours, handle = both_on_gpu()
    inputs = on_gpu(text())
    for cast in (False, True):
        if cast:
            model.to(dtype), ours.to(dtype)
        exact = result(copy.deepcopy(model).double(), inputs)
        for _ in range(3):
            with torch.autocast("cuda", dtype, enabled=not cast):
                out, expected = result(ours, inputs), result(model, inputs)
            error, own = ((y.double() - exact).norm() for y in (out, expected))
            assert out.dtype == expected.dtype and error <= 1.25 * own
    assert graphs_of(ours).captures == 2 and handle.report.not_captured.total() == 1
