"""What inference makes of weights and keeps (packed and joined copies), and the proof that it still is the weights'.

PyTorch's version counter alone proves nothing: fused optimizers, writes through `.data` or NumPy, and storage that is shared with
another tensor leave it as it was. So a copy is used only while all of this holds, which is asked at every use:
- address, version, dtype and layout of each weight are what they were;
- so are the bits of a small weight, and of a large one those of a sample that meets every row and every column (`sample`),
  where a write to all elements, to whole rows or to whole columns shows: a step of any optimizer, loading, merging an adapter,
  averaging, scaling, rounding.
And every step of an optimizer of PyTorch's drops all copies. Nothing is kept of what is not a parameter on the CPU, while
gradients are on, or inside `nothing_kept`, where modules in training mode run.

What this cannot see: a write to a few elements of a large weight, between those of the sample, that PyTorch does not count.
`clear_packed` is for that, and `FASTATTN_PREPACK=0`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

SMALL = 2**14  # elements
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Made(nn.Parameter):
    """A copy of weights made by `kept`'s `make`, of which more is kept. Nobody else writes to it: it is not compared itself."""


class Kept(NamedTuple):
    identities: list[tuple]
    samples: list[Tensor]
    made: Any


_kept = WeakTensorKeyDictionary()  # first weight -> {purpose: Kept}
_thread = threading.local()  # .nothing: inside `nothing_kept`


def kept(weights: Sequence[Tensor], purpose: Hashable, make: Callable[[], Any]) -> Any | None:
    """What `make()` gave for these weights, (F, K) or (F,) each, now or earlier; None where nothing may be kept of them."""
    if not _may_keep(weights):
        return None
    purposes = _kept.setdefault(weights[0], {})
    found = purposes.get(purpose)
    if found is not None and unchanged(found, weights):
        return found.made
    identities, samples = [*map(identity, weights)], [sample(w).clone() for w in weights]  # first: no write is missed
    made = make()
    _drop_all_after_steps()
    purposes[purpose] = Kept(identities, samples, made)
    return made


def unchanged(found: Kept, weights: Sequence[Tensor]) -> bool:
    """Whether weights are what a copy was made of."""
    if found.identities != [*map(identity, weights)]:
        return False
    return type(weights[0]) is Made or all(map(torch.equal, found.samples, map(sample, weights)))


def identity(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape


def sample(weight: Tensor) -> Tensor:
    """Bits of a contiguous weight as integers, of a large matrix those of `runs`: a view."""
    bits = weight.detach().view(INTEGERS[weight.element_size()])
    if weight.dim() != 2 or weight.numel() <= SMALL or weight.shape[0] < 3:
        return bits
    count, length, step = runs(*weight.shape)
    return bits.as_strided((count, length), (step, 1))


@functools.cache
def runs(rows: int, columns: int) -> tuple[int, int, int]:
    """(count, length, step): runs of elements, `step` apart, which meet every row and every column of a matrix of 3 rows or more.

    Every row: the step is at most its length. Every column: each run begins `length` columns to the left of the one before, so
    that after columns / length runs, of which there are so many, they have been all the way round. A run lies in one line of
    the processor's cache, or two, and there is about one for each row: fewer lines could not meet every row.
    """
    length = -(-columns // (rows - 1))
    step = max(columns - length, 1)
    return (rows * columns - length) // step + 1, length, step


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Inside, on this thread, no copy of a weight is made to be kept, and none that is kept is used."""
    before = getattr(_thread, "nothing", False)
    _thread.nothing = True
    try:
        yield
    finally:
        _thread.nothing = before


def clear_packed() -> None:
    """Drop every copy of a weight that CPU inference keeps.

    They are dropped by themselves when a weight dies or is changed: by PyTorch, by any optimizer, or by a write from elsewhere
    (`.data`, NumPy) to all of its elements, or to whole rows or columns. Only after a write of that last kind to a few elements
    of a weight of more than 16,384 is this call needed. `FASTATTN_PREPACK=0` keeps no copies at all.

    >>> weight = torch.nn.Parameter(torch.zeros(256, 256))
    >>> with torch.inference_mode():
    ...     before = fastattn.linear(torch.ones(1, 256), weight)
    ...     weight.numpy()[2, 0] = 5.0  # one element, and PyTorch does not see it
    ...     fastattn.clear_packed()
    ...     fastattn.linear(torch.ones(1, 256), weight)[0, 2].item()
    5.0
    """
    _kept.clear()


def _may_keep(weights: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() or getattr(_thread, "nothing", False) or os.environ.get("FASTATTN_PREPACK") == "0":
        return False
    return all(
        type(w) in (nn.Parameter, Made)
        and w.device.type == "cpu"
        and w.is_contiguous()
        and w.numel() > 0
        and not w.is_inference()  # it has no version
        for w in weights
    )


@functools.cache
def _drop_all_after_steps() -> None:
    """Once in a process that keeps anything: an optimizer changes what it will."""
    register_optimizer_step_post_hook(lambda *_: clear_packed())
