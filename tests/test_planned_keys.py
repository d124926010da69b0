"""Keys of plans: a call gets what it would get in a fresh process, whatever was called before. And how many plans there are."""

import contextlib
import copy
import gc
import pickle
import weakref
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import Packing, biases, lowering, masks, planned
from fastattn.ops import attention

pytest.importorskip("triton")
from fastattn.kernels.triton import launch

BOTH = ["cpu", "triton"]


def spaced(x):
    return torch.stack([x, x], -1)[..., 0]


def offset(x):
    """At an address that is no multiple of 16 bytes."""
    return torch.cat([x.new_empty(1), x.flatten()])[1:].view(x.shape)


def apart(x):
    """Rows with a gap after each."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


# What may be another of one tensor. A vector has fewer layouts.
OTHERS = {
    "meta": lambda x: x.to("meta"),
    "to be negated": torch._neg_view,
    "without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "functional": torch._to_functional_tensor,
    "offset": offset,
    "spaced": spaced,
    "apart": apart,
    "apart and offset": lambda x: apart(torch.cat([x, x], -1))[..., 1 : x.shape[-1] + 1],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": lambda x: x.narrow(0, 0, 1).expand(x.shape),
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "a parameter": nn.Parameter,
    "one dimension more": lambda x: x[None],
    "two dimensions more": lambda x: x[None, None],
    "repeated": lambda x: x[None].repeat(3, *[1] * x.dim()),
    "one dimension less": lambda x: x[0],
    "a number": lambda x: x.flatten()[0],
    "fp64": lambda x: x.double(),
    "fp16": lambda x: x.half(),
    "integers": lambda x: x.int(),
    "sparse": lambda x: x.to_sparse(),
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    **{f"shorter in {i}": (lambda x, i=i: x.narrow(i, 0, x.shape[i] - 1) if i < x.dim() else x) for i in range(4)},
    **{f"empty in {i}": (lambda x, i=i: x.narrow(i, 0, 0) if i < x.dim() else x) for i in range(4)},
}


def others(request, **options):
    """(name, request) for each that differs in one thing: one tensor, all tensors alike, or one of `options`."""
    for kind, change in OTHERS.items():
        tensors = [name for name, x in request.items() if isinstance(x, Tensor)]
        if kind == "without memory":  # PyTorch's dispatcher makes zeros of those that are not optional
            tensors = [name for name in tensors if name in ("q", "k", "v", "x", "weight", "w1", "w2")]
        for name in tensors:
            yield f"{name} {kind}", {**request, name: change(request[name])}
        yield f"all {kind}", {**request, **{name: change(request[name]) for name in tensors}}
    for name, values in options.items():
        for value in values:
            yield f"{name}={value!r:.60}", {**request, name: value}


def outcome(function, request, recorded, launches=None):
    """Results and gradients, or the error; of Triton's backend what it would launch, and the results' layouts."""
    request, leaves = dict(request), []
    torch.manual_seed(0)  # what dropout draws its seed by
    for name, x in request.items():
        if recorded and isinstance(x, Tensor) and x.is_floating_point() and name != "mask":
            request[name] = x.detach().requires_grad_()
            leaves.append(request[name])
    try:
        with torch.set_grad_enabled(recorded):
            found = function(**request)
        found = list(found) if isinstance(found, tuple) else [found]
        if leaves and not found[0].is_meta:
            torch.manual_seed(1)
            outside = [torch.randn(x.shape).to(x) for x in found]
            found += torch.autograd.grad(found, leaves, outside, allow_unused=True)
    except Exception as error:  # whatever it is, a call with plans has to raise the same
        return type(error), str(error)
    if launches is None:
        return [None if x is None else (*layout_of(x), values_of(x)) for x in found]
    made, launches[:] = list(launches), []
    given = {x.data_ptr(): name for name, x in request.items() if type(x) in planned.PLAIN and x.layout is torch.strided}
    return [None if x is None else layout_of(x) for x in found], [described(launch, given) for launch in made]


def layout_of(x):
    return x.shape, x.stride(), x.dtype


def values_of(x):
    if x.is_meta:
        return None
    x = torch._from_functional_tensor(x) if torch._is_functional_tensor(x) else x
    return x.detach().double().nan_to_num(7.0, 8.0, 9.0).tolist()


def described(launch, given):
    """A launch without the memory that it allocated: of the call's own tensors which they are."""

    def seen(x):
        return (given.get(x.data_ptr()), *layout_of(x), x.data_ptr() % 16) if isinstance(x, Tensor) else (type(x), x)

    arguments = {name: seen(x) for name, x in launch.arguments.items()}
    return launch.kernel.__name__, launch.programs, launch.config, arguments


