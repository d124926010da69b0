"""Calls of a module as CUDA graphs: what is captured, when it is captured anew, and whose the outputs are.

A capture is pretended (`pretended_graphs`), and all that decides about it is real. `test_graphs_gpu.py` has real ones.
"""

import contextlib
import copy
import gc
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastattn
from fastattn import graphs
from fastattn.graphs import bucket, graphed
from fastattn.kept import _may_keep
from fastattn.models.bert import BertForMaskedLM, BertModel
from fastattn.models.clip import CLIPModel

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip
TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
CLIP = {
    "text_config": {**TOWER, "vocab_size": 60, "max_position_embeddings": 24, "eos_token_id": 59},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
    "projection_dim": 24,
}
LENGTHS = (24, 7, 13)


class Norm(nn.LayerNorm):
    def forward(self, given):
        return super().forward(given) + getattr(self, "more", 0)


class Small(nn.Module):
    """With a number that its code reads, a buffer, and an output of several kinds."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.factor = nn.Linear(8, 8), Norm(8), 2.0
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x, times=1, name=None):
        y = self.norm(self.linear(x)) * self.factor * times + self.shift
        return {"y": y, "again": y, "pair": (y.sum(1), None), "name": name, "transposed": y.mT}


@pytest.fixture
def model():
    return Small().eval()


def x(rows=3):
    return torch.randn(rows, 8)


def assert_equal(one, other):
    torch.testing.assert_close(one["y"], other["y"], rtol=0, atol=0)


def text(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 58, (len(lengths), 24), generator=generator)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 1), mask.long()


@torch.no_grad()
def test_second_call_is_a_replay(capturing, model):
    call = graphed(model)
    for rows in (3, 3, 5, 3, 5):
        given = x(rows)
        assert_equal(call(given), model(given))
    assert (capturing.captures, capturing.replays) == (2, 5) and not call.not_captured
    assert "2 graphs" in repr(call)


@torch.no_grad()
def test_outputs_are_the_caller_s(capturing, model):
    """Nothing a caller holds is written to, nor what it wrote to read; kinds and identities are those of the call."""
    call = graphed(model)
    first, second = x(), x()
    out = call(first, name="a")
    before = out["y"].clone()
    out["transposed"].zero_()
    other = call(second, name="a")
    assert torch.equal(out["y"], before)
    assert_equal(other, model(second))
    assert out["y"] is out["again"] and out["pair"][1] is None and out["name"] == "a" and type(out["pair"]) is tuple
    assert out["transposed"].stride() == model(first)["transposed"].stride()


@torch.no_grad()
def test_plain_values_and_dtypes_are_in_the_key(capturing, model):
    call = graphed(model)
    given = x()
    for times in (1, True, 2, 1.0, 2):
        assert_equal(call(given, times=times), model(given, times=times))
    assert capturing.captures == 4
    call(given, 1)
    assert capturing.captures == 5  # given by place: another call, for all that is known
    double = copy.deepcopy(model).double()
    call = graphed(double)
    assert call(given.double())["y"].dtype == torch.float64


@torch.no_grad()
def test_states_are_in_the_key(capturing, model, matmul_precision):
    call, given = graphed(model), x()
    assert not call(given)["y"].is_inference()
    with torch.inference_mode():
        assert call(given)["y"].is_inference()
    assert not call(given)["y"].is_inference() and capturing.captures == 2
    with torch.autocast("cpu", torch.bfloat16):
        out = call(given)
        torch.testing.assert_close(out["y"], model(given)["y"], rtol=0, atol=0)
    assert capturing.captures == 3
    matmul_precision.fp32_precision = "tf32"
    call(given)
    assert capturing.captures == 4
    call(given)
    assert capturing.captures == 4


def test_a_call_of_inference_mode_replays_in_inference_mode_alone(capturing, model):
    """And what is kept may be written to in both."""
    call, given = graphed(model), x()
    for _ in range(2):
        with torch.inference_mode():
            assert_equal(call(given), model(given))
        with torch.no_grad():
            assert_equal(call(given), model(given))
    assert capturing.captures == 2


@torch.no_grad()
def test_no_copy_of_a_weight_is_kept_for_a_graph(capturing):
    """One that autocast keeps goes with its block, and one of ours is looked at in each call; a graph would read it later."""
    seen = []

    def look():
        seen.extend([torch.is_autocast_cache_enabled(), _may_keep([nn.Parameter(torch.ones(3))])])

    graphed(Probe(look).eval())(x())
    assert seen and not any(seen)
    look()
    assert seen[-2:] == [True, True] and gc.isenabled()


class Probe(nn.Module):
    def __init__(self, look):
        super().__init__()
        self.look = look

    def forward(self, given):
        self.look()
        return given + 1


def test_inputs_that_require_gradients_leave_no_trace(capturing, model):
    call, given = graphed(model), x().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                out = call(given)
            assert not out["y"].requires_grad
    assert capturing.captures == 2
    assert not any(y.requires_grad for c in call._calls.graphs._captured.values() for y in c.inputs)


@torch.no_grad()
def test_the_one_used_longest_ago_goes(capturing, model):
    call = graphed(model, limit=2)
    for rows in (1, 2, 1, 3):  # 3 in place of 2
        call(x(rows))
    assert capturing.captures == 3
    call(x(1))
    assert capturing.captures == 3
    call(x(2))
    assert capturing.captures == 4 and "2 graphs, at most 2" in repr(call)


@torch.no_grad()
def test_one_pool_as_long_as_a_graph_lives(capturing, model):
    call = graphed(model)
    for rows in (1, 2):
        call(x(rows))
    call.clear()
    call(x(1))
    assert capturing.pools == [0, 0, 1]  # a pool ends with the last of its graphs, and its handle with it
    call = graphed(model, limit=1)
    for rows in (1, 2):
        call(x(rows))
    assert capturing.pools[3:] == [2, 3]


# Weights and modules that change


@torch.no_grad()
def test_in_place_updates_are_seen(capturing, model):
    call, given = graphed(model), x()
    call(given)
    model.linear.weight.mul_(2)
    model.shift.data.add_(1)
    assert_equal(call(given), model(given))
    assert capturing.captures == 1


def replace(model):
    model.linear.weight = nn.Parameter(torch.randn(8, 8))


def assign(model):
    model.load_state_dict({name: v.clone() * 2 for name, v in model.state_dict().items()}, assign=True)


def data(model):
    model.linear.weight.data = torch.randn(8, 8)


def transpose(model):
    model.linear.weight.data = model.linear.weight.data.t()  # the same address


def fewer(model):
    model.norm.weight.data, model.norm.bias.data = model.norm.weight.data.clone(), model.norm.bias.data * 2


def buffer(model):
    model.shift = torch.randn(8)


def more(model):
    """Where there was none: the norm's own code adds it from now on."""
    model.norm.register_buffer("more", torch.ones(8))


