"""Bias and dropout of the cpu backend, below the public function: against the specification in fp64, by the accuracy rule."""

import pytest
import torch
from threads import number_of_threads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn import masks, reference
from fastattn.dropout import draw_seed, kept_bits
from fastattn.kernels.cpu import attention as cpu
from fastattn.kernels.cpu import attention_extras
from fastattn.kernels.eager import attention as eager
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask
from fastattn.testing import HOT, MASKS, Yardstick, assert_accurate, attention_inputs

NONE = float("-inf")


@pytest.fixture(autouse=True)
def one_thread():
    with number_of_threads(1):
        yield


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hiding(x):
    """With -inf in some places, among them all of the first query, and in others what fp32 holds and powers of e do not."""
    x = x.masked_fill(normal(*x.shape, seed=2) > 1.5, NONE).masked_fill(normal(*x.shape, seed=3) > 1.5, torch.finfo(x.dtype).min)
    x[..., 0, :] = NONE
    return x


def buckets(reach=20, number=8):
    return (torch.arange(-reach, reach + 1) // 3 % number).int()


BIASES = {
    "none": lambda B, H, M, N, dtype: Extras(),
    "full": lambda B, H, M, N, dtype: Extras(bias=normal(B, H, M, N).to(dtype)),
    "fp32": lambda B, H, M, N, dtype: Extras(bias=normal(1, H, M, N)),
    "heads": lambda B, H, M, N, dtype: Extras(bias=normal(B, 1, M, N).to(dtype)),
    "pairs": lambda B, H, M, N, dtype: Extras(bias=normal(1, 1, M, N).to(dtype)),
    "queries": lambda B, H, M, N, dtype: Extras(bias=normal(B, H, 1, N)),
    "keys": lambda B, H, M, N, dtype: Extras(bias=normal(1, H, M, 1)),
    "one": lambda B, H, M, N, dtype: Extras(bias=normal(1, 1, 1, 1)),
    "-inf": lambda B, H, M, N, dtype: Extras(bias=hiding(normal(B, 1, M, N))),
    "relative": lambda B, H, M, N, dtype: Extras(table=normal(8, H).to(dtype), buckets=buckets()),
    "relative, right": lambda B, H, M, N, dtype: Extras(table=normal(8, H), buckets=buckets(), bottom_right=True),
    "alibi": lambda B, H, M, N, dtype: Extras(slopes=normal(1, H).abs(), bottom_right=True),
    "alibi of each": lambda B, H, M, N, dtype: Extras(slopes=normal(B, H)[:, :].abs() / 8),
}  # fmt: skip


def extras_for(bias, dropout, B, H, M, N, dtype, seed=5):
    extras = BIASES[bias](B, H, M, N, dtype)
    if dropout is None:
        return extras
    bits = kept_bits(draw_seed(seed, torch.device("cpu")), B, H, M, N, dropout)
    return extras._replace(kept=bits, dropout=dropout)


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def wide(extras):
    return Extras(*map(double, extras))


def computed(backend, x, mask, extras):
    """out, lse and every gradient; x: dout, dlse, q, k, v."""
    dout, dlse, q, k, v = x
    out, lse = backend.forward(q, k, v, mask, 0.3, True, extras)
    graded = extras.bias is not None or extras.table is not None
    grads = backend.backward(dout, dlse, q, k, v, out, lse, mask, 0.3, extras, graded)
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *grads), strict=False))


