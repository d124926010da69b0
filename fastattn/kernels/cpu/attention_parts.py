"""Which calls of the fused kernel serve a mask: blocks of queries, each with just the keys that one of them may see.

A set of keys is a Python integer with bit j for key j, so unions and sizes cost next to nothing beside a call. Queries are taken
32 at a time; neighbours share a call where the pairs that this adds cost less than a call. Documents are laid end to end, and
queries with bits are ordered by their bits if that saves pairs: in an image the tokens of one column then lie together.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastattn.lowering import LoweredMask, pack_bits

ATOM = 32  # queries, the queries that the kernel takes at a time
MOST_PAIRS = 2**16  # of a block with a tensor for its mask, if it has more than one atom: what bounds memory
# Hidden multiply-adds of q k^T from which a call of its own for a sequence, about 0.1 ms with its copies, is the cheaper way;
# half precision computes faster. Measured on two cores with AVX-512. A call for a block of rows costs half of it.
HIDDEN_WORK = {torch.float64: 2**22, torch.float32: 2**23, torch.bfloat16: 2**24, torch.float16: 2**24}
_kept = WeakTensorKeyDictionary()  # a mask's lists of tiles, which its Mask keeps alive -> request -> parts


class Block(NamedTuple):
    """One call: queries `rows` and the keys of `runs`, both counted among those of the part."""

    rows: slice
    runs: tuple[slice, ...]
    full: bool  # no pair is hidden
    words: Tensor | None = None  # what `pack_bits` makes of the visible pairs, if it is kept
    dead: Tensor | None = None  # with words, see `dead_rows`


class Part(NamedTuple):
    """Sequences that share their calls, with the queries and keys that are alive in them."""

    batch: slice
    queries: slice | Tensor  # an index orders them
    keys: slice | Tensor
    blocks: list[Block]
    mask: LoweredMask  # what hides pairs inside a block, its tensors those of `batch`
    causal: bool = False  # the one block is the kernel's own causal triangle

    def whole(self, B: int, M: int, N: int) -> bool:
        """Whether one call takes q, k and v as they are."""
        everything = self.batch, self.queries, self.keys
        if isinstance(self.queries, Tensor) or isinstance(self.keys, Tensor) or len(self.blocks) != 1:
            return False
        (block,) = self.blocks
        return everything == (slice(0, B), slice(0, M), slice(0, N)) and (block.rows, *block.runs) == everything[1:]

    def shape(self, block: Block) -> tuple:
        """What the visible pairs of a block depend on."""
        distance_alone = self.mask.prefix is self.mask.keys is self.mask.ids is self.mask.bits is None
        if not distance_alone or isinstance(self.keys, Tensor) or len(block.runs) > 1:
            return (block.rows.start,)
        return (
            block.runs[0].start - block.rows.start,
            block.rows.stop - block.rows.start,
            block.runs[0].stop - block.runs[0].start,
        )

    def visible(self, block: Block) -> Tensor:
        """bool (sequences or 1, heads or 1, rows, keys); one row where dead keys alone are hidden, in every row alike."""
        i = _positions(self.queries, block.rows)
        i = i[:1] if _keys_alone(self.mask) else i
        j = torch.cat([_positions(self.keys, run) for run in block.runs])
        return self.mask.pairs(i, j)


class Limits(NamedTuple):
    """The bounds of sequences that share their calls: the keys that any of them, and that all of them, leave a query."""

    low: int | None
    high: int | None
    prefix_high: int | None
    least_prefix: int
    greatest_prefix: int
    begin: int
    end: int

    def keys(self, first: int, last: int, prefix: int) -> int:
        """The set that a query at `first` may see from its low bound on, and one at `last` up to its high bound."""
        begin = self.begin if self.low is None else max(self.begin, first + self.low)
        end = self.end
        if self.high is not None:
            end = min(end, last + self.high + 1)
        if self.prefix_high is not None:
            end = min(end, max(prefix, last + self.prefix_high + 1))
        return _run(begin, end)

    def some(self, first: int, last: int) -> int:
        return self.keys(first, last, self.greatest_prefix)

    def every(self, first: int, last: int) -> int:
        return self.keys(last, first, self.least_prefix)


class Atom(NamedTuple):
    """Queries start .. stop - 1 of a part's order: the keys that some of them see, and those that all of them see."""

    start: int
    stop: int
    some: int
    every: int

    @property
    def pairs(self) -> int:
        return (self.stop - self.start) * self.some.bit_count()

    def joined(self, other: Atom) -> Atom:
        return Atom(self.start, other.stop, self.some | other.some, self.every & other.every)


def parts(mask: LoweredMask, q: Tensor, N: int, live: Tensor | None = None) -> list[Part]:
    """The calls to make; queries that see nothing are in none.

    With `live`, bool (B, 1, 1, N), all sequences share their calls: dead keys have been made 0, and are hidden by it alone.
    """
    if mask.key_tiles is None:
        return _parts(mask, q, N, live)
    request = (*q.shape, N, q.dtype, live is None)
    found = _kept.setdefault(mask.key_tiles, {})
    if request not in found:
        found.clear()  # one mask meets one request again and again
        found[request] = [_packed(part, N) for part in _parts(mask, q, N, live)]
    return found[request]


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