def no_bias(model):
    model.linear.bias = None


def swap(model):
    model.linear = nn.Linear(8, 8).eval()


def made_anew(model):
    """In dicts of their own."""
    model.norm.__init__(8)
    nn.init.normal_(model.norm.weight)
    model.eval()


def number(model):
    model.factor = 3.0


def eps(model):
    model.norm.eps = 0.5


def forward(model):
    model.linear.forward = lambda y: y * 2


CHANGES = [replace, assign, data, transpose, fewer, buffer, more, no_bias, swap, made_anew, number, eps, forward]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_captured_anew(capturing, model, change):
    call, given = graphed(model), x()
    call(given)
    change(model)
    assert_equal(call(given), model(given))
    assert capturing.captures == 2 and len(call._calls.graphs) == 1, "the old graph is dropped"
    assert_equal(call(given), model(given))
    assert capturing.captures == 2


@torch.no_grad()
def test_another_dtype_at_the_same_address(capturing):
    model = nn.Embedding(4, 8).eval().half()
    call, ids = graphed(model), torch.tensor([1, 2])
    call(ids)
    address = model.weight.data_ptr()
    model.weight.data = model.weight.data.view(torch.int16).view(torch.float16)
    call(ids)
    assert capturing.captures == 1  # all is as it was
    model.weight.data = model.weight.data.view(torch.bfloat16)
    assert model.weight.data_ptr() == address
    assert call(ids).dtype == torch.bfloat16 and torch.equal(call(ids), model(ids))


def test_another_shape_at_the_same_address(capturing):
    model = nn.Embedding(4, 8).eval()
    call, ids = graphed(model), torch.tensor([1, 2])
    with torch.no_grad():
        call(ids)
        model.weight.data = model.weight.data[:3]
        call(ids)
        assert capturing.captures == 2


@torch.no_grad()
def test_what_changes_in_each_call_is_not_captured_each_time(capturing, model):
    call, given = graphed(model), x()
    for _ in range(6):
        data(model)
        assert_equal(call(given), model(given))
    assert capturing.captures == 2 and sum(call.not_captured.values()) == 4
    assert_equal(call(given), model(given))
    assert capturing.captures == 3  # it has come to rest


@torch.no_grad()
def test_a_class_that_is_patched(capturing, model, monkeypatch):
    call, given = graphed(model), x()
    call(given)
    monkeypatch.setattr(Norm, "forward", lambda self, y: y)
    assert_equal(call(given), model(given))
    assert capturing.captures == 2


@torch.no_grad()
def test_copies_start_without_graphs(capturing, model):
    call = graphed(model)
    call(x())
    for other in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert len(other._calls.graphs) == 0 and other._calls.module is not model
        other._calls.module.factor = 5.0
        given = x()
        assert_equal(other(given), other._calls.module(given))
        assert_equal(call(given), model(given))


# Streams and threads


