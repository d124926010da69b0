"""Masks against a pair-by-pair definition written out here, and what kernels receive of them against the masks."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from backends import TRITON, device_of

import fastattn
from fastattn import masks
from fastattn.lowering import EMPTY, FULL, PARTIAL, TILE, LoweredMask, pack_bits, tile_lists, tile_status
from fastattn.packing import INTEGERS, Packing
from fastattn.testing import MASKS

B, H, M, N = 3, 2, 4, 6
BEYOND = np.array([2**63 + 5], np.uint64)
LENGTHS, QUERIES = [0, 4, 6], [4, 0, 2]
KEEP = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
OTHER = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0]], dtype=torch.bool)
PAIRS = torch.arange(M * N).reshape(M, N) % 3 > 0
IDS = torch.tensor([[0, 0, 1, 1], [2, -1, 2, 5], [-1, -1, -1, -1]])
KEY_IDS = torch.tensor([[0, 1, 1, 0, -1, 7], [2, 2, -1, 5, 5, 5], [-1, 0, 1, 2, 3, 4]])
DELTA = N - M


def grid(near):
    """A prefix of 1 and an image of 2 x 3; near(row, column, key row, key column)."""

    def visible(b, h, i, j):
        x = i + DELTA
        if x < 1 or j < 1:
            return j <= x
        return j <= x and near(*divmod(x - 1, 3), *divmod(j - 1, 3))

    return visible


# mask and the sentence that defines it
ATOMS = [
    (masks.causal(), lambda b, h, i, j: j - i <= DELTA),
    (masks.causal("top_left"), lambda b, h, i, j: j <= i),
    (masks.padding(LENGTHS), lambda b, h, i, j: j < LENGTHS[b]),
    (masks.padding(torch.tensor(LENGTHS), QUERIES), lambda b, h, i, j: j < LENGTHS[b] and i < QUERIES[b]),
    (masks.key_padding(KEEP), lambda b, h, i, j: KEEP[b, j]),
    (masks.key_padding(OTHER), lambda b, h, i, j: OTHER[b, j]),
    (masks.dense(PAIRS), lambda b, h, i, j: PAIRS[i, j]),
    (masks.dense(KEEP[:, None, None]), lambda b, h, i, j: KEEP[b, j]),
    (masks.full(), lambda b, h, i, j: True),
    (masks.window(1, 2), lambda b, h, i, j: -1 <= j - i - DELTA <= 2),
    (masks.window(None, 1, "top_left"), lambda b, h, i, j: j - i <= 1),
    (masks.window(-1, None, "top_left"), lambda b, h, i, j: j - i >= 1),
    (masks.prefix_lm(LENGTHS), lambda b, h, i, j: j < LENGTHS[b] or j - i <= DELTA),
    (masks.prefix_lm(torch.tensor([2, 1, 3]), "top_left"), lambda b, h, i, j: j < [2, 1, 3][b] or j <= i),
    (masks.documents(IDS, KEY_IDS), lambda b, h, i, j: IDS[b, i] == KEY_IDS[b, j] and IDS[b, i] >= 0),
    (masks.documents(IDS // 2, KEY_IDS), lambda b, h, i, j: IDS[b, i] // 2 == KEY_IDS[b, j] and IDS[b, i] >= 0),
    (masks.rows(2, 3, 1), grid(lambda r, c, s, d: r == s)),
    (masks.columns(2, 3, 1), grid(lambda r, c, s, d: c == d)),
    (masks.conv(2, 3, 3, 1), grid(lambda r, c, s, d: abs(r - s) <= 1 and abs(c - d) <= 1)),
]
IN_TURN = [(backend, name) for backend in ("eager", "cpu") for name in MASKS]
IN_TURN += [pytest.param(*TRITON.values, name, marks=TRITON.marks) for name in ("documents_causal", "either")]
TRIPLES = list(itertools.combinations(range(len(ATOMS)), 3))[::7]


def defined(combine, *definitions):
    result = torch.zeros(B, H, M, N, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(B), range(H), range(M), range(N)):
        result[b, h, i, j] = combine(bool(d(b, h, i, j)) for d in definitions)
    return result


def check(mask, expected):
    assert torch.equal(mask.dense(B, H, M, N), expected)
    assert torch.equal(mask.lower(M, N).visible(B, H, M, N), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_and_is_the_conjunction(size):
    for parts in itertools.combinations(range(len(ATOMS)), size) if size < 3 else TRIPLES:
        mask, definitions = ATOMS[parts[0]][0], [ATOMS[p][1] for p in parts]
        for p in parts[1:]:
            mask = mask & ATOMS[p][0]
        check(mask, defined(all, *definitions))


@pytest.mark.parametrize("size", [2, 3])
def test_or_is_the_disjunction(size):
    for parts in itertools.combinations(range(len(ATOMS)), size) if size < 3 else TRIPLES:
        mask, definitions = ATOMS[parts[0]][0], [ATOMS[p][1] for p in parts]
        for p in parts[1:]:
            mask = mask | ATOMS[p][0]
        check(mask, defined(any, *definitions))


def test_nested_expressions():
    for a, b, c, d in itertools.islice(itertools.combinations(range(len(ATOMS)), 4), 0, None, 61):
        left, right = defined(all, ATOMS[a][1], ATOMS[b][1]), defined(any, ATOMS[c][1], ATOMS[d][1])
        (one, two, three, four) = (ATOMS[p][0] for p in (a, b, c, d))
        check(one & two & (three | four), left & right)
        check((one & two) | (three | four), left | right)


@pytest.mark.parametrize("parts", [(4,), (5,), (4, 5), (2, 4), (2, 5), (7, 5)])
def test_key_range_is_tight(parts):
    """Kernels take a row for dead when it ends before the first live key, so key_begin must be one."""
    mask = ATOMS[parts[0]][0]
    for p in parts[1:]:
        mask = mask & ATOMS[p][0]
    live = mask.dense(B, 1, 1, N)[:, 0, 0]
    for b in range(B):
        if live[b].any():
            assert int(mask.key_begin[b]) == int(live[b].nonzero()[0])


def test_closed_forms_stay_closed():
    """No bits: `&` of these is evaluated in the kernels from bounds and ids."""
    mask = masks.window(3, 1) & masks.causal("top_left") & masks.padding(LENGTHS, QUERIES) & masks.key_padding(KEEP)
    lowered = (mask & masks.prefix_lm(LENGTHS) & masks.documents(IDS, KEY_IDS)).lower(M, N)
    assert lowered.bits is None and (lowered.low, lowered.high) == (DELTA - 3, 0)


def test_bits_have_the_shape_of_the_mask():
    assert masks.rows(2, 3, 1).lower(M, N).bits.shape == (1, 1, M, 1)
    assert (masks.causal() | masks.padding(LENGTHS)).lower(M, 70).bits.shape == (B, 1, M, 3)
    assert masks.dense(torch.ones(1, H, M, 1) > 0).lower(M, 70).bits.shape == (1, H, M, 1)


@pytest.mark.parametrize("shape", [(1, 1, 5, 1), (2, 3, 5, 31), (2, 1, 1, 33), (1, 3, 3, 64), (1, 1, 0, 7), (2, 1, 3, 0)])
def test_packed_bits_unpack(shape):
    pairs = torch.rand(shape) < 0.5
    expanded = pairs.expand(2, 3, shape[2], max(shape[3], 40) if shape[3] == 1 else shape[3])
    assert torch.equal(LoweredMask(bits=pack_bits(pairs)).visible(2, 3, *expanded.shape[2:]), expanded)


@pytest.mark.parametrize(("M", "N"), [(1, 1), (64, 64), (130, 200), (200, 65), (65, 300)])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_told_apart_exactly(name, M, N):
    """A tile is EMPTY, or FULL, exactly where no, or every, pair of it is visible."""
    mask = MASKS[name](2, 2, M, N, torch.Generator().manual_seed(1), "cpu") or masks.full()
    lowered, visible = mask.lower(M, N), mask.dense(2, 2, M, N)
    pairs = LoweredMask(bits=lowered.bits).visible(2, 2, M, N) if lowered.bits is not None else None
    rows, columns = -(-M // TILE), -(-N // TILE)
    status = tile_status(lowered, M, N, None, pairs).expand(2, 2, rows, columns)
    for b, h, m, n in itertools.product(range(2), range(2), range(rows), range(columns)):
        tile = visible[b, h, m * TILE : (m + 1) * TILE, n * TILE : (n + 1) * TILE]
        assert status[b, h, m, n] == (EMPTY if not tile.any() else FULL if tile.all() else PARTIAL), (b, h, m, n)
    if lowered.key_tiles is not None:
        for lists, expected in ((lowered.key_tiles, status), (lowered.query_tiles, status.mT)):
            assert torch.equal(lists.expand(2, 2, -1, -1), tile_lists(expected))


def test_tile_lists():
    status = torch.tensor([[0, 1, 2, 1], [2, 0, 0, 2], [0, 0, 0, 0]])
    lists = tile_lists(status).tolist()
    assert [row[:2] for row in lists] == [[2, 1], [0, 2], [0, 0]]
    assert [row[2 : 2 + row[0] + row[1]] for row in lists] == [[1, 3, 2], [0, 3], []]


def test_a_tile_of_scattered_documents_is_taken_for_partial():
    """Least and greatest id are all that is looked at, so a tile between them is visited; nothing visible is lost."""
    ids = torch.arange(128)[None] % 2 * 3
    key_ids = torch.full((1, 128), 1)
    lowered = masks.documents(ids, key_ids).lower(128, 128)
    assert lowered.key_tiles[0, 0, :, 0].tolist() == [2, 2] and not lowered.visible(1, 1, 128, 128).any()


def test_an_id_far_below_zero_is_in_no_document():
    ids = torch.tensor([[-(2**32) + 5, 5]])
    assert torch.equal(masks.documents(ids).dense(1, 1, 2, 2)[0, 0], torch.tensor([[False, False], [False, True]]))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype(dtype):
    """Computed, compiled, and of no values at all."""
    ids, key_ids, lengths = (torch.tensor(x).to(dtype) for x in ([[0, 0, 1], [2, 1, 2]], [[1, 0, 1], [2, 0, 1]], [1, 3]))

    def visible(ids, key_ids, lengths):
        made = masks.documents(ids, key_ids) & masks.padding(lengths, lengths), masks.prefix_lm(lengths)
        return tuple(mask.pairs(3, 3, None) for mask in made)

    expected = visible(ids.long(), key_ids.long(), lengths.long())
    torch._dynamo.reset()
    for function in (visible, torch.compile(visible, backend="aot_eager", fullgraph=True)):
        assert all(map(torch.equal, function(ids, key_ids, lengths), expected))
    assert masks.documents(ids.to("meta"), key_ids.to("meta")).ids.dtype == torch.int32
    assert masks.padding(lengths.to("meta")).key_end.dtype == torch.int32
    array = lengths.numpy()
    assert torch.equal(masks.padding(array, list(array)).dense(2, 1, 3, 3), masks.padding([1, 3], [1, 3]).dense(2, 1, 3, 3))


def test_numpy_s_integers_are_integers():
    three = np.int64(3)
    made = masks.window(three, np.int8(1)), masks.rows(three, three, three), masks.conv(three, three, three, three)
    plain = masks.window(3, 1), masks.rows(3, 3, 3), masks.conv(3, 3, 3, 3)
    for mask, expected in zip(made, plain, strict=True):
        assert torch.equal(mask.lower(9, 9).visible(1, 1, 9, 9), expected.dense(1, 1, 9, 9))


def test_lengths_are_clamped():
    assert torch.equal(masks.padding([-3, 99, 2]).dense(3, 1, 1, 6)[:, 0, 0].sum(-1), torch.tensor([0, 6, 2]))


def test_bits_and_tiles_are_made_once_for_a_shape():
    mask = masks.rows(2, 3, 1) & masks.padding(LENGTHS)
    first, again, other = mask.lower(M, N), mask.lower(M, N), mask.lower(M - 1, N)
    assert first.bits is again.bits and first.key_tiles is again.key_tiles
    assert first.bits is not other.bits


def test_few_shapes_are_kept():
    mask = masks.rows(5, 5)
    for size in range(1, 24):
        mask.lower(size, size)
        assert len(mask._bits) <= masks.CACHED_SHAPES


@pytest.mark.parametrize("size", [(40, 40), (40, 70)], ids=["self", "cross"])
@pytest.mark.parametrize(("backend", "name"), IN_TURN)
def test_made_and_first_used_in_inference_mode_a_mask_serves_training(backend, name, size):
    (M, N), device = size, device_of(backend)
    q, k, v = (torch.randn(2, 2, length, 16, device=device, requires_grad=True) for length in (M, N, N))

    def made():
        return MASKS[name](2, 2, M, N, torch.Generator().manual_seed(0), device)

    def gradients(mask):
        out = fastattn.attention(q, k, v, mask, backend=backend)
        return torch.autograd.grad(out.square().sum(), [q, k, v])

    with torch.inference_mode():
        mask = made()
        fastattn.attention(q, k, v, mask, backend=backend)
    for grad, expected in zip(gradients(mask), gradients(made()), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("name", ["padding", "key_padding", "prefix_lm", "documents", "dense", "dense_keys"])
def test_a_mask_of_tensors_of_inference_mode_serves_training(name):
    with torch.inference_mode():
        lengths, keep, ids = torch.tensor([3, 5]).int(), torch.arange(5).expand(2, 5) != 3, torch.zeros(2, 5).int()
    mask = {
        "padding": lambda: masks.padding(lengths, lengths),
        "key_padding": lambda: masks.key_padding(keep) & masks.causal(),
        "prefix_lm": lambda: masks.prefix_lm(lengths),
        "documents": lambda: masks.documents(ids, ids),
        "dense": lambda: masks.dense(keep[0, :, None] & keep[0]),
        "dense_keys": lambda: masks.dense(keep[:, None, None]),
    }[name]()
    q = torch.randn(2, 1, 5, 4, requires_grad=True)
    for backend in ("eager", "cpu"):
        assert torch.autograd.grad(fastattn.attention(q, q, q, mask, backend=backend).square().sum(), q)[0].any()


def test_nothing_is_kept_of_a_trace():
    mask = masks.rows(2, 3, 1) & masks.documents(IDS, KEY_IDS)
    q, k = torch.randn(B, H, M, 8), torch.randn(B, H, N, 8)

    class Module(torch.nn.Module):
        def forward(self, q, k):
            return fastattn.attention(q, k, k, mask, backend="eager")

    expected = fastattn.attention(q, k, k, mask, backend="eager")
    mask._bits.clear()
    exported = torch.export.export(Module(), (q, k)).module()
    assert not mask._bits
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), expected)
    torch.testing.assert_close(exported(q, k), expected)
    assert all(type(x) is torch.Tensor for made in mask._bits.values() for x in made.values())


@dataclass(frozen=True, eq=False)
class Stripes:
    """The keys at a multiple of `step` from the query, counted from the last of both."""

    step: int

    def __repr__(self):
        return f"stripes({self.step})"

    def pairs(self, M, N, device, delta=None):
        i, j = torch.arange(M, device=device), torch.arange(N, device=device)
        return ((j - i[:, None] - (N - M if delta is None else delta)) % self.step == 0).reshape(-1, 1, M, N)

    def device(self):
        return None

    def check(self, B, H, M, N, device):
        if N % self.step:
            raise ValueError(f"mask: stripes of {self.step} do not fit {N} keys")


def test_a_term_needs_what_the_protocol_lists():
    """Of a class that nothing else knows: alone, combined, in a call, packed beside other lengths of keys, and refused."""
    stripes = masks.Mask(terms=(Stripes(3),))
    expected = torch.tensor([[(j - i - DELTA) % 3 == 0 for j in range(N)] for i in range(M)])
    assert torch.equal(stripes.dense(B, H, M, N), expected.expand(B, H, M, N))
    either = masks.causal() & (stripes | masks.padding(LENGTHS))
    assert repr(either) == "causal() & (stripes(3) | padding(int32 (3,)))"
    q, k = torch.randn(B, H, M, 16), torch.randn(B, H, N, 16)
    torch.testing.assert_close(
        fastattn.attention(q, k, k, either), fastattn.attention(q, k, k, either.dense(B, H, M, N), backend="eager")
    )
    queries, keys = Packing.from_lengths([2, 4], 4), Packing.from_lengths([6, 3], 6)
    q, k = torch.randn(6, H, 16), torch.randn(9, H, 16)
    out = fastattn.varlen_attention(q, k, k, queries, stripes, key_packing=keys)
    for rows, columns in ((slice(0, 2), slice(0, 6)), (slice(2, 6), slice(6, 9))):
        q_s, k_s = (x.transpose(0, 1)[None] for x in (q[rows], k[columns]))
        expected = fastattn.attention(q_s, k_s, k_s, stripes, backend="eager")
        torch.testing.assert_close(out[rows].transpose(0, 1)[None], expected)
    with pytest.raises(ValueError, match="stripes of 3 do not fit 5 keys"):
        fastattn.attention(q_s, q_s[:, :, [0] * 5], q_s[:, :, [0] * 5], stripes)


def test_mask_is_a_pytree():
    mask = masks.causal() & masks.padding(LENGTHS) & (masks.rows(2, 3, 1) | masks.dense(PAIRS))
    leaves, spec = torch.utils._pytree.tree_flatten(mask)
    rebuilt = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(rebuilt.dense(B, H, M, N), mask.dense(B, H, M, N))


@pytest.mark.parametrize(
    "text",
    [
        "full()",
        "causal()",
        "window(9, 4) & window(-2, None, 'top_left')",
        "causal('top_left') & rows(2, 3, 1)",
        "columns(1, 4, 0) | conv(2, 2, 1, 3) | conv(2, 2, 3, 3)",
        "causal() & (window(3, 3) | conv(2, 3, 3, 1) | window(1, 1) & rows(2, 3, 1))",
    ],
)
def test_repr_is_the_expression(text):
    assert repr(eval(text, vars(masks))) == text


def test_repr_has_tensors_as_shapes():
    padding = masks.padding(LENGTHS, QUERIES)
    assert repr(padding) == "padding(int32 (3,), int32 (3,))"
    assert repr(masks.causal() & masks.padding(LENGTHS)) == "causal() & padding(int32 (3,))"
    assert repr(masks.key_padding(KEEP)) == repr(masks.dense(KEEP[:, None, None])) == "key_padding(bool (3, 6))"
    assert repr(masks.key_padding(KEEP) & padding) == "key_padding(bool (3, 6)) & padding(int32 (3,), int32 (3,))"
    assert repr(masks.prefix_lm(LENGTHS) | masks.dense(PAIRS)) == "prefix_lm(int32 (3,)) | dense(bool (1, 1, 4, 6))"
    two = masks.documents(IDS, KEY_IDS) & masks.documents(IDS[0])
    assert repr(two) == "documents(int32 (3, 4), int32 (3, 6)) & documents(int32 (4,))"
    shifted = (masks.causal() & masks.window(1, 2))._shifted(torch.ones(3, 1, 1, 1, dtype=torch.int64))
    assert repr(shifted) == "shifted(window(1, 0), int64 (3, 1, 1, 1))"  # what packed sequences make of an alignment


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "align must be", lambda: masks.causal("left")),
        (ValueError, "align must be", lambda: masks.prefix_lm([1], "left")),
        (TypeError, "left must be an integer", lambda: masks.window(0.5, 1)),
        (TypeError, "right must be an integer", lambda: masks.window(None, True)),
        (TypeError, "key_lengths must hold integers", lambda: masks.padding(torch.tensor([1.0]))),
        (TypeError, "key_lengths must be a tensor, an array or a list", lambda: masks.padding(None)),
        (TypeError, "key_lengths must be a tensor, an array or a list", lambda: masks.padding(0)),
        (TypeError, r"key_lengths must hold integers, got \[1, 2\]", lambda: masks.padding([[1, 2]])),
        (TypeError, "query_lengths must hold integers, got an array of float64", lambda: masks.padding([1], np.ones(1))),
        (TypeError, "lengths must hold integers, got an array of bool", lambda: masks.prefix_lm(np.ones(1, bool))),
        (ValueError, r"lengths must be below 2\^63, got 9223372036854775813", lambda: masks.prefix_lm(BEYOND)),
        (ValueError, r"key_lengths must be from -2\^63 to 2\^63", lambda: masks.padding([2**63])),
        (TypeError, r"pass torch.from_numpy\(keep\)", lambda: masks.key_padding(np.ones((2, 3), bool))),
        (TypeError, r"pass torch.from_numpy\(mask\)", lambda: masks.dense(np.ones((2, 3), bool))),
        (TypeError, r"pass torch.from_numpy\(ids\)", lambda: masks.documents(np.ones((2, 3), int))),
        (ValueError, r"ids must be below 2\^63, got 9223372036854775813", lambda: masks.documents(torch.from_numpy(BEYOND))),
        (TypeError, "kernel must be an integer", lambda: masks.conv(2, 2, 3.0)),
        (TypeError, "h must be an integer", lambda: masks.rows("2", 2)),
        (ValueError, "key_lengths must have shape", lambda: masks.padding(torch.zeros(2, 2, dtype=int))),
        (ValueError, "query_lengths must have shape", lambda: masks.padding([1], torch.tensor(3))),
        (ValueError, "lengths must have shape", lambda: masks.prefix_lm(torch.tensor(3))),
        (TypeError, "keep must be a bool tensor", lambda: masks.key_padding(torch.ones(2, 3))),
        (ValueError, "keep must have shape", lambda: masks.key_padding(torch.ones(3) > 0)),
        (ValueError, "must broadcast", lambda: masks.dense(torch.ones(1, 1, 1, 2, 2) > 0)),
        (TypeError, "mask must be", lambda: masks.dense("causal")),
        (TypeError, "unsupported operand", lambda: masks.causal() & torch.ones(2)),
        (TypeError, "unsupported operand", lambda: masks.causal() | None),
        (TypeError, "ids must be a tensor of integers", lambda: masks.documents(torch.ones(2, 3))),
        (TypeError, "key_ids must be a tensor of integers", lambda: masks.documents(IDS, [[1]])),
        (ValueError, r"key_ids must be below 2\^31", lambda: masks.documents(IDS, KEY_IDS + 2**31)),
        (ValueError, "ids must have shape", lambda: masks.documents(IDS[None])),
        (ValueError, "ids has shape", lambda: masks.documents(IDS[0]).check(B, H, M, M)),
        (ValueError, "kernel must be odd", lambda: masks.conv(2, 2, 2)),
        (ValueError, "w must be at least 1", lambda: masks.rows(2, 0)),
        (ValueError, "prefix must be at least 0", lambda: masks.columns(2, 2, -1)),
        (ValueError, "6 keys, but a prefix of 0 and an image of 2 x 2", lambda: masks.rows(2, 2).dense(B, H, M, N)),
        (ValueError, "need key_ids", lambda: masks.documents(IDS).dense(B, H, M, N)),
        (ValueError, r"ids has shape \(3, 4\)", lambda: masks.documents(IDS, KEY_IDS).dense(B, H, M + 1, N)),
        (ValueError, "does not broadcast", lambda: (masks.full() | masks.dense(PAIRS)).dense(B, H, M, N + 1)),
        (ValueError, "mask is on cpu", lambda: (masks.full() | masks.dense(PAIRS)).check(B, H, M, N, torch.device("meta"))),
    ],
)
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