def forget(request):
    """What masks and packings keep for calls that were checked."""
    for x in request.values():
        if isinstance(x, Packing):
            x.__dict__.pop("_prepared", None)
        elif isinstance(x, masks.Mask):
            x.prepared.clear()


def assert_fresh(function, requests, recorded):
    """Each gets what it gets with no plans there are, when those of all before it are, and then when those of all are."""
    requests, wrong = list(requests), []
    on_paper = launch.recorded(launch.GPU(90)) if requests[0][1]["backend"] == "triton" else contextlib.nullcontext()
    with on_paper as launches:
        expected = []
        for _, request in requests:
            forget(request)
            with mock.patch.dict(planned.PLANS, clear=True):
                expected.append(outcome(function, request, recorded, launches))
        for _ in range(2):
            found = [outcome(function, request, recorded, launches) for _, request in requests]
            wrong += [name for (name, _), a, b in zip(requests, found, expected, strict=True) if a != b]
    assert not wrong, wrong
    refused = [found for found in expected if isinstance(found[0], type)]
    assert 0.2 < len(refused) / len(requests) < 0.8, "of both kinds there are many"


def heads(L=6, H=2, D=16):
    return torch.randn(2, L, H, D).transpose(1, 2)


SCALES = [0.5, -0.5, 0, 1, True, float("nan"), float("inf"), np.array(0.5), np.float64(0.5), "a", torch.tensor(0.5)]
RATES = [0.5, 0.25, 1, True, -0.5, float("nan"), "a", torch.tensor(0.5)]
COMMON = {"backend": ["eager", "cudnn", ["cpu"], None], "bias": [1.0], "dropout": RATES, "seed": [1]}


def attention_masks():
    torch.manual_seed(3)
    lengths, ids, keep = (
        torch.tensor([3, 5], dtype=torch.int32),
        torch.tensor([[0, 0, 1, 1, -1, 2]] * 2),
        torch.rand(2, 2, 6, 6) < 0.6,
    )
    yield from (masks.padding(lengths), masks.padding(lengths, lengths), masks.padding(lengths + 1), masks.padding(lengths[:1]))
    yield from (masks.Mask(key_end=offset(lengths)), masks.Mask(key_end=spaced(lengths)), masks.Mask(key_begin=lengths))
    yield masks.Mask(key_end=lengths[:1].expand(2))
    yield masks.Mask(key_end=lengths.to("meta"))
    yield from (masks.causal(), masks.causal("top_left"), masks.window(1, None), masks.window(2, None), masks.window(2, 1))
    yield from (masks.prefix_lm(lengths), masks.prefix_lm(lengths, "top_left"), masks.prefix_lm(lengths) & masks.padding(lengths))
    yield from (
        masks.key_padding(keep[:, 0, 0]),
        masks.Mask(keys=spaced(keep[:, 0, 0])),
        masks.Mask(keys=keep[:1, 0, 0].expand(2, 6)),
    )
    yield from (
        masks.documents(ids),
        masks.documents(ids, ids),
        masks.Mask(ids=ids.int(), key_ids=spaced(ids.int())),
        masks.rows(2, 3),
    )
    for index in np.ndindex(2, 2, 2, 2):
        yield keep[tuple(slice(None) if full else slice(0, 1) for full in index)]
    yield from (spaced(keep), keep.float(), keep[..., :5], "causal", masks.dense(keep), masks.dense(keep) & masks.causal())


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
def test_attention(backend, recorded):
    request = {"q": heads(), "k": heads(), "v": heads(), "mask": None, "backend": backend}
    cross = {**request, "k": heads(9, 1), "v": heads(9, 1, 32)}
    requests = list(others(request, scale=SCALES, mask=attention_masks(), return_lse=[True], **COMMON))
    requests += [
        ("cross", cross),
        ("cross lse", {**cross, "return_lse": True}),
        ("cross causal", {**cross, "mask": masks.causal()}),
    ]
    assert_fresh(fastattn.attention, requests, recorded)