def magnitude(x, mask, extras):
    """The A of the rule: the formulas with absolute values inside each sum, in fp64. Padded."""
    dout, dlse, q, k, v = map(double, x)
    extras = wide(extras)
    s, visible = reference.scores(q, k, mask, 0.3, extras)
    p = torch.nan_to_num(torch.softmax(s, -1), 0.0)
    rows, columns = visible.any(-1)[..., None], visible.any(-2)[..., None]
    q, do = (torch.where(rows, t, 0).abs() for t in (q, dout))
    heads = k.shape[1]
    k, v = (torch.where(columns, reference.query_heads(t, q), 0).abs() for t in (k, v))
    keep = 1.0
    if extras.kept is not None:
        keep = reference.kept_pairs(extras.kept, k.shape[2]) * (0 if extras.dropout == 1 else 1 / (1 - extras.dropout))
    out = (keep * p) @ v
    delta = (do * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta + dlse.abs()[..., None]
    ds = p * (keep * (do @ v.mT) + delta)
    dk, dv = ((y.mT @ z).unflatten(1, (heads, -1)).sum(2) for y, z in ((ds * 0.3, q), (keep * p, do)))
    return {"out": out, "dq": 0.3 * ds @ k, "dk": dk, "dv": dv, "dbias": reference.bias_gradient(ds, extras, None)}


def inputs(B, H, M, N, D, dtype, *, Hkv=None, Dv=None, mask="none", dlse=True):
    x = attention_inputs(B, H, M, N, D, dtype, Hkv=Hkv, Dv=Dv, mask=mask, dlse=dlse, seed=B * M + N)
    return (x.dout, x.dlse, x.q, x.k, x.v), x.lowered()


def check(x, mask, extras, c=32, threads=1):
    with number_of_threads(threads):
        found = computed(cpu, x, mask, extras)
    model = computed(eager, x, mask, extras)
    for name, tensor in found.items():
        like = {"out": x[2], "lse": None, "dbias": extras.table if extras.bias is None else extras.bias}.get(name, x[2])
        assert like is None or tensor.dtype == like.dtype, name
    if x[2].dtype == torch.float64:  # two ways to one result: only the order of sums differs
        for name, tensor in found.items():
            rtol, atol = (1e-9, 1e-10) if tensor.dtype == torch.float64 else (1e-5, 1e-5)
            torch.testing.assert_close(tensor, model[name], rtol=rtol, atol=atol)
        return
    exact = computed(eager, tuple(map(double, x)), mask, wide(extras))
    assert_accurate(found, Yardstick(exact, model, magnitude(x, mask, extras)), c=c)


def cases(count=90, seed=0):
    """A sample of the product in which each pair of choices is met: every mask with every bias, and the rest in turn."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 2, 37, 37), (3, 2, 70, 45), (2, 4, 33, 129), (1, 2, 130, 66), (2, 2, 1, 65), (2, 4, 65, 1)]
    dtypes = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]
    drops = [None, 0.1, 0.5, 0.9]
    names = [(mask, bias) for mask in MASKS for bias in BIASES]
    for n, (mask, bias) in enumerate(names):
        B, H, M, N = shapes[int(torch.randint(len(shapes), (), generator=g))]
        dtype = dtypes[int(torch.randint(len(dtypes), (), generator=g))]
        drop = drops[int(torch.randint(len(drops), (), generator=g))]
        if bias == "none" and drop is None:
            drop = 0.1
        group, Dv, dlse = (int(torch.randint(2, (), generator=g)) for _ in range(3))
        yield pytest.param(
            mask, bias, drop, (B, H, M, N), dtype, H // 2 if group else H, 24 if Dv else 16, bool(dlse), id=f"{mask}-{bias}-{n}"
        )


@pytest.mark.parametrize(("mask", "bias", "drop", "shape", "dtype", "Hkv", "Dv", "dlse"), list(cases()))
def test_every_mask_with_every_bias(mask, bias, drop, shape, dtype, Hkv, Dv, dlse):
    B, H, M, N = shape
    x, lowered = inputs(B, H, M, N, 16, dtype, Hkv=Hkv, Dv=Dv, mask=mask, dlse=dlse)
    check(x, lowered, extras_for(bias, drop, B, H, M, N, dtype))


def packed(x, extras, lengths, key_lengths):
    """The first queries and keys of each sequence laid end to end, with the kept bits of the former; their mask's bounds; the
    unpacked form of results, NaN where there is nothing."""
    dout, dlse, q, k, v = x
    i, j = (torch.arange(t.shape[2]) < n[:, None] for t, n in ((q, lengths), (k, key_lengths)))

    def pack(t, where):
        return t.transpose(1, 2)[where].transpose(0, 1)[None]

    if extras.kept is not None:
        extras = extras._replace(kept=pack(extras.kept, i)[0].contiguous())
    starts = [torch.cat([n.new_zeros(1), n.cumsum(0)]).int() for n in (lengths, key_lengths)]
    bounds = {"query_starts": starts[0], "key_starts": starts[1], "max_queries": q.shape[2], "max_keys": k.shape[2]}
    dlse = None if dlse is None else pack(dlse[..., None], i)[..., 0]
    return (pack(dout, i), dlse, pack(q, i), pack(k, j), pack(v, j)), extras, bounds, (i, j)


def precision(dtype):
    return -torch.finfo(dtype).eps


PACKED = ["none", "causal", "window", "prefix_lm", "holes", "documents", "dense", "padding_queries"]


@pytest.mark.parametrize(("n", "mask"), list(enumerate(PACKED)))
@pytest.mark.parametrize("bias", ["none", "full", "pairs", "queries", "-inf", "relative, right", "alibi of each"])
def test_packed_sequences(bias, n, mask):
    """Against the specification's padded form of them; ten sequences, some of them empty, some of one length side by side."""
    dtype = (torch.float32, torch.bfloat16, torch.float64)[(n + len(bias)) % 3]
    lengths, key_lengths = torch.tensor([9, 33, 33, 0, 33, 1, 0, 40]), torch.tensor([40, 20, 20, 7, 20, 37, 0, 1])
    x, _ = inputs(8, 4, 40, 40, 16, dtype, Hkv=2)
    extras = extras_for(bias, 0.2, 8, 4, 40, 40, dtype)
    x, extras, bounds, _ = packed(x, extras, lengths, key_lengths)
    own = MASKS[mask](8, 4, 40, 40, torch.Generator().manual_seed(0), "cpu")
    lowered = LoweredMask() if own is None else own.lower(40, 40, torch.device("cpu"))
    lowered = lowered._replace(**bounds)
    found, expected = (computed(backend, x, lowered, extras) for backend in (cpu, eager))
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
        tolerance = {torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float64: 1e-10}[min(dtype, tensor.dtype, key=precision)]
        torch.testing.assert_close(
            tensor, expected[name], rtol=tolerance, atol=tolerance * 4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mask", ["padding_queries", "padding"])
def test_padded_and_packed_agree_bit_for_bit_where_calls_are_the_same(mask):
    lengths = torch.tensor([9, 33, 40, 1])
    x, _ = inputs(4, 2, 40, 40, 16, torch.float32)
    extras = extras_for("pairs", 0.2, 4, 2, 40, 40, torch.float32)
    padded = computed(cpu, x, masks.padding(lengths, lengths).lower(40, 40, torch.device("cpu")), extras)
    y, packed_extras, bounds, (i, j) = packed(x, extras, lengths, lengths)
    found = computed(cpu, y, LoweredMask(**bounds), packed_extras)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(padded[name].transpose(1, 2)[i].transpose(0, 1)[None], found[name]), name
        assert not padded[name].transpose(1, 2)[~i].any(), name
    assert torch.equal(padded["dbias"], found["dbias"])


@pytest.mark.parametrize("bias", ["none", "full", "heads", "fp32", "one", "relative"])
@pytest.mark.parametrize("mask", ["padding_queries", "documents", "dense"])
@pytest.mark.parametrize("pairs", [300, 10**9])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_of_any_size(monkeypatch, threads, pairs, mask, bias):
    monkeypatch.setattr(attention_extras, "PAIRS", pairs)
    monkeypatch.setattr(attention_extras, "ROWS", 16)
    monkeypatch.setattr(attention_extras, "SHARED", 0)
    x, lowered = inputs(3, 4, 40, 41, 8, torch.float32, Hkv=2, mask=mask)
    extras = extras_for(bias, 0.3, 3, 4, 40, 41, torch.float32)
    check(x, lowered, extras, threads=threads)
    with number_of_threads(threads):
        once, again = (computed(cpu, x, lowered, extras) for _ in range(2))
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("mask", ["none", "causal", "window", "documents"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_there_are_pieces_for_all_threads(mask, threads):
    """Also where a mask cuts blocks short; and no block is larger than it may be."""
    (_, _, q, k, _), lowered = inputs(2, 12, 512, 512, 8, torch.float32, mask=mask)
    with number_of_threads(threads):
        pieces = attention_extras._pieces(lowered, NO_EXTRAS, q, k)
    assert len(pieces) >= 2 * threads
    for piece in pieces:
        for rows, keys, _ in piece.blocks():
            heads = piece.query_heads.stop - piece.query_heads.start
            assert piece.count * heads * (rows.stop - rows.start) * (keys.stop - keys.start) <= attention_extras.PAIRS


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, table, mask, extras):
        extras = extras._replace(bias=bias, table=table)
        out, lse = cpu.forward(q, k, v, mask, 0.3, True, extras)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.request = mask, extras
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        mask, extras = ctx.request
        graded = extras.bias is not None or extras.table is not None
        grads = cpu.backward(dout, dlse, *ctx.saved_tensors, mask, 0.3, extras, graded)
        dbias = grads[3] if graded else None
        return (*grads[:3], *((None, dbias) if extras.bias is None else (dbias, None)), None, None)


@pytest.mark.parametrize("bias", [name for name in BIASES if name not in ("-inf", "none")])
def test_gradients_by_differences(bias):
    (_, _, q, k, v), mask = inputs(2, 2, 5, 6, 3, torch.float64, Hkv=1, Dv=4, mask="padding_queries")
    extras = extras_for(bias, 0.4, 2, 2, 5, 6, torch.float64)
    given = [None if t is None else t.double().requires_grad_() for t in (extras.bias, extras.table)]
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run(*tensors):
        out, lse = Attention.apply(*tensors, mask, extras)
        return out, torch.where(lse == NONE, 0, lse)

    assert torch.autograd.gradcheck(run, (*leaves, *given), fast_mode=True)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["causal", "padding_queries", "documents", "dense"])
def test_gradients_by_autograd(mask, bias):
    """Through the specification's forward, whose backward is a formula too."""
    (dout, dlse, q, k, v), lowered = inputs(2, 4, 37, 21, 8, torch.float64, Hkv=2, mask=mask)
    extras = extras_for(bias, 0.3, 2, 4, 37, 21, torch.float64)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    biased = extras.table if extras.bias is None else extras.bias
    if biased is not None:
        leaves.append(biased.double().requires_grad_())
        extras = extras._replace(**{"table" if extras.bias is None else "bias": leaves[3]})
    out, lse = reference.attention(*leaves[:3], lowered, 0.3, extras)
    lse = torch.where(lse == NONE, 0, lse)
    expected = torch.autograd.grad([out, lse], leaves, [dout, dlse], allow_unused=True)
    extras = Extras(*(t.detach() if isinstance(t, torch.Tensor) else t for t in extras))
    found = computed(cpu, (dout, dlse, q, k, v), lowered, extras)
    for name, tensor in zip(("dq", "dk", "dv", "dbias"), expected, strict=False):
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask", ["padding_queries", "left", "holes", "documents", "dense_rows"])
def test_what_nobody_sees_may_be_nan(mask, bad):
    (dout, _, q, k, v), lowered = inputs(3, 2, 70, 70, 8, torch.float32, mask=mask)
    extras = extras_for("full", 0.3, 3, 2, 70, 70, torch.float32)
    visible = lowered.visible(3, 2, 70, 70)
    dead, hidden = ~visible.any(3)[..., None], ~visible.any(2)[..., None]
    hidden = torch.zeros_like(hidden) if mask == "dense_rows" else hidden
    assert dead.any() or hidden.any()
    clean = computed(cpu, (dout, None, q, k, v), lowered, extras)
    fill = [t.masked_fill(where, bad) for t, where in ((dout, dead), (q, dead), (k, hidden), (v, hidden))]
    dirty = computed(cpu, (fill[0], None, *fill[1:]), lowered, extras)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


def test_a_key_before_others_that_no_document_has():
    """Keys of no document lie between those of one."""
    ids = torch.tensor([[0, 0, -1, -1, 0, 0, 1, 1]])
    x, lowered = inputs(1, 2, 8, 8, 8, torch.float32)
    lowered = masks.documents(ids).lower(8, 8, torch.device("cpu"))
    extras = extras_for("full", 0.3, 1, 2, 8, 8, torch.float32)
    clean = computed(cpu, x, lowered, extras)
    gone = (ids < 0)[:, None, :, None]
    dirty = computed(cpu, (x[0], x[1], *(t.masked_fill(gone, float("nan")) for t in x[2:])), lowered, extras)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


def test_words_that_no_sequence_has_are_not_read():
    """Those of keys and queries beyond the ends may hold anything."""
    x, lowered = inputs(2, 2, 70, 70, 8, torch.float32)
    lowered = masks.padding([33, 64], [40, 70]).lower(70, 70, torch.device("cpu"))
    extras = extras_for("none", 0.3, 2, 2, 70, 70, torch.float32)
    garbage = extras.kept.clone()
    garbage[:1, :, 40:], garbage[:, :, :, 2:] = 12345, 54321
    clean, other = (computed(cpu, x, lowered, extras._replace(kept=kept)) for kept in (extras.kept, garbage))
    for name, tensor in clean.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 2, 0, 4), (2, 2, 4, 0), (2, 2, 0, 0)])
