"""`fastattn.nn.MultiHeadAttention` in the place of torch.nn.MultiheadAttention: a seeded sample of their arguments."""

import random

import pytest
import torch
from backends import TRITON, device_of
from modules import assert_like, perturbed
from torch import nn

import fastattn
from fastattn import masks
from fastattn.dropout import draw_seed

SAMPLES, SHARE = 400, {"cpu": 1, "eager": 4, "triton": 16}  # one of so many is for a backend
MASKS = ["none", "bool", "float hides", "float"]
WRONG = [
    "key_padding_mask's shape", "attn_mask's shape", "integers", "hint alone", "query's width", "value's length", "batch", "dims",
]  # fmt: skip


def sample(seed):
    """A case as plain values."""
    r = random.Random(seed)
    keys = r.choice(["self", "self", "shared", "cross"])
    batched = r.random() < 0.85
    return {
        "seed": seed,
        "keys": keys,
        "batched": batched,
        "bias": r.random() < 0.7,
        "add_bias_kv": r.random() < 0.2,
        "add_zero_attn": r.random() < 0.2,
        "widths": r.choice([(None, None), (None, None), (12, None), (20, 12)]) if keys == "cross" else (None, None),
        "batch_first": r.random() < 0.5,
        "padding": r.choice(MASKS),
        "attn": r.choice([*MASKS, "hint"]),
        "attn_dims": r.choice([2, 3]),
        "need_weights": r.random() < 0.5,
        "average": r.random() < 0.5,
        "train": r.random() < 0.7,
        "wrong": r.choice(WRONG) if r.random() < 0.15 else None,
    }


def sizes(case):
    r = random.Random(case["seed"] + 1)
    B, L = r.choice([1, 2, 3]) if case["batched"] else 1, r.choice([1, 5, 9])
    return B, r.choice([1, 2, 4]), L, L if case["keys"] == "self" else r.choice([1, 4, 11])


