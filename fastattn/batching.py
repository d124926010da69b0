"""Batches for many sequences of unequal length: alike in length, within a budget of tokens; results in the order of the input.

    embeddings = map_in_batches(embed, token_ids, [len(ids) for ids in token_ids], max_tokens=8192)

Where padding is not computed (`accelerate`, `varlen_attention`) a batch costs its real tokens, so the budget counts those.
Sequences are taken by length all the same: what is padded on the way, token ids and last states, then holds little padding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

Item = TypeVar("Item")


def token_batches(lengths: Sequence[int] | Tensor, max_tokens: int, max_sequences: int | None = None) -> list[list[int]]:
    """Indices of the sequences of each batch, the longest sequence first, equal ones in the order given.

    The longest come first so that a budget that memory cannot hold fails at once, and a progress bar does not promise too much.
    Equal arguments give equal batches, and no batch could have taken the first sequence of the next.

    Args:
        lengths: (sequences,) real tokens of each.
        max_tokens: the most tokens in a batch, padding not counted. A longer sequence is served, as a batch of its own.
        max_sequences: the most sequences in a batch; None: any number.

    Returns:
        A list of batches; none is empty, and each index is in one of them. No lengths, no batches.

    Raises:
        TypeError: a length or a limit is not an integer.
        ValueError: a length is negative, a limit is less than 1, or `lengths` does not have one dimension.

    >>> fastattn.batching.token_batches([5, 1, 3], max_tokens=6)
    [[0], [2, 1]]
    """
    sizes = _sizes(lengths)
    for name, limit in (("max_tokens", max_tokens), ("max_sequences", 1 if max_sequences is None else max_sequences)):
        if _integer(limit, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the sort is stable
        if not batches or sizes[index] > room or len(batches[-1]) == max_sequences:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= sizes[index]  # below 0 after a sequence beyond the budget: not even an empty one joins it
    return batches


def map_in_batches(
    function: Callable[[list[Item]], Any],
    items: Sequence[Item],
    lengths: Sequence[int] | Tensor,
    max_tokens: int,
    *,
    max_sequences: int | None = None,
    progress: bool | None = None,
) -> list[Any]:
    """What `function` gives for each item, in the order of `items`; it is called with one batch of `token_batches` at a time.

    Args:
        function: list of items -> one result per item, in the same order: a list, or a tensor or array whose first dimension is
            the items. Of a tensor its rows are returned, which need not have one shape across batches; where they do,
            `torch.stack` makes one tensor of them.
        items: (items,) anything.
        lengths, max_tokens, max_sequences: see `token_batches`; `lengths` has one entry per item.
        progress: a bar that counts tokens, on stderr. None: where tqdm is installed and stderr is a terminal; True: always.

    Raises:
        ValueError: lengths and items, or results and items of a batch, differ in number; and what `token_batches` raises.
        TypeError: the results are of another type: a tuple or a dict, as models return, has an entry per output, not per item.
        ImportError: `progress=True` without tqdm.

    >>> words = ["encode", "a", "few"]
    >>> fastattn.batching.map_in_batches(lambda batch: [word.upper() for word in batch], words, [6, 1, 3], max_tokens=6)
    ['ENCODE', 'A', 'FEW']
    """
    sizes = _sizes(lengths)
    if len(sizes) != len(items):
        raise ValueError(f"lengths must have one entry per item, got {len(sizes)} for {len(items)} items")
    batches = token_batches(sizes, max_tokens, max_sequences)
    results: list[Any] = [None] * len(items)
    with _bar(sum(sizes), progress) as bar:
        for batch in batches:
            rows = function([items[index] for index in batch])
            for index, row in zip(batch, _rows(rows, len(batch)), strict=True):
                results[index] = row
            if bar is not None:
                bar.update(sum(sizes[index] for index in batch))
    return results


def _sizes(lengths: Sequence[int] | Tensor) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1:
            raise ValueError(f"lengths must have one dimension, got shape {tuple(lengths.shape)}")
        lengths = lengths.tolist()
    sizes = [_integer(length, "a length") for length in lengths]
    if min(sizes, default=0) < 0:
        raise ValueError(f"a length must not be negative, got {min(sizes)}")
    return sizes


def _integer(x: Any, name: str) -> int:
    if isinstance(x, (bool, np.bool_)) or not hasattr(x, "__index__"):
        raise TypeError(f"{name} must be an integer, got {x!r}")
    return operator.index(x)


def _rows(results: Any, expected: int) -> Sequence[Any]:
    if not isinstance(results, (Tensor, np.ndarray, list)):
        raise TypeError(f"function must return a list, a tensor or an array with a row per item, got {type(results).__name__}")
    found = len(results) if isinstance(results, list) else (*results.shape, 0)[0]
    if found != expected:
        raise ValueError(f"function must return one result per item, got {found} for a batch of {expected}")
    return results.unbind(0) if isinstance(results, Tensor) else results  # type: ignore[return-value]


def _bar(tokens: int, progress: bool | None) -> AbstractContextManager:
    """tqdm's bar, which with disable=None shows itself on a terminal alone; or None."""
    if progress is False or (progress is None and find_spec("tqdm") is None):
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=False if progress else None)
