"""A mask as kernels receive it: bounds that they evaluate in place, bits for the rest, and lists of the tiles to visit.

For query i the bounds leave one interval of keys whose ends never move back as i grows, so the tiles that a block of queries
visits are one run, and so are those in which it hides nothing. Where a mask has more than bounds (bits or documents), the tiles
to visit are listed instead. B, H, M, N: batch, query heads, queries, keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # queries and keys of a listed tile
CLASS = 32  # plans of packed sequences know the greatest length up to a multiple of it
EMPTY, PARTIAL, FULL = 0, 1, 2


class LoweredMask(NamedTuple):
    """What an op and its kernels receive once M and N are known. Pair (i, j) of sequence b, head h is visible iff all hold."""

    low: int | None = None  # low <= j - i
    high: int | None = None  # j - i <= high
    prefix_high: int | None = None  # with `prefix`
    prefix: Tensor | None = None  # (B,) int32: j < prefix[b] or j - i <= prefix_high
    key_begin: Tensor | None = None  # (B,) int32: key_begin[b] <= j
    key_end: Tensor | None = None  # (B,) int32: j < key_end[b]
    query_end: Tensor | None = None  # (B,) int32: i < query_end[b]
    keys: Tensor | None = None  # (B, N) bool: keys[b, j]
    ids: Tensor | None = None  # (B, M) int32, with `key_ids`
    key_ids: Tensor | None = None  # (B, N) int32: ids[b, i] == key_ids[b, j] >= 0
    bits: Tensor | None = None  # int32, (B, H, M, ceil(N / 32)) or 1 for each: bit j % 32 of word j // 32
    key_tiles: Tensor | None = None  # with ids or bits: for each TILE queries the tiles of keys to visit, see `tile_lists`
    query_tiles: Tensor | None = None  # and for each TILE keys the tiles of queries
    # Packed sequences: q, k and v are (1, H, T, D), B is the number of sequences, and all of the above counts from 0 in each.
    query_starts: Tensor | None = None  # (B + 1,) int32: sequence b has rows query_starts[b] up to query_starts[b + 1] of q
    key_starts: Tensor | None = None  # (B + 1,) int32: and these of k and v. Values are not to be trusted
    max_queries: int | None = None  # M; what is longer is cut
    max_keys: int | None = None  # N
    all_rows: bool | None = None  # whether every row of q, k and v is known to be in a sequence; others are 0 in results

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self if isinstance(x, Tensor)]

    def pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """Visibility of queries i and keys j, bool (B or 1, H or 1, len(i), len(j)): at the shape that the mask has."""
        distance = j - i[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)[None, None]
        if self.low is not None:
            visible = visible & (distance >= self.low)
        if self.high is not None:
            visible = visible & (distance <= self.high)
        if self.prefix is not None and self.prefix_high is not None:
            visible = visible & ((j < _per_sequence(self.prefix)) | (distance <= self.prefix_high))
        if self.key_begin is not None:
            visible = visible & (j >= _per_sequence(self.key_begin))
        if self.key_end is not None:
            visible = visible & (j < _per_sequence(self.key_end))
        if self.query_end is not None:
            visible = visible & (i[:, None] < _per_sequence(self.query_end))
        if self.keys is not None:
            visible = visible & self.keys[:, None, None, j]
        if self.ids is not None and self.key_ids is not None:
            ids, key_ids = self.ids[:, None, i, None], self.key_ids[:, None, None, j]
            visible = visible & (ids == key_ids) & (ids >= 0)
        if self.bits is not None:
            rows = self.bits if self.bits.shape[2] == 1 else self.bits[:, :, i]
            words = rows if rows.shape[3] == 1 else rows[..., j // 32]
            visible = visible & ((words >> (j % 32).to(torch.int32)) & 1).bool()
        return visible

    def visible(self, B: int, H: int, M: int, N: int, device: torch.device | None = None) -> Tensor:
        """The conjunction as a bool tensor (B, H, M, N)."""
        i, j = torch.arange(M, device=device), torch.arange(N, device=device)
        return self.pairs(i, j).expand(B, H, M, N)


class Extras(NamedTuple):
    """What a call adds to a mask: at most one kind of bias on the scores, and dropout of the weights.

    bias, or table with buckets, or slopes; a = N - M (of packed sequences each one's own) with bottom_right, else 0. A pair is
    also hidden where its score with the bias is below LEAST_SCORE.
    """

    bias: Tensor | None = None  # (B or 1, H or 1, M or 1, N or 1), q's dtype or fp32; of packed sequences by rank
    table: Tensor | None = None  # (num_buckets, H), q's dtype or fp32: bias[h, i, j] = table[bucket, h]
    buckets: Tensor | None = None  # (2 reach + 1,) int32: bucket of the distance j - i - a, clamped to reach, at distance + reach
    slopes: Tensor | None = None  # (B or 1, H) fp32: bias[b, h, i, j] = -slope |j - i - a|
    bottom_right: bool = False
    kept: Tensor | None = None  # int32 (B, H, M, ceil(N / 32)), or packed (H, T, ceil(max_keys / 32)): see fastattn/dropout.py
    dropout: float = 0.0  # with `kept`: kept weights are multiplied by dropout.rescale of it

    @property
    def biased(self) -> bool:
        return self.bias is not None or self.table is not None or self.slopes is not None

    @property
    def learned(self) -> Tensor | None:
        """What may get a gradient."""
        return self.table if self.bias is None else self.bias

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """None for those that are not there; of NO_EXTRAS no tensor at all."""
        return () if self is NO_EXTRAS else (self.bias, self.table, self.buckets, self.slopes, self.kept)

    @property
    def bare(self) -> Extras:
        """Without the tensors: what `filled` makes whole again."""
        return self if self is NO_EXTRAS else Extras(bottom_right=self.bottom_right, dropout=self.dropout)

    def filled(self, tensors: list) -> tuple[list, Extras]:
        """With the first of these tensors in their places; and the rest of them."""
        bias, table, buckets, slopes, kept, *rest = tensors
        return rest, Extras(bias, table, buckets, slopes, self.bottom_right, kept, self.dropout)


NO_EXTRAS = Extras()
# Kernels count scores in units of log 2 and in fp32: what is -inf there is hidden.
LEAST_SCORE = -torch.finfo(torch.float32).max * 0.6931471805599453


MOST_KEYS = 4096
_KEYS: dict[tuple, object] = {}


class Prepared:
    """A lowered mask with what call after call needs of it.

    `key` is what plans depend on, one object for each. Of packed sequences it leaves out how many there are, and of their
    greatest lengths what no tensor's layout depends on. `handles`: for kernels that take tensors as handles, those of the fields,
    by the function that makes one.
    """

    __slots__ = ("fields", "handles", "key", "packed", "tensors")

    def __init__(self, fields: LoweredMask) -> None:
        self.fields, self.packed = fields, fields.query_starts is not None
        self.tensors = fields.tensors
        kept = fields
        if self.packed:
            kept = fields._replace(max_queries=classed(fields.max_queries), max_keys=classed(fields.max_keys))
        layouts = tuple(_layout(x) if isinstance(x, Tensor) else x for x in kept)
        if len(_KEYS) >= MOST_KEYS:
            _KEYS.clear()
        self.key = _KEYS.setdefault(layouts, object())
        self.handles: dict = {}

    def __reduce__(self) -> tuple:
        """A copy has tensors, and so handles, of its own."""
        return Prepared, (self.fields,)


def _layout(x: Tensor) -> tuple:
    return x.stride(), tuple(size == 1 for size in x.shape), x.data_ptr() % 16 == 0, x.device


def classed(length: int | None) -> int:
    """The greatest length of packed sequences that shares its plans and its tiles."""
    assert length is not None
    return -(-length // CLASS) * CLASS


def batched(x: Tensor) -> Tensor:
    """Packed tokens, (T, H, D), as those of one sequence, (1, H, T, D); that itself as it is."""
    return x if x.dim() == 4 else x.transpose(0, 1)[None]


def three(matrix: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """q, k and v, (B, H, L, D) or (T, H, D), which lie side by side in a matrix (tokens, 3 H D): views."""
    row, D = matrix.stride(0), shape[-1]
    strides = (shape[2] * row, D, row, 1) if len(shape) == 4 else (row, D, 1)
    return matrix.as_strided((3, *shape), (row // 3, *strides), matrix.storage_offset()).unbind(0)


def side_by_side(*heads: Tensor) -> Tensor:
    """What `three` gives as one matrix: a copy."""
    return torch.stack([batched(x).transpose(1, 2) for x in heads], 2).flatten(0, 1).flatten(1)


def head_memory(x: Tensor) -> Tensor:
    """Memory for a result of x's shape: (B, H, L, D) in (B, L, H, D) memory, packed (T, H, D) in its own order."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    B, H, L, D = x.shape
    return x.new_empty(B, L, H, D).transpose(1, 2)


def packed_rows(starts: Tensor, length: int, rows: int) -> Tensor:
    """(B, length) int64: for each rank of a sequence its row among `rows` packed ones, `rows` beyond the sequence's end."""
    begin, end = starts[:-1, None].clamp(0, rows), starts[1:, None].clamp(max=rows)
    row = begin.long() + torch.arange(length, device=starts.device)
    return torch.where(row < end, row, rows)


def pack_bits(pairs: Tensor) -> Tensor:
    """Bool (..., N) as int32 (..., ceil(N / 32)); for N = 1, which stands for every key, all bits of the word are equal."""
    if pairs.shape[-1] <= 1:
        return -pairs.to(torch.int32)
    words = -(-pairs.shape[-1] // 32)
    bits = F.pad(pairs, (0, words * 32 - pairs.shape[-1])).unflatten(-1, (words * 4, 8)).view(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=pairs.device)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int32)


def tile_status(
    mask: LoweredMask,
    M: int,
    N: int,
    device: torch.device | None,
    pairs: Tensor | None = None,
    rows: int = TILE,
    keys: int = TILE,
) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile of rows x keys: int8 (B or 1, H or 1, ceil(M / rows), ceil(N / keys)).

    `pairs` is what `mask.bits` were packed from, or None. EMPTY where the bounds together, or one other part of the mask, hide
    every pair; documents are told apart by the least and the greatest id in a tile.
    """
    m0 = torch.arange(0, M, rows, device=device)[:, None]
    n0 = torch.arange(0, N, keys, device=device)
    m1, n1 = (m0 + rows - 1).clamp(max=M - 1), (n0 + keys - 1).clamp(max=N - 1)
    begin = torch.zeros_like(m0[:1, :1]) if mask.key_begin is None else _per_sequence(mask.key_begin)
    end = begin.new_full((1, 1), N) if mask.key_end is None else _per_sequence(mask.key_end).clamp(max=N)
    queries = begin.new_full((1, 1), M) if mask.query_end is None else _per_sequence(mask.query_end).clamp(max=M)
    last = torch.minimum(m1, queries - 1)
    first_key, last_key = torch.maximum(n0, begin), torch.minimum(n1, end - 1)
    some = (first_key <= last_key) & (m0 <= last)
    every = (begin <= n0) & (n1 < end) & (m1 < queries)
    if mask.low is not None:
        some = some & (last_key - m0 >= mask.low)
        every = every & (n0 - m1 >= mask.low)
    if mask.high is not None:
        some = some & (first_key - last <= mask.high)
        every = every & (n1 - m0 <= mask.high)
    if mask.prefix is not None and mask.prefix_high is not None:
        prefix = _per_sequence(mask.prefix)
        some = some & ((first_key < prefix) | (first_key - last <= mask.prefix_high))
        every = every & ((n1 < prefix) | (n1 - m0 <= mask.prefix_high))
    if mask.keys is not None:
        some = some & _any_in_tiles(mask.keys[:, None, None], rows, keys)
        every = every & ~_any_in_tiles(~mask.keys[:, None, None], rows, keys)
    if mask.ids is not None and mask.key_ids is not None:
        (least, live, most), (least_key, live_key, most_key) = _extremes(mask.ids, rows), _extremes(mask.key_ids, keys)
        some = some & (live.mT <= most_key) & (live_key <= most.mT)
        every = every & (least.mT == most_key) & (least_key == most.mT) & (least_key == most_key)
    if pairs is not None:
        some = some & _any_in_tiles(pairs, rows, keys)
        every = every & ~_any_in_tiles(~pairs, rows, keys)
    status = some.to(torch.int8) + (some & every).to(torch.int8)
    return status if status.dim() == 4 else status[None, None]


def tile_lists(status: Tensor) -> Tensor:
    """For each row of tiles (..., T): the number of partial and of full tiles, then their indices: int32 (..., 2 + T).

    Indices ascend, first those of partial tiles, then those of full ones; what follows is not to be read.
    """
    kind = torch.where(status == PARTIAL, 0, torch.where(status == FULL, 1, 2))
    counts = torch.stack([(kind == 0).sum(-1), (kind == 1).sum(-1)], -1)
    return torch.cat([counts, kind.argsort(dim=-1, stable=True)], -1).to(torch.int32)


def _per_sequence(x: Tensor) -> Tensor:
    """(B,) beside (B, H, M, N)."""
    return x[:, None, None, None].long()


def _any_in_tiles(pairs: Tensor, rows: int, keys: int) -> Tensor:
    """Whether a tile of a (..., M or 1, N or 1) bool tensor holds True: (..., ceil(M / rows) or 1, ceil(N / keys) or 1)."""
    for dim, size in ((-2, rows), (-1, keys)):
        length = pairs.shape[dim]
        if length == 1:
            continue
        tiles = -(-length // size)
        padding = (0, tiles * size - length) if dim == -1 else (0, 0, 0, tiles * size - length)
        pairs = F.pad(pairs, padding).unflatten(dim, (tiles, size)).any(dim)
    return pairs


def _extremes(ids: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each `size` ids of (B, L) the least, the least that is not negative, and the greatest: (B, 1, 1, ceil(L / size))."""
    tiles = -(-ids.shape[1] // size)
    if tiles:  # the last tile is filled up with its last id
        ids = ids[:, torch.arange(tiles * size, device=ids.device).clamp(max=ids.shape[1] - 1)]
    ids = ids.reshape(ids.shape[0], 1, 1, tiles, size)
    live = torch.where(ids < 0, torch.iinfo(torch.int32).max, ids)
    return ids.amin(-1), live.amin(-1), ids.amax(-1)