def modules(case, backend):
    H = sizes(case)[1]
    options = {name: case[name] for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    options |= dict(zip(("kdim", "vdim"), case["widths"], strict=True))
    torch.manual_seed(case["seed"])
    theirs = perturbed(nn.MultiheadAttention(16, H, **options)).train(case["train"])
    ours = fastattn.nn.MultiHeadAttention(16, H, **options, backend=backend).train(case["train"])
    assert not any(ours.load_state_dict(theirs.state_dict()))
    return theirs.to(device_of(backend)), ours.to(device_of(backend))


def hidden(shape, kind, g):
    """Of a kind of mask; the first key is always seen, since torch.nn gives NaN where none is."""
    if kind == "none":
        return None
    hide = torch.rand(shape, generator=g) < 0.4
    hide[..., 0] = False
    if kind == "bool":
        return hide
    if kind == "float hides":
        return torch.zeros(shape).masked_fill(hide, float("-inf"))
    return torch.randn(shape, generator=g).masked_fill(hide, float("-inf"))


def inputs(case):
    (B, H, L, S), g = sizes(case), torch.Generator().manual_seed(case["seed"])
    widths = 16, case["widths"][0] or 16, case["widths"][1] or 16
    names = {"self": ("query",), "shared": ("query", "key"), "cross": ("query", "key", "value")}[case["keys"]]
    made = {}
    for name, length, width in zip(names, (L, S, S), widths, strict=False):
        x = torch.randn(B, length, width, generator=g)
        x = x if case["batch_first"] else x.transpose(0, 1).contiguous()
        made[name] = x if case["batched"] else x.squeeze(0 if case["batch_first"] else 1)
    padding = hidden((B, S), case["padding"], g)
    made["key_padding_mask"] = padding if padding is None or case["batched"] else padding[0]
    shape = (L, S) if case["attn_dims"] == 2 else (B * H, L, S)
    if case["attn"] == "hint":
        made["attn_mask"] = torch.ones(L, S, dtype=torch.bool).triu(1)
    else:
        made["attn_mask"] = hidden(shape, case["attn"], g)
    return spoilt(case, made) if case["wrong"] else made


def spoilt(case, made):
    kind = case["wrong"]
    if kind == "key_padding_mask's shape":
        made["key_padding_mask"] = torch.zeros(7, 13, dtype=torch.bool)
    elif kind == "attn_mask's shape":
        made["attn_mask"] = torch.zeros(13, 7)
    elif kind == "integers":
        made["attn_mask"] = torch.zeros(sizes(case)[2:], dtype=torch.long)
    elif kind == "hint alone":
        made["attn_mask"] = None
    elif kind == "query's width":
        made["query"] = made["query"][..., :-1]
    else:
        key = made.get("key", made["query"])
        rows = torch.cat([key, key[-1:]]) if kind == "value's length" else key.flatten() if kind == "dims" else key[None]
        made |= {"key": key, "value": rows}
        if kind == "batch":
            made["key"] = rows
    return made


def caller(case):
    def call(module, query, key=None, value=None, key_padding_mask=None, attn_mask=None):
        key = query if key is None else key
        value = key if value is None else value
        options = {"need_weights": case["need_weights"], "average_attn_weights": case["average"]}
        hint = case["attn"] == "hint" or case["wrong"] == "hint alone"
        if attn_mask is not None and isinstance(module, nn.MultiheadAttention) and (case["add_bias_kv"] or case["add_zero_attn"]):
            hint = False  # by the hint torch.nn hides the added keys, by the mask it does not
        return module(query, key, value, key_padding_mask, attn_mask=attn_mask, is_causal=hint, **options)

    return call


def on(device, given):
    return {name: x if x is None else x.to(device) for name, x in given.items()}


def raises(call, module, **given):
    """With gradients: torch.nn's fast path checks less."""
    try:
        call(module, **given)
    except (AssertionError, RuntimeError, IndexError):
        return True
    return False


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("backend", ["eager", "cpu", TRITON])
def test_like_torch(backend, part):
    """Outputs, weights and all gradients; where torch.nn raises, an error of ours."""
    chosen = [n for n in range(SAMPLES) if n % SHARE[backend] == 0 and n // SHARE[backend] % 8 == part]
    assert chosen
    for n in chosen:
        case = sample(n)
        given, call, device = inputs(case), caller(case), device_of(backend)
        theirs, ours = modules(case, backend)
        if case["wrong"] and raises(call, theirs, **on(device, given)):
            with pytest.raises((TypeError, ValueError)):
                call(ours, **on(device, given))
            continue
        try:
            assert_like(theirs, ours, call, on(device, given))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


def test_the_sample_is_of_all_kinds():
    cases = [sample(n) for n in range(SAMPLES)]
    for name in ("keys", "padding", "attn", "attn_dims", "widths", "wrong"):
        assert (
            len({case[name] for case in cases})
            == {"keys": 3, "padding": 4, "attn": 5, "attn_dims": 2, "widths": 3, "wrong": 9}[name]
        )


def attention(**options):
    torch.manual_seed(0)
    return perturbed(fastattn.nn.MultiHeadAttention(16, 4, batch_first=True, **options))


def test_initial_weights_are_torch_s():
    for options in ({}, {"kdim": 12, "vdim": 20}, {"add_bias_kv": True}, {"bias": False}):
        found = []
        for cls in (nn.MultiheadAttention, fastattn.nn.MultiHeadAttention):
            torch.manual_seed(5)
            found.append(cls(16, 4, **options).state_dict())
        assert list(found[0]) == list(found[1])
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("backend", ["eager", "cpu", TRITON])
@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(backend, need_weights):
    """By the draws of `dropout_mask`, from the seed that PyTorch's generator gives; weights are those after dropout."""
    device = device_of(backend)
    same, mha = torch.randn(2, 9, 16, device=device), attention(dropout=0.4, backend=backend).to(device)
    torch.manual_seed(7)
    out, weights = mha(same, same, same, need_weights=need_weights, average_attn_weights=False)
    torch.manual_seed(7)
    kept = fastattn.dropout_mask(draw_seed(None, torch.device(device)), 2, 4, 9, 9, 0.4).double()
    exact = mha.double()
    q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in nn.functional.linear(
        same.double(), exact.in_proj_weight, exact.in_proj_bias).chunk(3, -1))  # fmt: skip
    p = (q @ k.mT / 2).softmax(-1) * kept / 0.6
    expected = nn.functional.linear((p @ v).transpose(1, 2).flatten(2), exact.out_proj.weight, exact.out_proj.bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(weights.double(), p, rtol=1e-5, atol=1e-6)
    assert not torch.equal(mha.float()(same, same, same, need_weights=False)[0], out)  # another draw


def test_a_query_that_sees_nothing():
    mha, x = attention(), torch.randn(2, 5, 16)
    out, weights = mha(x, x, x, key_padding_mask=torch.tensor([[False] * 5, [True] * 5]))
    assert torch.equal(out[1], mha.out_proj.bias.expand(5, 16)) and not weights[1].any()


@pytest.mark.parametrize("backend", ["eager", "cpu", TRITON])
def test_packed_equals_padded(backend):
    lengths, device = torch.tensor([9, 4, 0, 1]), device_of(backend)
    packing = fastattn.Packing.from_lengths(lengths.to(device), 9)
    for options, mask in (
        ({}, None),
        ({"num_kv_heads": 2}, masks.causal()),
        ({"alibi": True, "rotary": fastattn.nn.Rotary()}, None),
    ):
        mha = attention(backend=backend, **options).to(device)
        x = torch.randn(4, 9, 16, device=device)
        hide = torch.arange(9, device=device) >= lengths.to(device)[:, None]
        padded = mha(x, x, x, key_padding_mask=hide, need_weights=False, mask=mask)[0]
        rows = packing.pack(x)
        packed = mha(rows, rows, rows, need_weights=False, mask=mask, packing=packing)[0]
        torch.testing.assert_close(packed, packing.pack(padded), rtol=1e-5, atol=1e-5)


def test_cross_attention_of_packings():
    mha = attention()
    ours, theirs = fastattn.Packing.from_lengths([5, 2], 5), fastattn.Packing.from_lengths([3, 7], 7)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    hide = torch.arange(7) >= torch.tensor([[3], [7]])
    padded = mha(x, y, y, key_padding_mask=hide, need_weights=False)[0]
    packed = mha(ours.pack(x), *[theirs.pack(y)] * 2, need_weights=False, packing=ours, key_packing=theirs)[0]
    torch.testing.assert_close(packed, ours.pack(padded), rtol=1e-5, atol=1e-5)


def test_options_of_its_own():
    """Grouped heads and ALiBi against plain PyTorch; `mask` and `bias` beside torch.nn's arguments."""
    x = torch.randn(2, 9, 16)
    mha = attention(num_kv_heads=2)
    q, k, v = nn.functional.linear(x, mha.in_proj_weight, mha.in_proj_bias).split([16, 8, 8], -1)
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mha(x, x, x, need_weights=False)[0], mha.out_proj(out))
    torch.testing.assert_close(mha(x, x, x)[0], mha.out_proj(out))
    turning = attention(rotary=fastattn.nn.Rotary(base=100.0, interleaved=True))
    q, k, v = nn.functional.linear(x, turning.in_proj_weight, turning.in_proj_bias).unflatten(-1, (3, 4, 4)).unbind(2)
    angles = torch.arange(9)[:, None, None] * 100.0 ** -torch.tensor([0.0, 0.5])
    q, k = (
        torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (2, 2))) * torch.exp(1j * angles)).flatten(-2) for y in (q, k)
    )
    out = nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)
    torch.testing.assert_close(turning(x, x, x, need_weights=False)[0], turning.out_proj(out))
    plain, alibi = attention(), attention(alibi=True)
    distance = (torch.arange(9) - torch.arange(9)[:, None]).abs()
    bias = -(2.0 ** -torch.tensor([2.0, 4, 6, 8]))[:, None, None] * distance
    torch.testing.assert_close(alibi(x, x, x)[0], plain(x, x, x, bias=bias)[0])
    repeated = bias.repeat(2, 1, 1)
    torch.testing.assert_close(plain(x, x, x, attn_mask=repeated)[0], plain(x, x, x, bias=bias)[0])
    torch.testing.assert_close(plain(x, x, x, attn_mask=repeated, bias=bias)[0], plain(x, x, x, bias=2 * bias)[0])
    hide = torch.ones(9, 9, dtype=torch.bool).triu(1)
    torch.testing.assert_close(plain(x, x, x, attn_mask=hide)[0], plain(x, x, x, mask=masks.causal())[0])