def _parts(mask: LoweredMask, q: Tensor, N: int, live: Tensor | None) -> list[Part]:
    B, H, M, D = q.shape
    together = [(slice(0, B), M, slice(0, N))]
    if live is not None:
        mask = mask._replace(key_begin=None, key_end=None, keys=live[:, 0, 0])
        if _keys_alone(mask):
            block = Block(slice(0, M), (slice(0, N),), False)
            return [Part(slice(0, B), slice(0, M), slice(0, N), [block], mask)]
        return _cheapest([together], mask, H * D, q.dtype, N)
    groupings = [_each_sequence(mask, B, M, N)]
    whole = mask.keys is mask.ids is mask.key_begin is mask.key_end is mask.query_end is None
    if whole and mask.bits is not None and mask.bits.shape[0] > 1:
        groupings.append(together)
    mask = mask._replace(key_begin=None, key_end=None, query_end=None, keys=None)
    return _cheapest(groupings, mask, H * D, q.dtype, N)


def _cheapest(groupings: list, mask: LoweredMask, width: int, dtype: torch.dtype, N: int) -> list[Part]:
    best: list[Part] = []
    least = float("inf")
    for grouping in groupings:
        found = []
        total = 0
        for batch, queries, keys in grouping:
            part, cost = _part(_of_batch(mask, batch), batch, queries, keys, width, dtype, N)
            found += [] if part is None else [part]
            total += cost
        if total < least:
            best, least = found, total
    return best


def _part(mask: LoweredMask, batch: slice, queries: int, keys: slice | Tensor, width: int, dtype: torch.dtype, N: int):
    """The part of some sequences, None where nothing is visible, and what it costs in multiply-adds of q k^T."""
    work, call = (batch.stop - batch.start) * width, HIDDEN_WORK[dtype] // 2
    if mask.low is mask.prefix is mask.keys is mask.ids is mask.bits is None and isinstance(keys, slice):
        causal = mask.high is not None and mask.high == keys.start
        if causal or mask.high is None or mask.high >= keys.stop - 1:
            block = Block(slice(0, queries), (slice(0, keys.stop - keys.start),), True)
            return Part(batch, slice(0, queries), keys, [block], mask, causal), work * queries * (keys.stop - keys.start)
    atoms, order, cost = _ordered(mask, queries, keys, work, call, N)
    if not atoms:
        return None, 0
    gathered = keys
    if isinstance(keys, Tensor) or sum(_count_runs(atom.some) for atom in atoms) > 2 * len(atoms):
        gathered = torch.from_numpy(_by_blocks(atoms, N))
    column = gathered if isinstance(gathered, slice) else gathered.numpy()
    blocks = [
        Block(
            slice(atom.start, atom.stop),
            _runs(_flags(atom.some, N)[column]),
            atom.some == atom.every and mask.keys is None,
        )
        for atom in atoms
    ]
    return Part(batch, slice(0, queries) if order is None else torch.from_numpy(order), gathered, blocks, mask), cost


def _ordered(mask: LoweredMask, queries: int, keys: slice | Tensor, work: int, call: int, N: int):
    """The atoms of the blocks, the order of the queries (None: as they are), and the cost."""
    prefix = (0, 0) if mask.prefix is None else (int(mask.prefix.min()), int(mask.prefix.max()))
    begin, end = (keys.start, keys.stop) if isinstance(keys, slice) else (0, N)
    limits = Limits(mask.low, mask.high, mask.prefix_high, *prefix, begin, end)
    orders: list[np.ndarray | None] = [None]
    if mask.ids is not None:
        ids = mask.ids[0, :queries].numpy()
        order = ids.argsort(kind="stable")[np.count_nonzero(ids < 0) :]
        orders = [None if len(order) == queries and not (np.diff(order) < 0).any() else order]
    elif mask.bits is not None and mask.bits.shape[0] == mask.bits.shape[1] == 1 < mask.bits.shape[2]:
        orders.append(_by_bits(mask.bits[0, 0, :queries].numpy()))
    best: list[Atom] = []
    chosen, least = None, float("inf")
    for order in orders:
        atoms = _joined(mask, _atoms(mask, limits, order, queries, _set_of(keys, N), N), work, call)
        cost = sum(atom.pairs * work + call for atom in atoms)
        if cost < least:
            best, chosen, least = atoms, order, cost
    return best, chosen, least


def _keys_alone(mask: LoweredMask) -> bool:
    return mask.keys is not None and mask.low is mask.high is mask.prefix is mask.ids is mask.bits is None