@pytest.mark.parametrize("bias", ["pairs", "relative", "alibi"])
def test_nothing_to_compute(shape, bias):
    B, H, M, N = shape
    x, lowered = inputs(B, H, M, N, 8, torch.float32)
    found = computed(cpu, x, lowered, extras_for(bias, 0.3, B, H, M, N, torch.float32))
    assert (found["lse"] == NONE).all()
    for name, like in zip(("out", "dq", "dk", "dv"), (x[0], *x[2:]), strict=True):
        assert found[name].shape == like.shape and not found[name].any(), name
    assert "dbias" not in found or not found["dbias"].any()


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_ends_of_what_is_allowed(scale, dropout):
    """Rates of 0, with bits, and 1, which leave all and nothing of out but all of lse; scales that are not positive."""
    (dout, dlse, q, k, v), lowered = inputs(2, 2, 20, 30, 8, torch.float64, mask="causal")
    extras = extras_for("full", dropout, 2, 2, 20, 30, torch.float64)
    results = []
    for backend in (cpu, eager):
        out, lse = backend.forward(q, k, v, lowered, scale, True, extras)
        results.append((out, lse, *backend.backward(dout, dlse, q, k, v, out, lse, lowered, scale, extras, True)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert dropout == 0 or not results[0][0].any()


@pytest.mark.parametrize("value", [NONE, torch.finfo(torch.float32).min, -1e9])
def test_a_row_that_the_bias_hides_or_levels(value):
    """-inf and what sums to about as much leave a dead row; -1e9 in a whole row leaves equal weights."""
    x, lowered = inputs(2, 2, 9, 11, 8, torch.float32)
    bias = normal(2, 1, 9, 11)
    bias[0, 0, 3], bias[:, :, :, 5:] = value, value
    if value < -1e9:
        check(x, lowered, Extras(bias=bias))
    out, lse = cpu.forward(*x[2:], lowered, 0.3, True, Extras(bias=bias))
    assert bool((lse[0, :, 3] == NONE).all()) == (value < -1e9) and bool(out[0, :, 3].any()) == (value == -1e9)


def test_hot_scores():
    x, lowered = inputs(2, 2, 70, 70, 16, torch.float32, mask="causal")
    x = (*x[:2], x[2] * 10, x[3] * 4, x[4])
    check(x, lowered, extras_for("full", 0.1, 2, 2, 70, 70, torch.float32), c=HOT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_with_their_heads_inside(dtype):
    x, lowered = inputs(2, 4, 20, 30, 8, dtype, Hkv=2)
    found = computed(cpu, x, lowered, extras_for("full", 0.1, 2, 4, 20, 30, dtype))
    assert all(found[name].transpose(1, 2).is_contiguous() for name in ("out", "dq", "dk", "dv")) and found["lse"].is_contiguous()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes; a view counts as its memory."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("bias", ["none", "fp32", "queries", "relative", "alibi"])
@pytest.mark.parametrize("mask", ["none", "causal", "padding_queries"])
def test_no_tensor_has_every_pair(mask, bias):
    x, lowered = inputs(4, 4, 200, 200, 8, torch.float32, mask=mask)
    extras = extras_for(bias, 0.1, 4, 4, 200, 200, torch.float32)
    with Largest() as seen:
        computed(cpu, x, lowered, extras)
    own = 0 if extras.bias is None else extras.bias.numel()
    assert seen.elements <= max(own, attention_extras.PAIRS + 200 * 200)


@pytest.mark.parametrize("narrow", ["q and k", "v"])
def test_heads_of_no_width(narrow):
    (dout, dlse, q, k, v), lowered = inputs(2, 2, 9, 11, 8, torch.float32, mask="padding")
    if narrow == "v":
        dout, v = dout[..., :0], v[..., :0]
    else:
        q, k = q[..., :0], k[..., :0]
    extras = extras_for("pairs", 0.3, 2, 2, 9, 11, torch.float32)
    found, expected = (computed(backend, (dout, dlse, q, k, v), lowered, extras) for backend in (cpu, eager))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "contiguous": lambda bias: bias,
    "heads inside": lambda bias: bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "a step": lambda bias: torch.stack([bias, bias], -1)[..., 0],
    "of all": lambda bias: bias[:1, :1].expand(bias.shape),
    "one key": lambda bias: bias[..., :1],
    "one query": lambda bias: bias[..., :1, :],
}


@pytest.mark.parametrize("mask", ["none", "padding", "holes"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finite_bias_goes_to_pytorchs_kernel(dtype, layout, mask, monkeypatch):
    """Beside padding too, whose keys may hold NaN; a sequence that is all padding has nothing."""
    if (layout, mask == "none") != ("one key", False):  # which is left small
        monkeypatch.setattr(attention_extras, "forward", None)
    q, k, v = (normal(3, 37, 2, 16, seed=seed).to(dtype).transpose(1, 2) for seed in (1, 2, 3))
    bias, lowered = LAYOUTS[layout](normal(3, 2, 37, 37, seed=4).to(dtype)), LoweredMask()
    if mask != "none":
        lengths, keep = torch.tensor([37, 5, 0]), normal(3, 37, seed=5) > 0
        keep[2] = False
        made = masks.padding(lengths) if mask == "padding" else masks.key_padding(keep)
        lowered = made.lower(37, 37, None)
    extras = Extras(bias=bias)
    right_out, right_lse = reference.attention(q.double(), k.double(), v.double(), lowered, 0.25, Extras(bias=bias.double()))
    if mask != "none":
        hidden = ~lowered.visible(3, 1, 1, 37).mT
        k, v = (x.masked_fill(hidden, float("nan")) for x in (k, v))
    out, lse = cpu.forward(q, k, v, lowered, 0.25, False, extras)
    torch.testing.assert_close(out.double(), right_out.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), right_lse.double(), rtol=1e-5, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()


@pytest.mark.parametrize("bad", [NONE, -NONE, float("nan"), torch.finfo(torch.float32).min])
def test_a_bias_that_hides_does_not(bad, monkeypatch):
    """Nor does one whose log-sum-exp somebody reads."""
    monkeypatch.setattr(cpu, "_flash", None)
    q, k, v = (normal(2, 2, 9, 16, seed=seed) for seed in (1, 2, 3))
    bias = normal(1, 2, 9, 9, seed=4)
    bias[0, 1, 3, 4] = bad
    cpu.forward(q, k, v, LoweredMask(), 0.25, True, Extras(bias=normal(1, 2, 9, 9)))
    out, lse = cpu.forward(q, k, v, LoweredMask(), 0.25, False, Extras(bias=bias))
    expected = eager.forward(q, k, v, LoweredMask(), 0.25, True, Extras(bias=bias))
    torch.testing.assert_close((out, lse), expected, equal_nan=True)


def test_what_trains_with_a_bias_has_its_log_sum_exp_by_products(monkeypatch):
    """As its backward makes scores; in inference the kernel adds the bias."""
    called = []
    kernel = cpu._forward_with_bias
    monkeypatch.setattr(cpu, "_forward_with_bias", lambda *given: called.append(1) or kernel(*given))
    q, k, v = (normal(2, 2, 9, 16, seed=seed) for seed in (1, 2, 3))
    bias = normal(1, 2, 9, 9, seed=4)
    for _ in range(2):
        fastattn.attention(q, k, v, bias=bias, backend="cpu")
    assert len(called) == 2
    for leaves, options in (((q.clone().requires_grad_(), k, v), {}), ((q, k, v), {"return_lse": True})):
        for _ in range(2):
            fastattn.attention(*leaves, bias=bias, backend="cpu", **options)
    assert len(called) == 2