def of(*lengths, longest=6, **options):
    return Packing.from_lengths(torch.tensor(lengths), longest, **options)


def tokens(packing, backend):
    """A request for packed sequences."""
    return {name: torch.randn(int(packing.lengths.sum()), 2, 16) for name in "qkv"} | {
        "packing": packing, "mask": None, "backend": backend
    }  # fmt: skip


def values(columns=2, rows=8):
    """What T5's relative bias is looked up in."""
    return torch.randn(rows, columns)


def relative(table, **options):
    return biases.relative(table, num_buckets=8, max_distance=16, **options)


def tensor_biases():
    for index in np.ndindex(2, 2, 2, 2):
        yield torch.randn([full if there else 1 for there, full in zip(index, (2, 2, 6, 6), strict=True)])
    yield from (torch.randn(6, 6), torch.randn(2, 6, 6), torch.randn(6), torch.tensor(1.0), torch.randn(2, 2, 6, 5), True)
    yield from (torch.randn(2, 2, 6, 6).half(), torch.randn(2, 2, 6, 6).double(), torch.ones(6, 6, dtype=torch.bool))


def distance_biases():
    yield from (relative(values()), relative(values(), align="bottom_right"), relative(values(), bidirectional=False))
    yield from (relative(values(3)), relative(values().half()), relative(values().double()), relative(values(4)[:, ::2]))
    yield from (biases.relative(values(2, 10), num_buckets=10, max_distance=16), relative(offset(values())))
    slopes = torch.rand(2, 2)
    yield from (biases.alibi(slopes), biases.alibi(slopes[0]), biases.alibi(slopes[0], "top_left"), biases.alibi(slopes[:1]))
    yield from (biases.alibi(torch.rand(3)), biases.alibi(torch.rand(3, 2)))


SEEDS = [7, None, 2**64, torch.tensor([3]), torch.tensor(3), torch.tensor([3, 4]), torch.tensor([3], dtype=torch.int32), True]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
def test_attention_with_bias_and_dropout(backend, recorded):
    """In pairs, so that each is there with and without the other."""
    request = {"q": heads(), "k": heads(), "v": heads(), "mask": masks.padding([3, 6]), "bias": None, "backend": backend}
    given = [*tensor_biases(), *distance_biases()]
    both = {**request, "dropout": 0.5, "seed": 3}
    requests = list(others({**request, "bias": torch.randn(2, 1, 6)}, bias=given, return_lse=[True]))
    requests += [(f"dropped: {name}", other) for name, other in others(both, bias=given, seed=SEEDS, dropout=RATES)]
    requests += [(f"causal: {name}", {**other, "mask": masks.causal()}) for name, other in others(both, bias=given)]
    longer = {**both, "q": heads(9), "bias": relative(values(), align="bottom_right")}
    requests += [("longer", longer), ("longer, top left", {**longer, "bias": relative(values())})]
    assert_fresh(fastattn.attention, requests, recorded)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