def refusals(x):
    mha, packing = attention(), fastattn.Packing.from_lengths([9, 9], 9)
    rows, make = packing.pack(x), fastattn.nn.MultiHeadAttention
    alibi = fastattn.biases.alibi(torch.ones(4))
    return [
        (NotImplementedError, "need_weights", lambda: mha(rows, rows, rows, packing=packing)),
        (ValueError, "key_packing", lambda: mha(x, x, x, key_packing=packing)),
        (NotImplementedError, "alibi", lambda: attention(alibi=True)(x, x, x, bias=torch.zeros(9, 9))),
        (NotImplementedError, "floats", lambda: mha(x, x, x, attn_mask=torch.ones(9, 9), bias=alibi)),
        (NotImplementedError, "add_zero_attn", lambda: attention(add_zero_attn=True)(x, x, x, bias=alibi)),
        (
            NotImplementedError,
            "packing",
            lambda: attention(add_zero_attn=True)(rows, rows, rows, need_weights=False, packing=packing),
        ),
        (ValueError, "num_kv_heads", lambda: make(16, 4, num_kv_heads=3)),
        (NotImplementedError, "num_kv_heads", lambda: make(16, 4, num_kv_heads=2, add_bias_kv=True)),
        (NotImplementedError, "alibi", lambda: make(16, 4, alibi=True, add_zero_attn=True)),
        (NotImplementedError, "rotary", lambda: attention(rotary=fastattn.nn.Rotary())(x, x[:, :5], x[:, :5])),
        (TypeError, "rotary", lambda: make(16, 4, rotary=10000.0)),
        (ValueError, "dropout", lambda: make(16, 4, dropout=1.5)),
        (ValueError, "embed_dim", lambda: make(16, 3)),
        (TypeError, "nested", lambda: mha(*[torch.nested.as_nested_tensor([x[0], x[1, :4]])] * 3)),
        (TypeError, "key must be a tensor", lambda: mha(x, None, x)),
    ]


@pytest.mark.parametrize("n", range(len(refusals(torch.zeros(2, 9, 16)))))
def test_refused_in_a_sentence(n):
    error, words, call = refusals(torch.randn(2, 9, 16))[n]
    with pytest.raises(error, match=words):
        call()


def test_autocast_compile_and_export():
    mha, x = attention(), torch.randn(2, 9, 16)
    hide = torch.arange(9) >= torch.tensor([[9], [4]])
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = mha(x, x, x, key_padding_mask=hide)
    assert out.dtype == weights.dtype == torch.bfloat16
    plain = mha(x, x, x, key_padding_mask=hide)[0]
    assert (out - plain).norm() < 0.02 * plain.norm()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = mha

        def forward(self, x, hide):
            return self.mha(x, x, x, key_padding_mask=hide, need_weights=False)[0]

    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, hide), plain)
    exported = torch.export.export(Model(), (x, hide)).module()
    torch.testing.assert_close(exported(x, hide), plain)
