"""Bias and dropout in attention, against the fp64 specification: every backend, layout, mask and kind of bias, with gradients."""

import itertools
import random

import pytest
import torch
from backends import CUDA, TRITON, device_of, dtype_of, head_dim_of

import fastattn
from fastattn import biases, masks
from fastattn.packing import Packing
from fastattn.testing import (
    BIASES,
    MASKS,
    assert_accurate,
    attention_inputs,
    attention_yardstick,
    run_attention,
    run_varlen_attention,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [(1, 1), (17, 17), (33, 33), (64, 64), (65, 65), (77, 77), (40, 66), (66, 40)]
BACKENDS = ["eager", "cpu", TRITON]


def check(backend, M, N, dtype, mask, bias, dropout, Hkv=2, dlse=False, D=16, seed=0):
    x = attention_inputs(
        2, 2, M, N, D, dtype, device_of(backend), mask=mask, bias=bias, dropout=dropout, Hkv=Hkv, dlse=dlse, seed=seed
    )
    assert_accurate(run_attention(x, backend), attention_yardstick(x), cpu_half_gradients=backend == "cpu")


def product(count, seed):
    """A seeded sample of the full product of what can be asked for."""
    rng, found = random.Random(seed), []
    for i in range(count):
        # every kind of bias in turn, and of mask; the rest by chance
        bias, mask = list(BIASES)[i % len(BIASES)], rng.choice(list(MASKS))
        lengths, dtype, dropout, Hkv = (rng.choice(choices) for choices in (LENGTHS, DTYPES, [0.0, 0.1, 0.5], [1, 2]))
        if lengths == (1, 1) and dropout:
            dtype = torch.float32  # of one key dq and dk are 0, exactly so in eager PyTorch, and else up to the output's rounding
        found.append((lengths, dtype, mask, bias, dropout, Hkv))
    return found


def interpreted(backend):
    return backend == "triton" and device_of(backend) == "cpu"


def named(case):
    (M, N), dtype, mask, bias, dropout, Hkv = case
    return f"{M}x{N}-{str(dtype)[6:]}-{mask}-{bias}-{dropout}-{Hkv}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bias_with_and_without_dropout(backend, bias):
    for i, (mask, dropout) in enumerate(itertools.product(("none", "causal_padding"), (0.0, 0.1))):
        if interpreted(backend) and (i % 3 == 0) == (list(BIASES).index(bias) % 2):  # with and without dropout, one mask each
            continue
        M, N = [(33, 33), (40, 66)][i % 2]
        check(backend, M, N, dtype_of(backend), mask, bias, dropout, dlse=i % 3 == 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_with_every_mask(backend, mask):
    check(backend, 66, 66, dtype_of(backend), mask, "none", 0.1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", product(52, 0), ids=named)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_random_combinations(backend, case):
    (M, N), dtype, mask, bias, dropout, Hkv = case
    check(backend, M, N, dtype, mask, bias, dropout, Hkv, seed=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", product(26, 1), ids=named)
@pytest.mark.parametrize("backend", [TRITON])
def test_random_combinations_by_triton(backend, case):
    test_random_combinations(backend, case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend, bias):
    dtype, lengths = dtype_of(backend), torch.tensor([41, 7, 66], device=device_of(backend))
    cases = [("none", 0.2), ("causal", 0.0), ("window", 0.1)]
    if interpreted(backend):  # one of them takes five seconds
        cases = [cases[list(BIASES).index(bias) % len(cases)]]
    for mask, dropout in cases:
        x = attention_inputs(3, 2, 66, 66, 16, dtype, device_of(backend), mask=mask, bias=bias, dropout=dropout, Hkv=1)
        padding = masks.padding(lengths, lengths)
        padded = attention_inputs(3, 2, 66, 66, 16, dtype, device_of(backend), mask=mask, bias=bias, dropout=dropout, Hkv=1)
        object.__setattr__(padded, "mask", padding if padded.mask is None else padding & padded.mask)
        assert_accurate(run_varlen_attention(x, lengths, backend), attention_yardstick(padded))


@pytest.mark.parametrize("bias", ["none", "full", "heads", "keys", "queries", "hiding", "relative", "alibi"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck(backend, bias):
    x = attention_inputs(2, 4, 5, 7, 4, torch.float64, mask="padding", bias=bias, dropout=0.3, Hkv=2, Dv=3)
    leaves = [t.contiguous().double().requires_grad_() for t in (x.q, x.k, x.v, x.learned) if t is not None]
    if bias in ("alibi", "none"):
        leaves = leaves[:3]

    def function(q, k, v, learned=None):
        bias = x.bias if learned is None else x.bias_of(learned)
        out, lse = fastattn.attention(q, k, v, x.mask, bias=bias, dropout=0.3, seed=5, return_lse=True, backend=backend)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert torch.autograd.gradcheck(function, tuple(leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_bit_equal(backend):
    for bias in ("heads", "keys", "relative"):
        x = attention_inputs(2, 2, 70, 70, 16, dtype_of(backend), device_of(backend), mask="causal", bias=bias, dropout=0.1)
        first, second = run_attention(x, backend), run_attention(x, backend)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_kept_are_those_of_dropout_mask(backend):
    """With v the identity the output is the weights themselves."""
    device, L = device_of(backend), 40
    q, k = (torch.randn(2, 3, L, 16, device=device) for _ in range(2))
    v = torch.eye(L, device=device).expand(2, 3, L, L)
    seed = torch.tensor([-5], device=device)
    out = fastattn.attention(q, k, v, dropout=0.4, seed=seed, backend=backend)
    assert torch.equal(out != 0, fastattn.dropout_mask(seed, 2, 3, L, L, 0.4))
    weights = fastattn.attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, torch.where(out != 0, weights / 0.6, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_dropped_and_none(backend):
    x = attention_inputs(1, 2, 20, 20, 16, torch.float32, device_of(backend))
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = fastattn.attention(q, k, v, dropout=1.0, return_lse=True, backend=backend)
    assert not out.any()
    assert torch.isfinite(lse).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    state = torch.get_rng_state()
    assert torch.equal(
        fastattn.attention(q, k, v, dropout=0.0, seed=3, backend=backend), fastattn.attention(q, k, v, backend=backend)
    )
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn without dropout"


def test_seed_none_is_drawn_from_the_default_generator():
    x = attention_inputs(1, 2, 20, 20, 16, torch.float32)

    def call():
        return fastattn.attention(x.q, x.k, x.v, dropout=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_the_same_draw(reentrant):
    from torch.utils.checkpoint import checkpoint

    x = attention_inputs(1, 2, 20, 20, 16, torch.float32)
    grads = []
    for recompute in (False, True):
        q = x.q.detach().clone().requires_grad_()
        torch.manual_seed(4)

        def call(q):
            return fastattn.attention(q, x.k, x.v, dropout=0.3)

        out = checkpoint(call, q, use_reentrant=reentrant) if recompute else call(q)
        out.backward(x.dout)
        grads.append((out.detach(), q.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_whole(compiler):
    def step(q, k, v, table, bias):
        first = fastattn.attention(q, k, v, masks.causal(), bias=biases.relative(table), dropout=0.2, seed=5)
        return fastattn.attention(first, k, v, bias=bias)

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    for L in (9, 20):
        x = attention_inputs(2, 2, L, L, 16, torch.float32, bias="heads")
        table = torch.randn(32, 2)
        results = []
        for function in (step, compiled):
            leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, table, x.bias)]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, x.dout)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_opcheck():
    for bias in ("heads", "relative", "alibi"):
        x = attention_inputs(2, 2, 9, 11, 16, torch.float32, bias=bias, dropout=0.2, mask="causal")
        lowered, extras = x.lowered(), x.extras()
        if extras.learned is not None:
            extras.learned.requires_grad_()
        q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
        op = torch.ops.fastattn.attention_forward.default
        torch.library.opcheck(op, (q, k, v, *lowered, *extras, x.scale, "eager", True))


def test_exported_module_trains():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(32, 2))

        def forward(self, q):
            return fastattn.attention(q, q, q, bias=biases.relative(self.table), dropout=0.1, seed=3)

    layer, q = Layer(), torch.randn(2, 2, 9, 8)
    exported = torch.export.export(layer, (q,)).module()
    for module in (layer, exported):
        module(q).square().sum().backward()
    assert torch.equal(layer.table.grad, dict(exported.named_parameters())["table"].grad)


@pytest.mark.parametrize("backend", [CUDA])
def test_cuda_refuses_in_a_sentence(backend):
    D = head_dim_of(backend)
    q = torch.zeros(1, 1, 4, D, dtype=torch.float16, device=device_of(backend))
    for options in ({"bias": torch.zeros_like(q[..., :4])}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError, match="a bias or dropout is not served: the CUDA kernels take masks alone"):
            fastattn.attention(q, q, q, backend=backend, **options)


Q = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("error", "sentence", "options"),
    [
        (ValueError, "dropout must be a probability from 0 to 1, got 1.5", {"dropout": 1.5}),
        (ValueError, "dropout must be a probability from 0 to 1, got -0.1", {"dropout": -0.1}),
        (TypeError, "seed must be None, an int or a one-element int64 tensor, got str", {"dropout": 0.1, "seed": "a"}),
        (TypeError, "seed must be None, an int", {"seed": 1.5}),
        (ValueError, "seed must be an int or a one-element int64 tensor on cpu", {"dropout": 0.1, "seed": torch.zeros(2).long()}),
        (ValueError, "seed must fit 64 bits", {"dropout": 0.1, "seed": 2**64}),
        (TypeError, "bias must be a tensor, one of fastattn.biases or None, got list", {"bias": [1.0]}),
        (TypeError, "a bool tensor is a mask", {"bias": torch.ones(4, 4, dtype=torch.bool)}),
        (TypeError, "bias must be torch.float32, as q, or fp32, got torch.float16", {"bias": torch.zeros(4, 4).half()}),
        (ValueError, "bias has shape \\(3, 5, 4\\), which does not broadcast", {"bias": torch.zeros(3, 5, 4)}),
        (ValueError, "does not broadcast", {"bias": torch.zeros(1, 1, 3, 4, 4)}),
        (ValueError, "table has 2 columns, but q has 3 heads", {"bias": biases.relative(torch.zeros(32, 2))}),
        (ValueError, "slopes of shape \\(1, 2\\) fit neither", {"bias": biases.alibi(torch.zeros(2))}),
    ],
)
def test_bad_input_raises_a_sentence(error, sentence, options):
    with pytest.raises(error, match=sentence):
        fastattn.attention(Q, Q, Q, **options)


def test_wrong_biases_raise_a_sentence():
    with pytest.raises(ValueError, match="table must have shape \\(32, heads\\)"):
        biases.relative(torch.zeros(16, 2))
    with pytest.raises(ValueError, match="num_buckets must be an even number"):
        biases.relative(torch.zeros(7, 2), num_buckets=7)
    with pytest.raises(ValueError, match="max_distance must be above 8"):
        biases.relative(torch.zeros(32, 2), max_distance=8)
    with pytest.raises(ValueError, match="align must be one of"):
        biases.alibi(torch.zeros(2), "left")
    with pytest.raises(ValueError, match="slopes require a gradient"):
        biases.alibi(torch.zeros(2, requires_grad=True))
    with pytest.raises(TypeError, match="table must be a tensor"):
        biases.relative([1.0])


def test_buckets_are_those_of_t5():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(300) - torch.arange(300)[:, None]
    for bidirectional, buckets, reach in itertools.product((True, False), (8, 32), (20, 64, 128)):
        expected = modeling.T5Attention._relative_position_bucket(distance, bidirectional, buckets, reach)
        table = torch.arange(float(buckets))[:, None]
        bias = biases.relative(table, bidirectional=bidirectional, num_buckets=buckets, max_distance=reach)
        assert torch.equal(bias.dense(300, 300)[0, 0].long(), expected)


def test_a_row_far_below_counts_as_hidden():
    """A mask of the least number, as transformers adds it: in units of log 2 the score overflows."""
    least = torch.finfo(torch.float32).min
    bias = torch.tensor([[least, least], [0.0, least]])
    out, lse = fastattn.attention(Q[:1, :1, :2], Q[:1, :1, :2], Q[:1, :1, :2] + 1, bias=bias, return_lse=True)
    assert torch.equal(out[0, 0, :, 0], torch.tensor([0.0, 1.0]))
    assert torch.equal(lse[0, 0] == -torch.inf, torch.tensor([True, False]))


def test_packed_bits_are_those_of_the_padded_batch():
    lengths = torch.tensor([5, 0, 33])
    packing = Packing.from_lengths(lengths, 33)
    x = attention_inputs(3, 2, 33, 33, 40, torch.float32)
    v = torch.eye(33).repeat(1, 1, 2)[..., :40].expand(3, 2, 33, 40).contiguous()
    padded = fastattn.attention(x.q, x.k, v, masks.padding(lengths, lengths), dropout=0.5, seed=9)
    q, k, rows = (packing.pack(t.transpose(1, 2)) for t in (x.q, x.k, v))
    packed = fastattn.varlen_attention(q, k, rows, packing, dropout=0.5, seed=9)
    torch.testing.assert_close(packing.unpack(packed).transpose(1, 2), padded)
    assert torch.equal(packing.unpack(packed).transpose(1, 2) == 0, padded == 0)


@pytest.mark.parametrize("bias", ["full", "pairs", "keys_heads", "queries", "hiding", "relative", "alibi_batch"])
def test_attention_weights_take_the_bias(bias):
    x = attention_inputs(2, 2, 9, 11, 16, torch.float32, bias=bias, mask="causal")
    out, lse = fastattn.attention(x.q, x.k, x.v, x.mask, bias=x.bias, return_lse=True)
    weights = fastattn.attention_weights(x.q, x.k, lse, x.mask, bias=x.bias)
    torch.testing.assert_close(weights @ x.v, out)
    some = fastattn.attention_weights(x.q, x.k, lse, x.mask, bias=x.bias, rows=[3, 8], heads=[1])
    torch.testing.assert_close(some, weights[:, 1:][:, :, [3, 8]])