@torch.no_grad()
def test_a_replay_waits_for_the_one_before_on_another_stream(capturing, model):
    call = graphed(model)
    call(x())
    capturing.log.clear()
    with capturing.on("other"):
        call(x())
    call(x(5))
    assert capturing.log == [
        ("other", "wait 1"), ("other", "replay"), ("other", "uses"), ("other", "record 2"),
        ("default", "wait 2"), ("default", "replay"), ("default", "record 3"),
    ]  # fmt: skip


@torch.no_grad()
def test_what_is_thrown_out_is_in_use_no_more(capturing, model):
    call = graphed(model, limit=1)
    call(x())
    call(x(5))
    waited = capturing.log.index(("host", "wait 1"))
    assert capturing.log[:waited].count(("default", "replay")) == 1


@torch.no_grad()
def test_many_threads(capturing, model):
    call, wrong = graphed(model), []

    def work(seed):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for _ in range(30):
                given = torch.randn(3, 8, generator=generator)
                if not torch.equal(call(given)["y"], model(given)["y"]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and capturing.captures == 1 and capturing.replays == 120


def test_buckets():
    """Few, and at most an eighth more rows than tokens, or 15 where there are few."""
    rows = [bucket(n) for n in range(5000)]
    for n, r in enumerate(rows):
        assert r >= max(n, 1) and r - n <= max(n // 8, 16)
    assert rows == sorted(rows) and len({r for r in rows if r > 128}) <= 8 * 6
    assert [bucket(n) for n in (0, 1, 16, 17, 128, 129, 256, 257, 1000)] == [16, 16, 16, 32, 128, 144, 256, 288, 1024]


# The models


def models():
    torch.manual_seed(0)
    ids, mask = text()
    pixels = torch.randn(2, 3, 16, 16)
    clip = CLIPModel(CLIP).eval()
    return {
        "bert": (BertModel(SMALL).eval(), (ids, mask)),
        "masked_lm": (BertForMaskedLM(SMALL).eval(), (ids, mask)),
        "clip": (clip, (ids, pixels, mask)),
        "clip_text": (clip.get_text_features, (ids, mask)),
        "clip_image": (clip.get_image_features, (pixels,)),
    }


def tensors(outputs):
    return [y for y in torch.utils._pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]


@pytest.mark.parametrize("name", ["bert", "masked_lm", "clip", "clip_text", "clip_image"])
@torch.no_grad()
def test_models_are_replayed(capturing, name):
    call, inputs = models()[name]
    replayed = graphed(call)
    for seed in range(3):
        inputs = (text((3, 24, 9), seed) + inputs[2:])[: len(inputs)] if name in ("bert", "masked_lm", "clip_text") else inputs
        expected, out = call(*inputs), replayed(*inputs)
        assert type(out) is type(expected)
        for one, other in zip(tensors(out), tensors(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert capturing.captures == 1 and not replayed.not_captured


@torch.no_grad()
def test_packed_models_share_graphs(capturing):
    """With a capacity that is a bucket, batches of other lengths are replays."""
    model = BertModel(SMALL).eval()
    call = graphed(model)
    for lengths in ((24, 7, 13), (20, 10, 12), (11, 13, 24)):
        ids, mask = text(lengths)
        packing = fastattn.Packing.from_mask(mask.bool(), capacity=bucket(sum(lengths)))
        hidden = packing.unpack(call(packing.pack(ids), packing=packing).last_hidden_state)
        expected = model(ids, mask).last_hidden_state * mask[..., None]
        torch.testing.assert_close(hidden, expected, rtol=2e-5, atol=2e-5)
    assert capturing.captures == 1


# The capture itself, as far as its order can be seen without a GPU


class Side:
    device = torch.device("cuda", 0)

    def wait_stream(self, other):
        pass


@pytest.fixture
def undone(monkeypatch):
    """What is done to undo a capture that fails; its end raises too, as on a GPU."""
    done, cuda = [], torch.cuda

    @contextlib.contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # what other threads do is none of its business
        try:
            yield
        except Exception:
            raise RuntimeError("the capture was invalidated") from None

    monkeypatch.setattr(cuda, "current_stream", Side)
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "graph", recording)
    monkeypatch.setattr(cuda, "get_rng_state", lambda: "random")
    monkeypatch.setattr(cuda, "set_rng_state", done.append)
    monkeypatch.setattr(graphs, "abandon", lambda device, pool: done.append((device, pool)))
    return done


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_capture_that_fails_says_what_was_raised_and_is_undone(undone, fails):
    """The first run is none of the capture: what it raises is the caller's."""
    runs = []

    def function():
        runs.append(len(runs) + 1)
        if runs[-1] == fails:
            raise ValueError("no such thing\nand more")
        return "result"

    if fails == 1:
        with pytest.raises(ValueError, match="no such thing"):
            graphs.capture(function, "pool", Side())
    elif fails == 2:
        with pytest.raises(graphs.NotCaptured, match="^its capture failed with ValueError: no such thing$"):
            graphs.capture(function, "pool", Side())
    else:
        assert graphs.capture(function, "pool", Side())[1] == "result"
    assert undone == ([(0, "pool"), "random"] if fails == 2 else [])
