"""The CUDA attention forward: which kernel serves a request, which blocks of pairs it multiplies, and lengths at their edges."""

import pytest
import test_varlen
import torch
from backends import CUDA, device_of, run_forward

from fastattn import Packing, masks
from fastattn.kernels.cuda import attention, emulator
from fastattn.lowering import LoweredMask
from fastattn.testing import MASKS, assert_accurate, attention_inputs, attention_yardstick

SM_80, SM_89, SM_90 = (kilobytes * 1024 for kilobytes in (163, 99, 227))  # shared memory that a block may ask for
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU and bool(emulator.problems()), reason="the emulator cannot be built here")


def module():
    return attention.library.module() if GPU else emulator.module()


def visits(mask, B, H, M, N, D=64, limit=SM_90, rows=None):
    """Bool (B, H, M, N) twice: a product visits the pair, and does so without a mask; and the number of pairs multiplied.

    rows: of q and of k, where they are packed.
    """
    strides = dict.fromkeys(("q", "k", "v"), (0, 0, 0))
    request = module().AttentionForward(
        **strides, mask=attention._mask(mask), scale=1.0, sizes=(B, H, H, M, N, D), bfloat16=False, aligned=True
    )
    tensors = attention._tensors(mask, attention._tensor_fields(mask))
    visited, full = (torch.zeros(B, H, M + 15, N + 15, dtype=torch.bool) for _ in range(2))
    pairs = 0
    for b, h, m, n, keys, masked in request.blocks(limit, *[0] * 5, *(x.data_ptr() for x in tensors), *(rows or ())):
        block = b, h, slice(m, m + 16), slice(n, n + keys)
        assert not visited[block].any(), "a pair is visited twice"
        visited[block] = True
        full[block] = not masked
        pairs += 16 * keys
    assert not full[:, :, :, N:].any()
    return visited[:, :, :M, :N], full[:, :, :M, :N], pairs


