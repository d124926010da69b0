"""Which calls of the fused kernel serve a mask: blocks of queries, each with just the keys that one of them may see.

`attention_atoms` finds the blocks as sets; here they become ranges of q, k and v. A set at equal steps is a view, any other is
gathered, once for all blocks. Blocks that repeat at equal distances, like the columns of an image, become one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastattn.kernels.cpu.attention_atoms import MOST_KEYS, Atom, Price, flags, layers, members, progression, set_from
from fastattn.lowering import LoweredMask, pack_bits

# Hidden multiply-adds of q k^T from which a call of its own for a sequence, about 0.1 ms with its copies, is the cheaper way;
# half precision computes faster. Measured on two cores with AVX-512. A call for a block of rows costs half of it.
HIDDEN_WORK = {torch.float64: 2**22, torch.float32: 2**23, torch.bfloat16: 2**24, torch.float16: 2**24}
_kept = WeakTensorKeyDictionary()  # a mask's lists of tiles, which its Mask keeps alive -> request -> parts


class Block(NamedTuple):
    """Queries `rows` and the keys of `runs`, both counted among those of the part; `count` times, each time further on."""

    rows: range
    runs: tuple[range, ...]
    full: bool  # no pair is hidden
    words: Tensor | None = None  # what `pack_bits` makes of the visible pairs, if it is kept
    dead: Tensor | None = None  # with words, see `dead_rows`
    count: int = 1  # more than 1 only with one run
    row_shift: int = 0
    key_shift: int = 0

    @property
    def keys(self) -> int:
        return sum(len(run) for run in self.runs)

    @property
    def keys_apart(self) -> bool:
        """Whether no key is there in two of the times."""
        (run,) = self.runs
        return self.count == 1 or self.key_shift >= len(run) * run.step or run.step >= self.count * self.key_shift > 0

    def and_again(self, other: Block) -> Block | None:
        """With `other` as one time more, if its ranges allow it."""
        if len(self.runs) > 1 or len(other.runs) > 1 or (self.count + 1) * self.keys > MOST_KEYS:
            return None
        lengths_and_steps = (len(self.rows), self.rows.step, len(self.runs[0]), self.runs[0].step)
        if lengths_and_steps != (len(other.rows), other.rows.step, len(other.runs[0]), other.runs[0].step):
            return None
        row_shift = other.rows.start - self.rows.start - (self.count - 1) * self.row_shift
        key_shift = other.runs[0].start - self.runs[0].start - (self.count - 1) * self.key_shift
        if row_shift < 0 or key_shift < 0 or (self.count > 1 and (row_shift, key_shift) != (self.row_shift, self.key_shift)):
            return None
        return self._replace(count=self.count + 1, row_shift=row_shift, key_shift=key_shift)


class Part(NamedTuple):
    """Sequences that share their calls, with the queries and keys that are alive in them."""

    batch: slice
    queries: slice | Tensor  # an index orders them
    keys: slice | Tensor
    blocks: list[Block]
    mask: LoweredMask  # what hides pairs inside a block, its tensors those of `batch`
    causal: bool = False  # the one block is the kernel's own causal triangle
    merged: bool = False  # an earlier part has the same queries with other keys

    def whole(self, B: int, M: int, N: int) -> bool:
        """Whether one call takes q, k and v as they are."""
        if isinstance(self.queries, Tensor) or isinstance(self.keys, Tensor) or len(self.blocks) != 1:
            return False
        (block,) = self.blocks
        everything = (self.batch, self.queries, self.keys) == (slice(0, B), slice(0, M), slice(0, N))
        return everything and block.count == 1 and (block.rows, *block.runs) == (range(M), range(N))

    def shape(self, block: Block) -> tuple:
        """What the visible pairs of a block depend on."""
        distance_alone = self.mask.prefix is self.mask.keys is self.mask.ids is self.mask.bits is None
        if not distance_alone or isinstance(self.queries, Tensor) or isinstance(self.keys, Tensor) or len(block.runs) > 1:
            return (block.rows.start,)
        return block.runs[0].start - block.rows.start, len(block.rows), len(block.runs[0])

    def visible(self, block: Block) -> Tensor:
        """bool (sequences or 1, heads or 1, rows, keys)."""
        i = _positions(self.queries, block.rows)
        j = torch.cat([_positions(self.keys, run) for run in block.runs])
        return self.mask.pairs(i, j)

    def repeating(self) -> Part:
        """With neighbours that hide the same pairs in one block where their ranges allow it."""
        blocks: list[Block] = []
        for block in self.blocks:
            both = blocks[-1].and_again(block) if blocks and self._alike(blocks[-1], block) else None
            if both is None:
                blocks.append(block)
            else:
                blocks[-1] = both
        return self._replace(blocks=blocks)

    def _alike(self, one: Block, other: Block) -> bool:
        if one.full or other.full:
            return one.full and other.full
        if one.words is None or other.words is None:
            return self.shape(one) == self.shape(other)
        return one.words.shape[0] == 1 and torch.equal(one.words, other.words)


def parts(mask: LoweredMask, q: Tensor, N: int, live: Tensor | None = None) -> list[Part]:
    """The calls to make; queries that see nothing are in none.

    With `live`, bool (B, 1, 1, N), all sequences share their calls: dead keys have been made 0, and are hidden by it alone.
    """
    if mask.key_tiles is None:
        if live is None and not any(isinstance(x, Tensor) for x in mask):
            return _of_bounds(mask, q.shape, q.dtype, N)
        return _parts(mask, q.shape, q.dtype, N, live)
    request = (*q.shape, N, q.dtype, live is None)
    found = _kept.setdefault(mask.key_tiles, {})
    if request not in found:
        found.clear()  # one mask meets one request again and again
        found[request] = [_packed(part, N).repeating() for part in _parts(mask, q.shape, q.dtype, N, live)]
    return found[request]


@functools.lru_cache(maxsize=64)
def _of_bounds(mask: LoweredMask, shape: torch.Size, dtype: torch.dtype, N: int) -> list[Part]:
    return [part.repeating() for part in _parts(mask, shape, dtype, N, None)]


def unpacked(words: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """The tensor to add to scores that `pack_bits` made words from: 0, and -inf where a pair is hidden; (..., keys)."""
    bits = _eight(dtype).index_select(0, words.view(torch.uint8).flatten().int())
    return bits.view(*words.shape[:-1], words.shape[-1] * 32)[..., :keys]


@functools.cache
def _eight(dtype: torch.dtype) -> Tensor:
    """(256, 8): what a byte of eight pairs adds to their scores."""
    with torch.inference_mode(False):
        shown = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return torch.zeros(256, 8, dtype=dtype).masked_fill_(shown == 0, -float("inf"))


def _packed(part: Part, N: int) -> Part:
    """With the visible pairs of every partial block kept, one bit each."""
    bits = part.mask.bits
    blocks = []
    for block in part.blocks:
        if not block.full and bits is not None and _bits_alone(part, block, N):
            block = block._replace(words=bits, dead=dead_rows(bits != 0))
        elif not block.full:
            visible = part.visible(block)
            block = block._replace(words=pack_bits(F.pad(visible, (0, -visible.shape[3] % 32))), dead=dead_rows(visible))
        blocks.append(block)
    return part._replace(blocks=blocks, mask=LoweredMask())  # which holds the key of `_kept`


def dead_rows(visible: Tensor) -> Tensor | None:
    """bool (sequences or 1, heads or 1, rows): the rows of a block that see nothing; None if all see something."""
    dead = ~visible.any(-1)
    return dead if dead.any() else None


def _parts(mask: LoweredMask, shape: torch.Size, dtype: torch.dtype, N: int, live: Tensor | None) -> list[Part]:
    B, H, M, D = shape
    together = [(slice(0, B), M, slice(0, N))]
    if live is not None:
        mask = mask._replace(key_begin=None, key_end=None, keys=live[:, 0, 0])
        return _cheapest([together], mask, H * D, dtype, N)
    groupings = [each_sequence(mask, B, M, N)]
    whole = mask.keys is mask.ids is mask.key_begin is mask.key_end is mask.query_end is None
    if whole and mask.bits is not None and mask.bits.shape[0] > 1:
        groupings.append(together)
    mask = mask._replace(key_begin=None, key_end=None, query_end=None, keys=None)
    return _cheapest(groupings, mask, H * D, dtype, N)


def _cheapest(groupings: list, mask: LoweredMask, width: int, dtype: torch.dtype, N: int) -> list[Part]:
    best: list[Part] = []
    least = float("inf")
    for grouping in groupings:
        found: list[Part] = []
        total = 0.0
        for batch, queries, keys in grouping:
            some, cost = _some_parts(of_batch(mask, batch), batch, queries, keys, width, dtype, N)
            found += some
            total += cost
        if total < least:
            best, least = found, total
    return best


def _some_parts(
    mask: LoweredMask, batch: slice, queries: int, keys: slice | Tensor, width: int, dtype: torch.dtype, N: int
) -> tuple[list[Part], float]:
    """The parts of some sequences, none where nothing is visible, and what they cost in multiply-adds of q k^T."""
    price = Price(batch.stop - batch.start, width, HIDDEN_WORK[dtype] // 2)
    if mask.low is mask.prefix is mask.keys is mask.ids is mask.bits is None and isinstance(keys, slice):
        causal = mask.high is not None and mask.high == keys.start
        if causal or mask.high is None or mask.high >= keys.stop - 1:
            length = keys.stop - keys.start
            block = Block(range(queries), (range(length),), True)
            return [Part(batch, slice(0, queries), keys, [block], mask, causal)], price.pair * queries * length
    found, cost = layers(mask, queries, keys, N, price)
    made = [_part(mask, batch, queries, keys, atoms, N) for atoms in found if atoms]
    return [part._replace(merged=n > 0) for n, part in enumerate(made)], cost


def _part(mask: LoweredMask, batch: slice, queries: int, keys: slice | Tensor, atoms: list[Atom], N: int) -> Part:
    rows = [progression(atom.rows) for atom in atoms]
    order: slice | Tensor = slice(0, queries)
    if None in rows:
        places = [members(atom.rows) for atom in atoms]
        order = torch.from_numpy(np.concatenate(places))
        ends = np.cumsum([len(x) for x in places]).tolist()
        rows = [range(end - len(x), end) for x, end in zip(places, ends, strict=True)]
    if isinstance(keys, slice):
        runs = [_ranges(atom.some >> keys.start) for atom in atoms]
    if isinstance(keys, Tensor) or sum(len(ranges) for ranges in runs) > 2 * len(atoms):
        gathered = _by_blocks(atoms, N)
        runs = [_ranges(set_from(flags(atom.some, N)[gathered])) for atom in atoms]
        keys = torch.from_numpy(gathered)
    full = [atom.some == atom.every and mask.keys is None for atom in atoms]
    return Part(batch, order, keys, [Block(*fields) for fields in zip(rows, runs, full, strict=True)], mask)


def _bits_alone(part: Part, block: Block, N: int) -> bool:
    """Whether the mask's own words are those of the block: its one block, of queries from the first on and of all keys."""
    mask = part.mask
    if isinstance(part.queries, Tensor) or isinstance(part.keys, Tensor):
        return False
    if any(x is not None for x in (mask.low, mask.high, mask.prefix, mask.keys, mask.ids)):
        return False
    all_keys = part.keys == slice(0, N) and block.runs == (range(N),)
    return all_keys and block.rows == range(part.queries.stop) and mask.bits.shape[2:] == (len(block.rows), -(-N // 32))


def each_sequence(mask: LoweredMask, B: int, M: int, N: int) -> list[tuple[slice, int, slice | Tensor]]:
    """Sequences with their number of queries and their live keys. Those with no pair are left out, equal neighbours share."""
    none = [None] * B
    begins = [0] * B if mask.key_begin is None else mask.key_begin.tolist()
    ends = [N] * B if mask.key_end is None else mask.key_end.clamp(max=N).tolist()
    queries = [M] * B if mask.query_end is None else mask.query_end.clamp(max=M).tolist()
    prefixes = none if mask.prefix is None else mask.prefix.tolist()
    alone = mask.keys is not None or mask.ids is not None or (mask.bits is not None and mask.bits.shape[0] > 1)
    found: list[tuple[slice, int, slice | Tensor]] = []
    last = None
    for b in range(B):
        begin, end, index = begins[b], ends[b], None
        if begin >= end or not queries[b]:
            last = None
            continue
        if mask.keys is not None:
            live = mask.keys[b, begin:end].nonzero()[:, 0]
            index = live + begin if live.numel() < end - begin else None
            if index is not None and not index.numel():
                continue
        bounds = (queries[b], begin, end, prefixes[b])
        if not alone and bounds == last:
            found[-1] = (slice(found[-1][0].start, b + 1), *found[-1][1:])
        else:
            found.append((slice(b, b + 1), queries[b], slice(begin, end) if index is None else index))
        last = bounds
    return found


def of_batch(mask: LoweredMask, batch: slice) -> LoweredMask:
    return LoweredMask(*(x[batch] if isinstance(x, Tensor) and x.shape[0] > 1 else x for x in mask))


def _by_blocks(atoms: list[Atom], N: int) -> np.ndarray:
    """The keys that some block sees, in an order in which those that the same blocks see lie together."""
    seen = np.stack([flags(atom.some, N) for atom in atoms])
    order = np.lexsort(~seen[::-1])
    return order[seen.any(0)[order]]


def _positions(where: slice | Tensor, some: range) -> Tensor:
    """Where in the sequence the queries or keys `some` of a part are."""
    if isinstance(where, slice):
        return torch.arange(where.start + some.start, where.start + some.stop, some.step)
    return where[some.start : some.stop : some.step]


def _ranges(places: int) -> tuple[range, ...]:
    """The set as one range at equal steps, or as runs."""
    if (one := progression(places)) is not None:
        return (one,)
    edges = np.flatnonzero(np.diff(flags(places, places.bit_length()).astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(range(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True))