def test_varlen_attention_with_bias_and_dropout(backend, recorded):
    packings = [of(2, 5), of(6, 3), of(1, 1, 5), of(2, 5, longest=40), of(5, 2), of(2, 5, longest=8)]
    given = [*tensor_biases(), torch.randn(2, 2, 40, 40), torch.randn(1, 2, 8, 8), *distance_biases()]
    requests = []
    for packing in packings[:4]:
        request, rows = tokens(packing, backend), int(packing.lengths.sum())
        requests += [(f"{rows} rows: {name}", other) for name, other in others({**request, "bias": given[0]}, bias=given)]
        both = {**request, "dropout": 0.5, "seed": 3, "bias": None}
        some = {"bias": given, "seed": SEEDS, "dropout": RATES, "key_packing": packings}
        requests += [(f"dropped, {rows} rows: {name}", other) for name, other in others(both, **some)]
    assert_fresh(fastattn.varlen_attention, requests, recorded)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
def test_varlen_attention(backend, recorded):
    """Rows are no part of a key, so each of these must be looked at in every call."""

    def unchecked(*cu):
        return Packing.from_cu_seqlens(torch.tensor(cu), 6, validate=False)

    packing, longer = of(2, 5), of(6, 3)
    request = tokens(packing, backend)
    packings = [of(5, 2), of(1, 1, 5), longer, of(2, 5, longest=40), of(2, 5, capacity=7), of(2, 5, capacity=9), "packing", None]
    options = {
        "packing": packings,
        "key_packing": [of(1, 6), longer, of(1, 1, 5), "packing"],
        "mask": [masks.causal(), masks.full()],
    }
    requests = list(others(request, scale=SCALES[:3], return_lse=[True], **options, **COMMON))
    requests += [(f"causal: {name}", other) for name, other in others({**request, "mask": masks.causal()}, packing=packings)]
    any_rows = {**request, "packing": unchecked(0, 2, 7)}
    requests += [
        (f"any rows: {name}", other) for name, other in others(any_rows, packing=[unchecked(0, 5, 9), unchecked(3, 4, 4)])
    ]
    requests += [
        (f"any rows: {name} of {rows}", {**any_rows, name: torch.randn(rows, 2, 16)}) for name in "qkv" for rows in (5, 12)
    ]
    assert_fresh(fastattn.varlen_attention, requests, recorded)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
def test_linear(backend, recorded):
    def request(rows, x=None):
        x = torch.randn(rows, 16) if x is None else x
        return {"x": x, "weight": torch.randn(8, 16), "bias": torch.randn(8), "residual": torch.randn(*x.shape[:-1], 8)}

    options = {"activation": ["silu", "tanh", ["gelu"], 1], "backend": ["eager", "cudnn", ["cpu"]]}
    requests = [("one row", request(1, torch.randn(4, 24)[:1, :16]))]
    for rows in (1, 3):
        requests += [(f"{rows} rows: {name}", other) for name, other in others(request(rows), **options)]
    requests += [("batch", request(6, torch.randn(2, 3, 16))), ("in a batch", request(2, torch.randn(2, 3, 16)[:, 0]))]
    requests = [(name, {"activation": "gelu", "backend": backend, **other}) for name, other in requests]
    assert_fresh(fastattn.linear, requests, recorded)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
def test_ffn(backend, recorded):
    tensors = {
        "x": torch.randn(3, 16),
        "w1": torch.randn(8, 16),
        "b1": torch.randn(8),
        "w2": torch.randn(16, 8),
        "b2": torch.randn(16),
    }
    options = {"activation": ["silu", "tanh", ["gelu"], None], "recompute": [True], "dropout": [0.5], "seed": [1]}
    requests = [*others({**tensors, "backend": backend}, **options)]
    requests += [
        (f"narrow: {name}", other) for name, other in others({**tensors, "x": torch.randn(4, 24)[:1, :16], "backend": backend})
    ]
    assert_fresh(fastattn.ffn, requests, recorded)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("rms", [False, True])