def _bits_alone(part: Part, block: Block, N: int) -> bool:
    """Whether the mask's own words are those of the block: its one block, of queries from the first on and of all keys."""
    mask, start = part.mask, slice(0, block.rows.stop)
    others = mask.low, mask.high, mask.prefix, mask.keys, mask.ids
    if (
        any(x is not None for x in others)
        or isinstance(part.queries, Tensor)
        or isinstance(part.keys, Tensor)
        or part.queries != start
        or block.rows != start
    ):
        return False
    return part.keys == slice(0, N) and block.runs == (part.keys,) and mask.bits.shape[2:] == (start.stop, -(-N // 32))


def _each_sequence(mask: LoweredMask, B: int, M: int, N: int) -> list[tuple[slice, int, slice | Tensor]]:
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


def _of_batch(mask: LoweredMask, batch: slice) -> LoweredMask:
    return LoweredMask(*(x[batch] if isinstance(x, Tensor) and x.shape[0] > 1 else x for x in mask))


def _atoms(mask: LoweredMask, limits: Limits, order: np.ndarray | None, queries: int, alive: int, N: int) -> list[Atom]:
    """Each ATOM queries of the order, or what is left of them in one document, with their keys."""
    count = queries if order is None else len(order)
    cuts = set(range(0, count, ATOM))
    if mask.ids is not None:
        ids = mask.ids[0, :queries].numpy()
        ids = ids if order is None else ids[order]
        cuts |= set((np.flatnonzero(np.diff(ids)) + 1).tolist())
        documents = {int(i): _set_from(mask.key_ids[0].numpy() == i) for i in np.unique(ids)}
    if mask.bits is not None:
        some_bits, every_bits = (_reduced(mask.bits, reduce, order, queries, N) for reduce in (np.bitwise_or, np.bitwise_and))
    found = []
    starts = sorted(cuts)
    for start, stop in itertools.pairwise([*starts, count]):
        first, last = (start, stop - 1) if order is None else (int(order[start:stop].min()), int(order[start:stop].max()))
        some, every = limits.some(first, last) & alive, limits.every(first, last) & alive
        if mask.ids is not None:
            some, every = some & documents[int(ids[start])], every & documents[int(ids[start])]
        if mask.bits is not None:
            some &= _set_of_words(np.bitwise_or.reduce(some_bits[start:stop]))
            every &= _set_of_words(np.bitwise_and.reduce(every_bits[start:stop]))
        if mask.keys is not None and not _keys_alone(mask):
            every = 0  # a tensor for the dead keys of each sequence is needed everywhere
        if some:
            found.append(Atom(start, stop, some, every))
    return found


def _joined(mask: LoweredMask, atoms: list[Atom], work: int, call: int) -> list[Atom]:
    """Neighbours in one, where the pairs that this adds cost less than a call."""
    found: list[Atom] = []
    for atom in atoms:
        if found and found[-1].stop == atom.start:
            both = found[-1].joined(atom)
            small = both.some == both.every or _keys_alone(mask) or both.pairs <= MOST_PAIRS
            if small and (both.pairs - found[-1].pairs - atom.pairs) * work < call:
                found[-1] = both
                continue
        found.append(atom)
    return found


def _by_bits(words: np.ndarray) -> np.ndarray:
    """The order of queries (rows, words) by the keys that they see, the first key first."""
    reversed_byte = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little")[:, 0]
    return np.lexsort(reversed_byte[np.ascontiguousarray(words).view(np.uint8)].T[::-1])


def _by_blocks(atoms: list[Atom], N: int) -> np.ndarray:
    """The keys that some block sees, in an order in which those that the same blocks see lie together."""
    seen = np.stack([_flags(atom.some, N) for atom in atoms])
    order = np.lexsort(~seen[::-1])
    return order[seen.any(0)[order]]


def _reduced(bits: Tensor, reduce: np.ufunc, order: np.ndarray | None, queries: int, N: int) -> np.ndarray:
    """The words (queries, words) of all sequences and heads in one, in the order."""
    words = reduce.reduce(bits.flatten(0, 1).numpy(), axis=0)
    rows = queries if words.shape[0] == 1 else words.shape[0]
    words = np.broadcast_to(words, (rows, -(-N // 32)))[:queries]
    return words if order is None else words[order]


def _positions(where: slice | Tensor, part: slice) -> Tensor:
    """Where in the sequence the queries or keys `part` are."""
    if isinstance(where, slice):
        return torch.arange(where.start + part.start, where.start + part.stop)
    return where[part]


def _run(begin: int, end: int) -> int:
    return ((1 << (end - begin)) - 1) << begin if begin < end else 0


def _set_from(flags: np.ndarray) -> int:
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _set_of(keys: slice | Tensor, N: int) -> int:
    if isinstance(keys, slice):
        return _run(keys.start, keys.stop)
    flags = np.zeros(N, bool)
    flags[keys.numpy()] = True
    return _set_from(flags)


def _set_of_words(words: np.ndarray) -> int:
    return int.from_bytes(words.tobytes(), "little")


def _flags(keys: int, N: int) -> np.ndarray:
    """The set as a bool for each key."""
    packed = np.frombuffer(keys.to_bytes(-(-N // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=N, bitorder="little").view(bool)


def _count_runs(keys: int) -> int:
    return (keys & ~(keys << 1)).bit_count()


def _runs(flags: np.ndarray) -> tuple[slice, ...]:
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(slice(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True))
