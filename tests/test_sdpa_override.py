"""`sdpa_override`: the same numbers as torch's function, honest counts, and torch's own function back afterwards."""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from replayed import recorded
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.integrations.torch_sdpa import sdpa_override

TORCH = F.scaled_dot_product_attention


def heads(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as a ViT makes them: slices of one packed projection, (B, L, 3, H, D) in memory, for shape (B, H, L, D)."""
    B, H, L, D = shape
    qkv = torch.randn(B, L, 3, H, D, generator=torch.Generator().manual_seed(seed))
    return tuple(qkv.permute(2, 0, 3, 1, 4))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=["2-D", "3-D", "4-D", "5-D"])
@pytest.mark.parametrize("kind", ["none", "causal", "pairs", "keys", "broadcast"])
def test_equals_torch(lead, kind):
    torch.manual_seed(len(lead))
    M, N, D = 5, 7, 16
    q, k, v = (torch.randn(*lead, n, D) for n in (M, N, N))
    keep = {"pairs": torch.rand(*lead, M, N) > 0.4, "keys": torch.rand(1, N) > 0.4, "broadcast": torch.rand(M, 1) > 0.4}.get(kind)
    kwargs = {"is_causal": kind == "causal", "scale": 0.3, "attn_mask": keep}
    expected = TORCH(q, k, v, **kwargs)
    with sdpa_override(strict=True) as record:
        out = F.scaled_dot_product_attention(q, k, v, **kwargs)
    close(out, expected)
    assert record.calls == 1 and record.fallbacks == {}


def test_packed_projection_and_gradients():
    q, k, v = heads(2, 4, 9, 16)
    assert q.stride() == (9 * 3 * 64, 16, 3 * 64, 1)
    weight = torch.randn(2, 4, 9, 16)
    grads = []
    for strict in (None, True):
        leaf = torch.stack([q, k, v]).requires_grad_()
        if strict is None:
            (F.scaled_dot_product_attention(*leaf) * weight).sum().backward()
        else:
            with sdpa_override(strict=True):
                (F.scaled_dot_product_attention(*leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    close(*grads)


def test_grouped_heads():
    q, k, v = heads(2, 4, 5, 8)
    k, v = k[:, :2], v[:, :2]
    with sdpa_override(strict=True) as record:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close(out, TORCH(q, k, v, enable_gqa=True))
    assert record.calls == 1 and record.fallbacks == {}


FLOATS = {
    "pairs": torch.randn(5, 5, generator=torch.Generator().manual_seed(1)),
    "of a head": torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(1)),
    "of a sequence": torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(1)),
    "finite": torch.tensor([[0.0, 0.0, 0.0, 0.0, -1e9]]),
}


@pytest.mark.parametrize("case", FLOATS)
def test_float_masks_are_added_and_learned(case):
    q, k, v = heads(2, 4, 5, 8)
    outcomes = []
    for inside in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, FLOATS[case])]
        with sdpa_override(strict=True) if inside else contextlib.nullcontext() as record:
            out = F.scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3])
        out.square().sum().backward()
        outcomes.append([out, *(x.grad for x in leaves)])
    for ours, torchs in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(ours, torchs, atol=5e-6, rtol=5e-6)
    assert (record.calls, record.fallbacks) == (1, {})


@pytest.mark.parametrize("masked", [False, True])
def test_dropout(masked):
    q, k, v = heads(2, 4, 5, 8)
    mask = torch.ones(5, 5).tril().bool() if masked else None
    with sdpa_override(strict=True) as record, recorded() as draws:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5)
    [(seed, _)] = draws
    scores = q @ k.mT * 8**-0.5
    weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
    close(out, torch.where(fastattn.dropout_mask(seed, 2, 4, 5, 5, 0.5), weights * 2, 0) @ v)
    assert (record.calls, record.fallbacks) == (1, {}) and out.is_contiguous()


def test_multi_head_attention_with_dropout():
    """Of one seed, the layer as it is, which forms the weights and drops what is replayed, and inside the block."""
    layer = nn.MultiheadAttention(32, 4, dropout=0.3, batch_first=True).train()
    x, hidden = torch.randn(2, 6, 32), torch.arange(6) >= torch.tensor([[6], [4]])
    with sdpa_override(strict=True) as record, recorded() as draws:
        found = layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    seeds = iter(draws)

    def dropout(weights, p, training=True):  # (2 * 4, 6, 6)
        keep = fastattn.dropout_mask(next(seeds)[0], 2, 4, 6, 6, p)
        return torch.where(keep.flatten(0, 1), weights / (1 - p), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        expected = layer(x, x, x, key_padding_mask=hidden, need_weights=True)[0]
    close(found, expected)
    assert record.calls == 1 and next(seeds, None) is None


REFUSED = {
    "one batch for all": ({}, "k has batch size 1"),
    "with a float mask": ({"attn_mask": torch.full((5, 5), 0.5)}, "k has batch size 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls_fall_back_or_raise(case, caplog):
    kwargs, word = REFUSED[case]
    q, k, v = heads(2, 4, 5, 8)
    k, v = k[:1], v[:1]  # torch broadcasts them
    expected = TORCH(q, k, v, **kwargs)
    with caplog.at_level(logging.WARNING, "fastattn"), sdpa_override() as record:
        for _ in range(2):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, **kwargs), expected)
    assert record.calls == 0
    [(reason, count)] = record.fallbacks.items()
    assert word in reason and count == 2
    assert [line for line in caplog.messages if reason in line] == caplog.messages and len(caplog.messages) == 1
    with sdpa_override(strict=True) as record, pytest.raises(ValueError, match=word):
        F.scaled_dot_product_attention(q, k, v, **kwargs)
    assert record.calls == 0 and record.fallbacks == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_only_torch_serves_keeps_working():
    q, k, v = heads(2, 3, 5, 8)
    jagged = torch.nested.nested_tensor([torch.randn(n, 3, 8) for n in (4, 5)], layout=torch.jagged).transpose(1, 2)
    strided = torch.nested.nested_tensor([torch.randn(3, n, 8) for n in (4, 5)], layout=torch.strided)
    with sdpa_override() as record:
        close(F.scaled_dot_product_attention(q, k[:1], v[:1]), TORCH(q, k[:1], v[:1]))  # torch broadcasts the batch
        assert F.scaled_dot_product_attention(q.to("meta"), k.to("meta"), v.to("meta")).shape == q.shape
        close(F.scaled_dot_product_attention(jagged, jagged, jagged).values(), TORCH(jagged, jagged, jagged).values())
        for a, b in zip(F.scaled_dot_product_attention(*[strided] * 3).unbind(), TORCH(*[strided] * 3).unbind(), strict=True):
            close(a, b)
        grad = torch.func.grad(lambda x: F.scaled_dot_product_attention(x, k, v).square().sum())(q)
    close(grad, torch.func.grad(lambda x: TORCH(x, k, v).square().sum())(q))
    assert record.calls == 0 and sum(record.fallbacks.values()) == 5 and len(record.fallbacks) == 4  # nested ones share a reason


def test_wrong_calls_stay_errors():
    q, k, v = heads(2, 3, 5, 8)
    wrong = [
        lambda: F.scaled_dot_product_attention(q, k[..., :4], v),
        lambda: F.scaled_dot_product_attention(q, k, v.double()),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(4, 5, dtype=torch.bool)),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(2, 4, 1, 5)),  # of four heads
        lambda: F.scaled_dot_product_attention(q, k, v, window=3),
        lambda: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, 0.3),  # scale has to be named
    ]
    for call in wrong:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            call()
        with sdpa_override() as record, pytest.raises((RuntimeError, ValueError, TypeError)):
            call()
        assert record.calls == 0


def test_mask_with_is_causal_is_left_to_torch():
    """PyTorch 2.13 takes both together on CPUs, where others raise: inside the block it is as outside."""
    q, k, v = heads(1, 2, 5, 8)
    outcomes = []
    for inside in (False, True):
        with sdpa_override() if inside else contextlib.nullcontext():
            try:
                outcomes.append(F.scaled_dot_product_attention(q, k, v, torch.ones(5, 5).tril(1).bool(), is_causal=True))
            except RuntimeError as error:
                outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    assert torch.equal(*outcomes) if isinstance(outcomes[0], torch.Tensor) else outcomes[0] == outcomes[1]


def test_restored_after_an_exception():
    def fail() -> None:
        assert F.scaled_dot_product_attention is not TORCH
        raise KeyError

    with pytest.raises(KeyError), sdpa_override():
        fail()
    assert F.scaled_dot_product_attention is TORCH


def test_nested_overrides_all_count_and_the_innermost_is_strict():
    q, k, v = heads(2, 2, 4, 8)
    with sdpa_override() as outer:
        F.scaled_dot_product_attention(q, k, v)
        with sdpa_override(strict=True) as inner:
            F.scaled_dot_product_attention(q, k, v)
            with pytest.raises(ValueError, match="batch size"):
                F.scaled_dot_product_attention(q, k[:1], v[:1])
        F.scaled_dot_product_attention(q, k[:1], v[:1])
        kept = F.scaled_dot_product_attention
    assert (outer.calls, inner.calls) == (2, 1)
    assert list(outer.fallbacks.values()) == [1] and inner.fallbacks == {}
    assert F.scaled_dot_product_attention is TORCH
    close(kept(q, k, v), TORCH(q, k, v))  # a name kept beyond the block is torch's function again
    assert outer.calls == 2


def test_overlapping_overrides_that_end_out_of_order():
    first, second = sdpa_override(), sdpa_override()
    first.__enter__()
    record = second.__enter__()
    first.__exit__(None, None, None)
    F.scaled_dot_product_attention(*heads(1, 1, 3, 8))
    second.__exit__(None, None, None)
    assert record.calls == 1 and F.scaled_dot_product_attention is TORCH


def test_other_threads_see_it():
    q, k, v = heads(1, 2, 4, 8)
    with sdpa_override() as record:
        threads = [threading.Thread(target=F.scaled_dot_product_attention, args=(q, k, v)) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert record.calls == 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hides", ["nothing", "keys", "pairs", "keys and pairs", "all keys of a sequence"])
def test_multi_head_attention_in_training(hides, autocast):
    """It makes floats of 0 and -inf of the bool masks that it is given, repeated for each head."""
    layer = nn.MultiheadAttention(32, 4, batch_first=True).train()
    x, weight = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    masks = {"need_weights": False}
    if "keys" in hides:
        masks["key_padding_mask"] = torch.arange(6) >= torch.tensor([[6], [0 if "all" in hides else 4]])
    if "pairs" in hides:
        masks["attn_mask"] = torch.ones(6, 6).triu(2).bool()

    def gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x, x, x, **masks)[0]
        return out, *torch.autograd.grad((out * weight).sum(), list(layer.parameters()))

    expected = gradients()
    with sdpa_override(strict=True) as record:
        found = gradients()
    for ours, torchs in zip(found, expected, strict=True):
        bound = 2e-2 * float(torchs.abs().max()) if autocast else 1e-5
        torch.testing.assert_close(ours, torchs, atol=bound, rtol=0)
    assert (record.calls, record.fallbacks) == (1, {})


def test_a_padding_mask_repeated_for_each_head_is_padding():
    """So that it costs what padding costs: the kernels see no bits."""
    seen = []
    q, k, v = heads(2, 4, 6, 8)
    hidden = torch.zeros(2, 4, 1, 6).masked_fill(torch.arange(6) >= torch.tensor([6, 4]).view(2, 1, 1, 1), float("-inf"))
    for mask in (hidden, hidden.roll(1, 1) + hidden.flip(0)):
        lowered = fastattn.ops.attention.as_mask(fastattn.ops.sdpa.mask_or_bias(mask, q)[0])
        seen.append((lowered.keys is not None, len(lowered.terms)))
        close(fastattn.scaled_dot_product_attention(q, k, v, mask), TORCH(q, k, v, mask))
    assert seen == [(True, 0), (True, 0)]
    hidden[0, 1, 0, 2] = float("-inf")  # of one head alone
    close(fastattn.scaled_dot_product_attention(q, k, v, hidden), TORCH(q, k, v, hidden))
    assert fastattn.ops.attention.as_mask(fastattn.ops.sdpa.mask_or_bias(hidden, q)[0]).terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float_masks_of_0_and_minus_infinity(dtype):
    q, k, v = (x.to(dtype) for x in heads(2, 3, 7, 8))
    for shape in ((1, 7), (7, 1), (2, 1, 1, 7), (3, 7, 7), (2, 3, 7, 7)):
        mask = torch.zeros(shape, dtype=dtype).masked_fill(torch.rand(shape) < 0.4, float("-inf"))
        out, expected = fastattn.scaled_dot_product_attention(q, k, v, mask), TORCH(q, k, v, mask)
        torch.testing.assert_close(out, expected, atol=2e-2 if dtype == torch.bfloat16 else 2e-6, rtol=0)


def test_float_masks_whose_values_cannot_be_read():
    """Nothing is guessed of them: in a graph or a trace they are added to the scores, whatever they hold at the time."""
    q, k, v = heads(2, 3, 5, 8)
    mask, other = torch.zeros(5, 5), torch.randn(5, 5)
    ours = fastattn.scaled_dot_product_attention
    for made in (
        torch.jit.trace(lambda m: ours(q, k, v, m), mask),
        make_fx(lambda m: ours(q, k, v, m))(mask),
        torch.compile(lambda m: ours(q, k, v, m), backend="eager", fullgraph=True),
    ):
        for values in (mask, other, mask.masked_fill(other > 1, float("-inf"))):
            close(made(values), TORCH(q, k, v, values))


def test_masks_that_do_not_fit_are_named():
    q, k, v = heads(2, 3, 5, 8)
    ours, mask = fastattn.scaled_dot_product_attention, torch.randn(5, 5)
    for error, words, wrong in (
        (TypeError, "bias must be torch.float32.* got torch.float64", mask.double()),
        (TypeError, "attn_mask must be bool or of floating point numbers, got torch.int64", mask.long()),
        (ValueError, "bias is on meta", mask.to("meta")),
    ):
        with pytest.raises(error, match=words):
            ours(q, k, v, wrong)
    with pytest.raises(ValueError, match="dropout must be a probability"):
        ours(q, k, v, None, 1.5)


def test_a_record_without_calls_says_why_that_can_be():
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 4, 16)
    with sdpa_override() as record:
        layer(x, x, x)
        with torch.no_grad():
            layer.eval()(x, x, x, need_weights=False)
        assert "calls=0, fallbacks={}): no call of F.scaled_dot_product_attention came this way" in repr(record)
        assert "need_weights=True" in repr(record) and "set_fastpath_enabled(False)" in repr(record)
        F.scaled_dot_product_attention(*heads(1, 2, 4, 8))
    assert repr(record) == "OverrideRecord(calls=1, fallbacks={})"


def test_compiled_functions(monkeypatch):
    """Inside the block the graph holds fastattn's op, or torch's for a refused call; outside it is torch's again."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    graphs: list[str] = []

    def backend(module, inputs):
        graphs.append(module.code)
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def model(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * 2

    q, k, v = heads(2, 2, 5, 8)
    keep, bias = torch.rand(5, 5) > 0.3, torch.randn(5, 5)
    ours, torchs = "attention_forward", "scaled_dot_product_attention"
    with sdpa_override() as record:
        for mask, batch, op in ((keep, 2, ours), (bias, 2, ours), (keep, 1, torchs)):  # a batch of 1 torch broadcasts
            close(model(q, k[:batch], v[:batch], mask), TORCH(q, k[:batch], v[:batch], attn_mask=mask) * 2)
            assert op in graphs[-1]
        compiled = len(graphs)
        model(q, k, v, keep)
        assert len(graphs) == compiled  # no count is part of a guard
        assert (record.calls, record.fallbacks) == (0, {})  # as documented: graphs are not counted
    close(model(q, k, v, keep), TORCH(q, k, v, attn_mask=keep) * 2)
    assert "attention_forward" not in graphs[-1]


def test_compiled_training_with_aot_eager():
    q, k, v = heads(2, 2, 5, 8)
    model = torch.compile(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), fullgraph=True, backend="aot_eager")
    leaf, plain = (torch.stack([q, k, v]).requires_grad_() for _ in range(2))
    with sdpa_override(strict=True):
        model(*leaf).square().sum().backward()
    TORCH(*plain, is_causal=True).square().sum().backward()
    close(leaf.grad, plain.grad)