def test_norms(backend, recorded, rms):
    def request(rows, x=None):
        x = torch.randn(rows, 16) if x is None else x
        bias = {} if rms else {"bias": torch.randn(16)}
        return {"x": x, "residual": torch.randn(*x.shape), "weight": torch.randn(16), **bias, "backend": backend}

    options = {"eps": [1e-3, 1, 0, float("nan"), np.array(1e-3), "a"], "return_sum": [True]}
    options |= {"backend": ["eager", "cuda", ["cpu"]], "dropout": [0.5], "seed": [1]}
    requests = [("one row", request(1, torch.randn(4, 24)[:1, :16]))]
    for rows in (1, 3):
        requests += [(f"{rows} rows: {name}", other) for name, other in others(request(rows), **options)]
    requests += [("batch", request(6, torch.randn(2, 3, 16))), ("in a batch", request(2, torch.randn(2, 3, 16)[:, 0]))]
    assert_fresh(fastattn.add_rms_norm if rms else fastattn.add_layer_norm, requests, recorded)


def test_what_autocast_may_do_is_refused_without_it():
    """Its casts are checked by other rules: their plans serve nobody else."""
    x, weight, w2 = torch.randn(3, 16), torch.randn(8, 16), torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        fastattn.linear(x, weight)
        fastattn.ffn(x, weight, None, w2, None)
    with pytest.raises(TypeError, match="weight is torch.float32, but x is torch.bfloat16"):
        fastattn.linear(x.bfloat16(), weight)
    with pytest.raises(TypeError, match="w1 is torch.float32, but x is torch.bfloat16"):
        fastattn.ffn(x.bfloat16(), weight, None, w2, None)


def test_a_call_follows_the_fp32_switch(matmul_precision):
    q, x, weight = heads(), torch.randn(3, 16), torch.randn(8, 16)
    with launch.recorded(launch.GPU(90)) as launches:
        for setting in ("ieee", "tf32", "ieee"):
            matmul_precision.fp32_precision = setting
            fastattn.attention(q, q, q, backend="triton")
            fastattn.linear(x, weight, activation="quick_gelu", backend="triton")
            assert [made.arguments["PRECISION"] for made in launches] == [setting] * 2
            launches.clear()


def test_a_mask_s_key_holds_how_its_tensors_lie():
    """A kernel is compiled for addresses that are multiples of 16 bytes, or for any; what the lengths are is no part."""

    def key(key_end):
        return lowering.Prepared(lowering.LoweredMask(key_end=key_end)).key

    lengths = torch.tensor([3, 5], dtype=torch.int32)
    assert key(lengths) is key(lengths + 1)
    others = [key(offset(lengths)), key(spaced(lengths)), key(lengths[:1]), key(lengths.to("meta")), key(None), key(lengths)]
    assert len(set(others)) == len(others)


def test_copies_share_no_addresses():
    """Of a mask and a packing that were used: their tensors are others', and so is what stands for them in a launch."""
    packing = Packing.from_lengths([2, 5], 6)
    q, x = heads(), torch.randn(7, 2, 16)
    mask = masks.padding([3, 5]) & masks.documents(torch.zeros(2, 6, dtype=torch.int64))
    call = [
        lambda mask, packing: fastattn.attention(q, q, q, mask),
        lambda mask, packing: fastattn.varlen_attention(x, x, x, packing),
    ]
    with launch.dry(launch.GPU(90)):  # in which handles are addresses
        for each in call:
            each(mask, packing)

        def addresses(mask, packing):
            prepared = [*mask.prepared.values(), packing.prepared(packing)]
            assert len(prepared) == 2
            return {at for one in prepared for some in one.handles.values() for part in some for at in part if at is not None}

        before = addresses(mask, packing)
        for copied in (copy.deepcopy((mask, packing)), pickle.loads(pickle.dumps((mask, packing)))):
            for each in call:
                each(*copied)
            assert before and not before & addresses(*copied)
    assert torch.equal(call[0](copied[0], None), call[0](mask, None))
    assert torch.equal(call[1](None, copied[1]), call[1](None, packing))


