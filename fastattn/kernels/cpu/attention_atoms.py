"""The blocks of queries in which the cpu backend serves a mask, as sets of queries and of the keys that they see.

A set is a Python integer with bit j for member j, so unions, sizes and shifts cost next to nothing beside a call. Queries are
taken 32 at a time; neighbours share a block where the pairs that this adds cost less than a call. Documents are laid end to end,
and queries with bits are ordered by their bits if that is cheaper: in an image the tokens of one column then lie together. Keys
that a long run of queries sees in common, like the text before an image, are one block, and what else each query sees is merged
with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastattn.lowering import LoweredMask

ATOM = 32  # queries, the queries that the kernel takes at a time
LEAST_ROWS = 8  # on average, of blocks that are cut where neighbours see no key in common
MOST_PAIRS = 2**16  # of a block with a tensor for its mask, if it has more than one atom: what bounds memory
# What a query's own row costs, in keys more that it would see: to be gathered and put back with its keys, and to have two results
# merged. The second as measured on two cores of an AMD EPYC in fp32; the first is a guess that favours views.
GATHERED, MERGED = 64, 48
MOST_KEYS = 512  # of blocks that share a call: the gradients of more leave the caches, and are slower than calls of their own


class Atom(NamedTuple):
    """Queries `rows`, the keys that some of them see, and those that all of them see."""

    rows: int
    some: int
    every: int

    @property
    def pairs(self) -> int:
        return self.rows.bit_count() * self.some.bit_count()

    def joined(self, other: Atom) -> Atom:
        return Atom(self.rows | other.rows, self.some | other.some, self.every & other.every)

    def shifts(self, last: Atom) -> tuple[int, int] | None:
        """How much further on than `last` the queries and keys are, if they are the same but for that."""
        by_rows, by_keys = _lowest(self.rows) - _lowest(last.rows), _lowest(self.some) - _lowest(last.some)
        if by_rows < 0 or by_keys < 0 or self.rows != last.rows << by_rows or self.some != last.some << by_keys:
            return None
        return by_rows, by_keys


class Price(NamedTuple):
    """What blocks cost, in multiply-adds of q k^T."""

    sequences: int
    width: int  # heads * head_dim
    call: int

    @property
    def pair(self) -> int:
        return self.sequences * self.width

    def __call__(self, atoms: list[Atom]) -> int:
        rows = sum(atom.rows.bit_count() for atom in atoms)
        regular = all(progression(places) for atom in atoms for places in (atom.rows, atom.some))
        pairs = sum(atom.pairs for atom in atoms) + (0 if regular else GATHERED * rows)
        return pairs * self.pair + self._calls(atoms) * self.call

    def _calls(self, atoms: list[Atom]) -> int:
        """Blocks that repeat share a call, one for each sequence, or one for each block if these are fewer."""
        lengths: list[int] = []
        shifts = None
        for last, atom in zip([None, *atoms], atoms, strict=False):
            before, shifts = shifts, None if last is None else atom.shifts(last)
            fits = lengths and (lengths[-1] + 1) * atom.some.bit_count() <= MOST_KEYS
            if fits and shifts is not None and (lengths[-1] == 1 or shifts == before):
                lengths[-1] += 1
            else:
                lengths.append(1)
        return sum(min(length, self.sequences) for length in lengths)


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
        return run(begin, end)

    def some(self, first: int, last: int) -> int:
        return self.keys(first, last, self.greatest_prefix)

    def every(self, first: int, last: int) -> int:
        return self.keys(last, first, self.least_prefix)


def layers(mask: LoweredMask, queries: int, keys: slice | Tensor, N: int, price: Price) -> tuple[list[list[Atom]], float]:
    """The blocks of the first `queries` queries and what they cost; queries that see nothing are in none.

    A second list holds blocks of queries that are in the first too, with their other keys.
    """
    prefix = (0, 0) if mask.prefix is None else (int(mask.prefix.min()), int(mask.prefix.max()))
    begin, end = (keys.start, keys.stop) if isinstance(keys, slice) else (0, N)
    limits = Limits(mask.low, mask.high, mask.prefix_high, *prefix, begin, end)
    alive = run(begin, end) if isinstance(keys, slice) else set_of(keys.numpy())
    atoms, cost = _cheapest(mask, limits, range(queries), alive, N, price)
    if mask.bits is None:
        return [atoms], cost
    natural = _atoms(mask, limits, range(queries), alive, N)
    common = _common(natural)
    if common is None:
        return [atoms], cost
    others = [atom for atom in natural if not atom.rows & common.rows]
    first = _joined(_sorted([*others, common]), price)
    rows = range(_lowest(common.rows), common.rows.bit_length())
    taken = next(atom.some for atom in first if atom.rows & common.rows)  # more than the common keys where others were joined
    second, more = _cheapest(mask, limits, rows, alive & ~taken, N, price)
    split = price(first) + more + len(rows) * MERGED * price.pair
    return ([first, second], split) if split < cost else ([atoms], cost)


def _cheapest(mask: LoweredMask, limits: Limits, queries: range, alive: int, N: int, price: Price) -> tuple[list[Atom], float]:
    """Of the orders of the queries, and of atoms joined and as they are, which may repeat."""
    orders: list[range | np.ndarray] = [queries]
    if mask.ids is not None:
        ids = mask.ids[0, queries.start : queries.stop].numpy()
        order = ids.argsort(kind="stable")[np.count_nonzero(ids < 0) :]
        if len(order) < len(queries) or (np.diff(order) < 0).any():
            orders = [order + queries.start]
    elif mask.bits is not None and mask.bits.shape[0] == mask.bits.shape[1] == 1 < mask.bits.shape[2]:
        words = mask.bits[0, 0, queries.start : queries.stop].numpy() & _words(alive, N)
        orders.append(_by_bits(words) + queries.start)
    best: list[Atom] = []
    least = float("inf")
    for order in orders:
        atoms = _atoms(mask, limits, order, alive, N)
        for found in (_joined(atoms, price), atoms):
            found = _sorted(found)
            cost = price(found)
            if cost < least:
                best, least = found, cost
    return best, least


def _sorted(atoms: list[Atom]) -> list[Atom]:
    return sorted(atoms, key=lambda atom: _lowest(atom.rows))


def _atoms(mask: LoweredMask, limits: Limits, order: range | np.ndarray, alive: int, N: int) -> list[Atom]:
    """The queries in the order, few at a time, and of one document, with their keys."""
    count = len(order)
    cuts = {0, count}
    if mask.ids is not None:
        ids = mask.ids[0].numpy()[_index(order)]
        cuts |= set((np.flatnonzero(np.diff(ids)) + 1).tolist())
        documents = {int(i): set_from(mask.key_ids[0].numpy() == i) for i in np.unique(ids)}
    if mask.bits is not None:
        live = _words(alive, N)
        some_bits, every_bits = (_reduced(mask.bits, reduce, order) & live for reduce in (np.bitwise_or, np.bitwise_and))
        strangers = np.flatnonzero(~(some_bits[1:] & some_bits[:-1]).any(1)) + 1  # no key is seen by both neighbours
        cuts |= set(strangers.tolist()) if len(strangers) * LEAST_ROWS < count else set()
    found = []
    for start, stop in _pieces(sorted(cuts)):
        rows = order[start:stop]
        first, last = (rows[0], rows[-1]) if isinstance(rows, range) else (int(rows.min()), int(rows.max()))
        some, every = limits.some(first, last) & alive, limits.every(first, last) & alive
        if mask.ids is not None:
            some, every = some & documents[int(ids[start])], every & documents[int(ids[start])]
        if mask.bits is not None:
            some &= _set_of_words(np.bitwise_or.reduce(some_bits[start:stop]))
            every &= _set_of_words(np.bitwise_and.reduce(every_bits[start:stop]))
        if mask.keys is not None:
            every = 0  # a tensor for the dead keys of each sequence is needed everywhere
        if some:
            found.append(Atom(run(first, last + 1) if isinstance(rows, range) else set_of(rows), some, every))
    return found


def _pieces(cuts: list[int]) -> Iterator[tuple[int, int]]:
    for begin, end in itertools.pairwise(cuts):
        inside = range(begin + ATOM, end, ATOM) if end - begin > 2 * ATOM else ()
        yield from itertools.pairwise([begin, *inside, end])


def _joined(atoms: list[Atom], price: Price) -> list[Atom]:
    """Neighbours in one, where the pairs that this adds cost less than a call; a gap stays between queries that have one."""
    found: list[Atom] = []
    for atom in atoms:
        if found and (_is_run(found[-1].rows | atom.rows) or not _is_run(found[-1].rows)):
            both = found[-1].joined(atom)
            small = both.some == both.every or both.pairs <= MOST_PAIRS
            if small and (both.pairs - found[-1].pairs - atom.pairs) * price.pair < price.call:
                found[-1] = both
                continue
        found.append(atom)
    return found


def _common(atoms: list[Atom]) -> Atom | None:
    """The run of neighbours, and the keys that all of them see, with the most pairs."""
    best, seen = None, {0}
    for n, (left, right) in enumerate(itertools.pairwise(atoms)):
        keys = left.every & right.every
        if keys in seen:
            continue
        seen.add(keys)
        begin, end = n, n + 2
        while begin > 0 and atoms[begin - 1].every & keys == keys:
            begin -= 1
        while end < len(atoms) and atoms[end].every & keys == keys:
            end += 1
        found = Atom(sum(atom.rows for atom in atoms[begin:end]), keys, keys)  # their rows are disjoint
        if _is_run(found.rows) and (best is None or found.pairs > best.pairs):
            best = found
    return best


def _by_bits(words: np.ndarray) -> np.ndarray:
    """The order of queries (rows, words) by the keys that they see, the first key first."""
    reversed_byte = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little")[:, 0]
    return np.lexsort(reversed_byte[np.ascontiguousarray(words).view(np.uint8)].T[::-1])


def _reduced(bits: Tensor, reduce: np.ufunc, order: range | np.ndarray) -> np.ndarray:
    """The words (queries, words) of all sequences and heads in one, in the order; one word may stand for all."""
    words = reduce.reduce(bits.flatten(0, 1).numpy(), axis=0)
    return np.broadcast_to(words, (len(order), words.shape[1])) if len(words) == 1 else words[_index(order)]


def _index(order: range | np.ndarray) -> slice | np.ndarray:
    return slice(order.start, order.stop) if isinstance(order, range) else order


def run(begin: int, end: int) -> int:
    """The set begin .. end - 1."""
    return ((1 << (end - begin)) - 1) << begin if begin < end else 0


def set_of(places: np.ndarray) -> int:
    flags = np.zeros(int(places.max()) + 1 if len(places) else 0, bool)
    flags[places] = True
    return set_from(flags)


def set_from(flags: np.ndarray) -> int:
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def members(places: int) -> np.ndarray:
    return np.flatnonzero(flags(places, places.bit_length()))


def flags(places: int, N: int) -> np.ndarray:
    """The set as a bool for each of N."""
    packed = np.frombuffer(places.to_bytes(-(-N // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=N, bitorder="little").view(bool)


def progression(places: int) -> range | None:
    """The set, if its members are at equal steps."""
    start, stop, count = _lowest(places), places.bit_length(), places.bit_count()
    if stop - start == count:
        return range(start, stop)
    step = (stop - 1 - start) // (count - 1)
    regular = start + step * (count - 1) == stop - 1 and (np.diff(members(places)) == step).all()
    return range(start, stop, step) if regular else None


def _set_of_words(words: np.ndarray) -> int:
    return int.from_bytes(words.tobytes(), "little")


def _words(places: int, N: int) -> np.ndarray:
    """The set in words of 32 bits, as `pack_bits` has them."""
    return np.frombuffer(places.to_bytes(4 * -(-N // 32), "little"), np.int32)


def _lowest(places: int) -> int:
    return (places & -places).bit_length() - 1


def _is_run(places: int) -> bool:
    return places.bit_length() - _lowest(places) == places.bit_count()