def blocks(pairs, rows=16, keys=16):
    """Whether a block of rows x keys holds True, at the shape of the pairs."""
    M, N = pairs.shape[2:]
    padded = torch.nn.functional.pad(pairs, (0, -N % keys, 0, -M % rows))
    found = padded.unflatten(3, (-1, keys)).any(4).unflatten(2, (-1, rows)).any(3)
    return found.repeat_interleave(rows, 2).repeat_interleave(keys, 3)[:, :, :M, :N]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("M", "N"), [(1, 1), (5, 66), (66, 5), (77, 77), (130, 128), (197, 197), (257, 257), (289, 289), (320, 300)]
)
def test_visits_what_is_visible(mask, M, N):
    B, H = 3, 2
    lowered = attention_inputs(B, H, M, N, 4, torch.float32, mask=mask).lowered()
    visible = lowered.visible(B, H, M, N)
    visited, full, _ = visits(lowered, B, H, M, N)
    assert not (visible & ~visited).any(), "a visible pair is not visited"
    live = torch.arange(M) < (torch.tensor([M]) if lowered.query_end is None else lowered.query_end)[:, None]
    assert not (full & ~visible & live[:, None, :, None]).any(), "a hidden pair is visited without a mask"  # dead rows end as 0
    bounds = lowered._replace(keys=None, ids=None, key_ids=None, bits=None).visible(B, H, M, N)
    if lowered.key_tiles is None:
        assert torch.equal(visited, visited & blocks(bounds)), "a block without a visible pair is visited"
        eight = blocks(bounds, keys=8)  # the last eight keys of a row of blocks
        assert not (eight & ~visited).any()
        if lowered.keys is None:
            whole = ~blocks(~bounds) & (torch.arange(N) < N // 16 * 16)
            rows = torch.arange(M)[:, None] < M // 16 * 16
            assert not (whole & rows & ~full).any(), "a full block is masked"
    else:
        listed = blocks(visible, 64, 64)
        lists = torch.zeros(B, H, -(-M // 64), -(-N // 64), dtype=torch.bool)
        tiles = lowered.key_tiles.expand(B, H, -1, -1)
        for b, h, m in ((b, h, m) for b in range(B) for h in range(H) for m in range(lists.shape[2])):
            row = tiles[b, h, m].tolist()
            lists[b, h, m, row[2 : 2 + row[0] + row[1]]] = True
        in_list = lists.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :M, :N]
        assert not (visited & ~(in_list & blocks(bounds))).any(), "a tile that is not listed is visited"
        assert not (listed & ~in_list).any()


@pytest.mark.parametrize(("L", "most"), [(50, 1.44), (77, 1.10), (128, 1.0), (197, 1.10), (257, 1.10), (577, 1.10)])
def test_multiplies_little_more_than_the_pairs(L, most):
    """16 x 8 is the hardware's grid: 50 x 50 takes 64 x 56 of it."""
    pairs = visits(LoweredMask(), 1, 1, L, L)[2]
    assert L * L <= pairs <= most * L * L


UNALIGNED = ["none", "causal_top_left", "padding", "padding_queries", "left", "holes"]  # no bound depends on N - M


@pytest.mark.parametrize(
    ("lengths", "key_lengths", "mask"),
    [
        *(((5, 0, 70, 200), None, mask) for mask in MASKS),
        *(((3, 300, 66), None, mask) for mask in MASKS),
        *(((5, 0, 70, 200), (66, 9, 0, 130), mask) for mask in UNALIGNED),
        *(((5, 66, 70), (300, 64, 0), mask) for mask in UNALIGNED),
    ],
)
def test_packed_sequences_visit_what_each_alone_does(lengths, key_lengths, mask):
    """In heads held on chip, and in streamed ones."""
    B, H, M, N = len(lengths), 2, max(lengths), max(key_lengths or lengths)
    packing = keys = Packing.from_lengths(torch.tensor(lengths), M)
    if key_lengths is not None:
        keys = Packing.from_lengths(torch.tensor(key_lengths), N)
    mask = attention_inputs(B, H, M, N, 4, torch.float32, mask=mask).mask
    tokens = test_varlen.packed_ids(mask, packing, keys) or masks.full()
    lowered = tokens.lower_packed(packing, keys, H)
    visited, full, pairs = visits(lowered, B, H, M, N, rows=(packing.total, keys.total))
    alone = 0
    for b, (m, n) in enumerate(zip(lengths, key_lengths or lengths, strict=True)):
        one = LoweredMask() if mask is None else test_varlen.of_sequence(mask, b, m, n).lower(m, n, torch.device("cpu"))
        expected, expected_full, count = visits(one, 1, H, m, n, limit=SM_90 if N <= 288 else 0)
        assert torch.equal(visited[b, :, :m, :n], expected[0])
        wrong = full[b, :, :m, :n] & ~expected_full[0]  # lists tell of tiles of the longest sequence: fewer are known to be full
        assert not wrong.any() and (lowered.key_tiles is not None or torch.equal(full[b, :, :m, :n], expected_full[0]))
        alone += count
    assert pairs == alone, "pairs beyond the end of a sequence are multiplied"


def test_causal_multiplies_half():
    lowered = MASKS["causal"](1, 1, 256, 256, None, "cpu").lower(256, 256, torch.device("cpu"))
    assert visits(lowered, 1, 1, 256, 256)[2] == 16 * 17 // 2 * 256


@pytest.mark.parametrize("limit", [SM_80, SM_89, SM_90])
@pytest.mark.parametrize("D", [32, 64, 128])
def test_config_fits(D, limit):
    for N in range(1, 400):
        for M in (1, 16, 50, 77, 197, 257, 288, 321, 2000, 2**31 - 1, N):
            capacity, warps, rows, shared = module().attention_forward_config(D, M, N, limit)
            assert 0 < shared <= limit and 4 <= warps <= 8 and rows % 16 == 0 and rows > 0
            assert capacity == 0 or capacity >= N
            if capacity == 0:
                assert (warps, rows) == (4, 64)
            else:
                assert shared == (2 * (-(-N // 16) * 16) + rows) * D * 2


def test_config_of_common_lengths():
    """One block per head where K, V and Q of a head fit; warps that share its rows evenly."""
    config = module().attention_forward_config
    assert [config(64, L, L, SM_90)[0] for L in (50, 77, 128, 129, 197, 257, 288, 289)] == [128] * 3 + [288] * 4 + [0]
    assert all(config(64, L, L, SM_90)[2] == -(-L // 16) * 16 for L in (50, 77, 128, 197, 257, 288))
    assert [config(64, L, L, SM_90)[1] for L in (50, 77, 128)] == [4, 5, 8]
    assert [config(128, L, L, SM_90)[0] for L in (128, 129, 288, 289)] == [128, 288, 288, 0]
    assert config(128, 197, 197, SM_89)[0] == 0


# lengths at the edges of capacities and tiles; a mask of bounds, of holes, of documents and of bits
EDGES = [(50, 50), (77, 77), (129, 136), (40, 197), (257, 257), (33, 288), (33, 289), (70, 300), (340, 24)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize(("M", "N"), EDGES)
def test_edges_and_grouped_heads(backend, M, N):
    for i, mask in enumerate(["none", "window_prefix", "holes", "documents_causal"]):
        H, Hkv = ((2, 1), (4, 2), (3, 1), (2, 2))[i]
        D, dtype = (64, 32, 128)[(i + N) % 3], (torch.float16, torch.bfloat16)[(i + N) % 2]
        x = attention_inputs(1, H, M, N, D, dtype, device_of(backend), Hkv=Hkv, mask=mask, seed=i)
        out, lse = run_forward(attention, x.q, x.k, x.v, x.lowered(), x.scale)
        assert_accurate({"out": out, "lse": lse}, attention_yardstick(x))


# bounds, a range of keys, holes, documents, bits of each sequence's own N - M
@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize("mask", ["none", "causal", "window_prefix", "padding_queries", "holes", "documents_causal", "dense"])
@pytest.mark.parametrize("backend", [CUDA])
def test_packed_sequences_with_many_keys(backend, mask):
    """K and V stream through shared memory; the backward takes two kernels."""
    turn = len(mask) % 3
    dtype, D, Hkv = (torch.float16, torch.bfloat16)[turn % 2], (32, 64, 128)[turn], 1 + turn % 2
    test_varlen.check(backend, (20, 0, 70, 1), (300, 5, 64, 130), mask, dtype, Hkv=Hkv, D=D, extra=turn, dlse=turn == 0)
    test_varlen.check(backend, (3, 290, 0), None, mask, torch.float16, H=1, D=32)


@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize("backend", [CUDA])
def test_packed_sequences_in_several_blocks(backend):
    """More queries than one block of resident keys takes: others than the first end early or have no query at all."""
    test_varlen.check(backend, (330, 5, 0, 170), (24, 24, 24, 7), "causal_top_left", torch.float16, H=1, D=32)