def test_a_packing_s_memory_is_freed_with_it():
    """What it keeps for its next call does not hold it."""
    packing, x = Packing.from_lengths([2, 5], 6), torch.randn(7, 2, 16)
    fastattn.varlen_attention(x, x, x, packing)
    kept = weakref.ref(packing.cu_seqlens)
    assert packing.prepared(packing) is not None
    gc.disable()
    try:
        del packing
        assert kept() is None
    finally:
        gc.enable()


def test_nothing_is_kept_of_the_memory_of_a_capture(monkeypatch):
    """A mask and a packing whose tensors may lie in a CUDA graph's pool, which a replay writes."""

    class OnGPU(Tensor):
        device, is_cuda = SimpleNamespace(type="cuda"), True

    monkeypatch.setattr(masks, "Tensor", OnGPU)
    there = torch.zeros(2).as_subclass(OnGPU)
    prepared, mask = SimpleNamespace(tensors=[there]), masks.Mask()
    packing = Packing(there, there, there, there, 2, 2, 2)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        mask.keep_prepared(("key",), prepared)
        packing.keep_prepared(packing, prepared)
        mask._keep(("key",), "bits", [there])
        kept = mask.prepared, mask._bits, packing.prepared(packing)
        assert kept == (({}, {}, None) if capturing else ({("key",): prepared}, {("key",): "bits"}, prepared))


@pytest.mark.parametrize("extras", [{}, {"dropout": 0.5}, {"bias": torch.zeros(6, 6), "dropout": 0.5}])
def test_a_kind_of_call_is_remembered_once(extras):
    """However many masks and packings there are of it; there are few places for other kinds."""
    q, x = heads(), torch.randn(7, 2, 16)
    for n in range(20):
        fastattn.attention(q, heads(), heads(), masks.padding([3, n % 6]), **extras)
        if "bias" not in extras:
            fastattn.varlen_attention(x, torch.randn(7, 2, 16), torch.randn(7, 2, 16), Packing.from_lengths([2, 5], 6), **extras)
    assert {len(kinds) for kinds in planned.PLANS.values() if isinstance(kinds, list)} == {1}


@pytest.mark.parametrize("extras", [{}, {"dropout": 0.5}])
def test_no_mask_is_known_when_keys_are_dropped(monkeypatch, extras):
    monkeypatch.setattr(lowering, "MOST_KEYS", 3)
    monkeypatch.setattr(lowering, "_KEYS", {})
    q, k, v = heads(), heads(), heads()
    for n in range(5):
        fastattn.attention(q, k, v, masks.window(n, None))
    seen = []
    checked = attention.checked
    monkeypatch.setattr(attention, "checked", lambda *given: seen.append(given) or checked(*given))
    for _ in range(3):
        fastattn.attention(q, k, v, **extras)
    assert len(seen) == 1


@pytest.mark.parametrize("what", ["plans", "masks"])
def test_what_is_kept_is_bounded(monkeypatch, what):
    """And results stay right when it is dropped."""
    monkeypatch.setattr(planned, "LIMIT", 8)
    monkeypatch.setattr(lowering, "MOST_KEYS", 3)
    monkeypatch.setattr(lowering, "_KEYS", {})
    mask, most = masks.causal(), [0, 0, 0]
    for L in [*range(1, 20), *range(1, 20)]:
        q = torch.randn(1, 1, L, 16)
        given = mask if what == "masks" else masks.window(L, None)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, given.dense(1, 1, L, L))
        torch.testing.assert_close(fastattn.attention(q, q, q, given), expected)
        most = list(map(max, most, (len(planned.PLANS), len(mask.prepared), len(lowering._KEYS))))
    assert most[0] == 8 and most[1] == (masks.CACHED_SHAPES if what == "masks" else 0) and 1 <= most[2] <= 3
