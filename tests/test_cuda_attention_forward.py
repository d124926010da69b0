"""The CUDA attention forward: which kernel serves a request, which blocks of pairs it multiplies, and lengths at their edges."""

import pytest
import torch
from backends import CUDA, device_of

from fastattn.kernels.cuda import attention, emulator
from fastattn.lowering import LoweredMask
from fastattn.testing import MASKS, assert_accurate, attention_inputs, attention_yardstick

SM_80, SM_89, SM_90 = (kilobytes * 1024 for kilobytes in (163, 99, 227))  # shared memory that a block may ask for
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU and bool(emulator.problems()), reason="the emulator cannot be built here")


def module():
    return attention.library.module() if GPU else emulator.module()


def visits(mask, B, H, M, N, D=64, limit=SM_90):
    """Bool (B, H, M, N) twice: a product visits the pair, and does so without a mask; and the number of pairs multiplied."""
    argument, _ = attention._mask(mask)
    visited, full = (torch.zeros(B, H, M + 15, N + 15, dtype=torch.bool) for _ in range(2))
    pairs = 0
    for b, h, m, n, keys, masked in module().attention_forward_blocks(argument, (B, H, H, M, N, D), limit):
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
        out, lse = attention.forward(x.q, x.k, x.v, x.lowered(), x.scale, True)
        assert_accurate({"out": out, "lse": lse}, attention_yardstick(x))
