"""The tiles that a Triton attention program visits, and those it takes for full, against the mask's dense form."""

# ruff: noqa: E402  (without triton nothing below can be imported)
import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from backends import TRITON, device_of

from fastattn import masks
from fastattn.kernels.triton.attention import _mask_arguments
from fastattn.kernels.triton.tiles import (
    key_run,
    list_row,
    listed_run,
    mask_bounds,
    partial_place,
    query_run,
    sequence,
    tile_start,
)
from fastattn.lowering import TILE
from fastattn.testing import MASKS

SHAPES = [(1, 1), (5, 64), (70, 133), (130, 66)]
B, H = 2, 2
PARTIAL, FULL = 1, 2


@triton.jit
def _visits_kernel(
    visits, low, high, prefix_high, prefix, key_begin, key_end, query_end, keys, tiles, tiles_b, tiles_h, tiles_t, H, M, N,
    OVER_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per head and block, as the kernels have. visits (B, H, blocks of queries, blocks of keys): 1 added for a visit
    to a partial tile, 2 for one to a full tile."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    blocks = tiles_m if OVER_KEYS else tiles_n
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    ends = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, head // H, M, N)
    bounds = low, high, prefix_high, ends[0], ends[1], ends[2], ends[3], ends[4]
    BLOCK: tl.constexpr = BLOCK_M if OVER_KEYS else BLOCK_N
    STEP: tl.constexpr = BLOCK_N if OVER_KEYS else BLOCK_M
    row = list_row(head // H, head % H, block, tiles_b, tiles_h, tiles_t, BLOCK)
    if tiles is not None:
        start, before, full, partial = listed_run(tiles + row, N if OVER_KEYS else M, STEP)
    elif OVER_KEYS:
        start, before, full, partial = key_run(block * BLOCK_M, bounds, keys, BLOCK_M, BLOCK_N)
    else:
        start, before, full, partial = query_run(block * BLOCK_N, bounds, BLOCK_M, BLOCK_N)
    visits += head * tiles_m * tiles_n + (block * tiles_n if OVER_KEYS else block)
    along = 1 if OVER_KEYS else tiles_n
    most = tiles_n if OVER_KEYS else tiles_m
    for t in range(full + partial):
        place = before + t
        kind = 2
        if t >= full:
            place = partial_place(t - full, before, full)
            kind = 1
        tile = tile_start(place, start, tiles, row, STEP) // STEP
        tl.store(visits + tile * along, tl.load(visits + tile * along, mask=tile < most, other=0) + kind, mask=tile < most)


def visits(lowered, M, N, over_keys, block_m, block_n):
    tiles = lowered.key_tiles if over_keys else lowered.query_tiles
    arguments = {name: x for name, x in _mask_arguments(lowered, tiles).items() if name in _visits_kernel.arg_names}
    device = device_of("triton")
    counts = torch.zeros(B, H, -(-M // block_m), -(-N // block_n), dtype=torch.int32, device=device)
    programs = B * H * counts.shape[2 if over_keys else 3]
    sizes = {"H": H, "M": M, "N": N, "OVER_KEYS": over_keys, "BLOCK_M": block_m, "BLOCK_N": block_n}
    _visits_kernel[(programs,)](counts, **arguments, **sizes)
    return counts


def in_tiles(pairs, block_m, block_n):
    """(B, H, M, N) as (B, H, blocks, blocks, block_m * block_n), filled up with False."""
    M, N = pairs.shape[2:]
    padded = torch.nn.functional.pad(pairs, (0, -N % block_n, 0, -M % block_m))
    return padded.unflatten(3, (-1, block_n)).unflatten(2, (-1, block_m)).transpose(3, 4).flatten(4)


def named(name, M, N):
    g = torch.Generator().manual_seed(M + N)
    return MASKS[name](B, H, M, N, g, device_of("triton")) or masks.full()


def odd(name, device):
    """Bounds that no constructor of MASKS makes."""
    lengths = torch.tensor([40, 3], dtype=torch.int32, device=device)
    return {
        "contradiction": masks.Mask(low_top_left=5, high_top_left=3),
        "prefix below a bound": masks.Mask(low_top_left=9, prefix_top_left=lengths),
        "far": masks.window(-(2**40), None),
        "everywhere": masks.window(2**40, 2**40),
        "left of the first": masks.window(None, -60, "top_left") & masks.padding(lengths + 50, lengths),
        "range and band": masks.window(20, 10) & masks.Mask(key_begin=lengths, query_end=lengths + 60),
    }[name]


CASES = [*MASKS, "contradiction", "prefix below a bound", "far", "everywhere", "left of the first", "range and band"]


def listed(tiles, across):
    """Which tiles a list (B or 1, H or 1, rows, 2 + T) names, and which of them as full: two bool tensors (B, H, rows, T)."""
    named, full = torch.zeros(2, *tiles.shape[:3], across, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, tiles.shape[:3])).tolist():
        partial, whole, *places = tiles[b, h, row].tolist()
        named[b, h, row, places[: partial + whole]] = True
        full[b, h, row, places[partial : partial + whole]] = True
    return named.expand(B, H, -1, -1), full.expand(B, H, -1, -1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [TRITON])
def test_visits_exactly_the_tiles_with_a_visible_pair(backend, case):
    for index, (M, N) in enumerate(SHAPES):
        mask = named(case, M, N) if case in MASKS else odd(case, device_of(backend))
        lowered = mask.lower(M, N)
        dense = mask.dense(B, H, M, N, device_of(backend)).cpu()
        live_rows, live_keys = dense.any(3, keepdim=True), dense.any(2, keepdim=True)
        block_m, block_n = ((64, 32), (32, 64), (16, 16), (64, 64))[index]
        for over_keys in (True, False):
            counts = visits(lowered, M, N, over_keys, block_m, block_n).cpu()
            visited, full = counts > 0, counts == FULL
            assert ((counts == PARTIAL) | full | ~visited).all(), f"{M} x {N}: a tile visited twice"
            assert visited[in_tiles(dense, block_m, block_n).any(-1)].all(), f"{M} x {N}: a visible pair is left out"
            # no pair of a live query is hidden in a full tile; over queries a key that is not live gathers what is not stored
            shown = dense | ~live_rows if over_keys else dense | ~live_rows | ~live_keys
            assert not (in_tiles(~shown, block_m, block_n).any(-1) & full).any(), f"{M} x {N}: a full tile hides something"
            if over_keys and N % block_n:
                assert not full[..., -1].any(), f"{M} x {N}: a full tile has keys beyond the end"
            if lowered.key_tiles is None:
                hull = lowered._replace(keys=None).visible(B, H, M, N, device_of(backend)).cpu()  # holes are not looked at
                assert torch.equal(visited, in_tiles(hull, block_m, block_n).any(-1)), f"{M} x {N}"
                continue
            tiles, across = (lowered.key_tiles, N) if over_keys else (lowered.query_tiles, M)
            expected, expected_full = (t if over_keys else t.mT for t in listed(tiles.cpu(), -(-across // TILE)))
            rows, columns = (
                torch.arange(s) * block // TILE for s, block in zip(counts.shape[2:], (block_m, block_n), strict=True)
            )
            assert torch.equal(visited, expected[:, :, rows][..., columns]), f"{M} x {N}"
            ragged = torch.zeros_like(full)
            if across % TILE:  # the last tile is never taken for full
                ragged[(..., columns == columns[-1]) if over_keys else (..., rows == rows[-1], slice(None))] = True
            assert torch.equal(full, expected_full[:, :, rows][..., columns] & ~ragged), f"{M} x {N}"


def test_full_tiles_are_found():
    """Tiles taken for partial would give right results, slowly."""
    counts = visits(masks.causal().lower(130, 130), 130, 130, True, 64, 32)[0, 0]
    assert counts.tolist() == [[1, 1, 0, 0, 0], [2, 2, 1, 1, 0], [2, 2, 2, 2, 1]]
    lengths = torch.tensor([70, 130], device=counts.device)
    counts = visits(masks.padding(lengths).lower(130, 130), 130, 130, True, 64, 32)[:, 0]
    assert counts.tolist() == [[[2, 2, 1, 0, 0]] * 3, [[2, 2, 2, 2, 1]] * 3]
    counts = visits(masks.padding(lengths).lower(130, 130), 130, 130, False, 32, 64)[0, 0]
    assert counts.tolist() == [[2, 2, 0]] * 5


@triton.jit
def _sequence_kernel(starts, found, total, longest):
    b = tl.program_id(0)
    begin, length = sequence(starts, b, total, longest)
    tl.store(found + 2 * b, begin)
    tl.store(found + 2 * b + 1, length)


@pytest.mark.parametrize("backend", [TRITON])
def test_rows_of_a_sequence_are_rows_that_there_are(backend):
    """Whatever int32 its offsets are."""
    some = [-(2**31), -1, 0, 3, 8, 9, 10, 11, 2**31 - 1]
    starts = [x for pair in itertools.product(some, some) for x in pair]
    for total, longest in ((10, 5), (0, 5), (10, 0), (10, 2**29)):
        given = torch.tensor(starts, dtype=torch.int32, device=device_of(backend))
        found = torch.zeros(len(starts) - 1, 2, dtype=torch.int64, device=given.device)
        _sequence_kernel[(len(found),)](given, found, total, longest)
        for start, end, (begin, length) in zip(starts, starts[1:], found.tolist(), strict=False):
            assert begin == min(max(start, 0), total)
            assert length == min(max(min(end, total) - begin, 0), longest)
