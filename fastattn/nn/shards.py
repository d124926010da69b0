"""`Shards`: the part of a module that one of several ranks computes: some of its heads, or of its hidden features.

Shoeybi et al., "Megatron-LM" (2019, arXiv:1909.08053): the first product's rows and the second one's columns are divided, so that
a module communicates twice, what goes in and what comes out. With sequences divided between modules: Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (2022, arXiv:2205.05198).

n: ranks. Parameters are DTensors, of which the ops are given what lies on a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.dropout import draw_seed

# PyTorch 2.13 has new names for these, and warns of the old ones
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Shards:
    """Rank `rank` of `count` in `group`. Heads, features and rows are divided into consecutive parts, the first rank's first.

    sequence: the dimension of a batch (.., .., E) along which what goes in and comes out is divided as well; of rows (L, E) or
        (T, E) it is the first. None: each rank has all of it.
    """

    def __init__(self, group: Any, rank: int, count: int, sequence: int | None = None) -> None:
        self.group, self.rank, self.count, self.sequence = group, rank, count, sequence

    def __deepcopy__(self, memo: dict) -> Shards:
        return self  # processes are not copied

    # What goes in, and comes out

    def enter(self, x: Tensor) -> Tensor:
        """What goes in, whole; each rank has a part of its gradient."""
        if self.sequence is None:
            return self.shared(x)
        dim = self._dim(x)
        return _Communicated.apply(x, partial(self._gathered, dim=dim), partial(self._scattered, dim=dim))

    def leave(self, part: Tensor, bias: Tensor | None) -> Tensor:
        """The sum over ranks of what each has computed, plus a bias, in the dtype of what was computed."""
        if self.sequence is None:
            total = self.summed(part)
        else:
            dim = self._dim(part)
            total = _Communicated.apply(part, partial(self._scattered, dim=dim), partial(self._gathered, dim=dim))
        return total if bias is None else total + self.whole(bias).to(total.dtype)  # under autocast it is another

    def summed(self, part: Tensor) -> Tensor:
        """The sum over ranks, on all of them, who go on alike."""
        return _Communicated.apply(part, self._sum, _same)

    def shared(self, x: Tensor) -> Tensor:
        """What all ranks have alike, and use differently: the gradient is the sum of theirs."""
        return _Communicated.apply(x, _same, self._sum)

    def divided(self, x: Tensor) -> Tensor:
        """This rank's part of a sequence that all have alike, and its gradient whole again."""
        dim = self._dim(x)
        if x.shape[dim] % self.count:
            raise ValueError(f"sequence_parallel: {x.shape[dim]} places of a sequence are not divided by {self.count} ranks")
        return _Communicated.apply(x, partial(self.part, dim=dim), partial(self._gathered, dim=dim))

    def joined(self, x: Tensor, dim: int | None = None) -> Tensor:
        """The sequence, or another dimension, whole on all ranks, who go on alike."""
        dim = self._dim(x) if dim is None else dim
        return _Communicated.apply(x, partial(self._gathered, dim=dim), partial(self.part, dim=dim))

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's, copied: what another rank has is not kept."""
        return x.chunk(self.count, dim)[self.rank].clone()

    def places(self, size: int) -> tuple[int, int]:
        """Of a rank's `size` heads: the place of the first among all, and how many there are."""
        return self.rank * size, self.count * size

    # What a rank computes with

    def whole(self, parameter: Any) -> Tensor:
        """A parameter that all ranks have; of a part of the sequence, ranks have parts of its gradient."""
        return parameter.to_local() if self.sequence is None else self.shared(parameter.to_local())

    def rows(self, parameter: Any, blocks: Sequence[int]) -> Tensor:
        """This rank's rows of each of the blocks that a parameter's rows are, q's, k's and v's say.

        blocks: by block, how many units of rows are a rank's. A parameter is divided as PyTorch divides, a rank has one n-th of
        all rows, which is what everything that saves and loads takes for granted; so they are exchanged here, each once.
        """
        local = parameter.to_local()
        if len(blocks) == 1:
            return local
        places = [rank for count in blocks for rank in range(self.count) for _ in range(count)]  # who computes with a unit
        size = sum(blocks)
        own = places[self.rank * size : (self.rank + 1) * size]
        order = sorted(range(size), key=own.__getitem__)
        back = sorted(range(size), key=order.__getitem__)
        sent = [own.count(rank) for rank in range(self.count)]
        received = [places[rank * size : (rank + 1) * size].count(self.rank) for rank in range(self.count)]

        def there(x: Tensor) -> Tensor:
            units = x.unflatten(0, (size, -1))
            return self._exchanged(torch.stack([units[i] for i in order]), sent, received).flatten(0, 1)

        def again(dx: Tensor) -> Tensor:
            units = self._exchanged(dx.contiguous().unflatten(0, (size, -1)), received, sent)
            return torch.stack([units[i] for i in back]).flatten(0, 1)

        return _Communicated.apply(local, there, again)

    def seed(self, device: torch.device) -> Tensor:
        """Of this rank's draws: the one that all ranks draw from generators in the same state, plus the rank."""
        return draw_seed(None, device) + self.rank

    def kept(self, x: Tensor, dropout: Any) -> Tensor:
        """What a torch.nn.Dropout multiplies this rank's part of a sequence by, drawn for the whole one as every rank does."""
        dim = self._dim(x)
        return self.part(dropout(x.new_ones([self.count * size if i == dim else size for i, size in enumerate(x.shape)])), dim)

    # The group's

    def _dim(self, x: Tensor) -> int:
        assert self.sequence is not None
        return self.sequence if x.dim() == 3 else 0

    def _sum(self, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def _gathered(self, x: Tensor, dim: int) -> Tensor:
        out = x.new_empty(self.count * x.shape[0], *x.shape[1:])
        _gather(out, x.contiguous(), group=self.group)
        return out if dim == 0 else torch.cat(out.chunk(self.count), dim)

    def _scattered(self, x: Tensor, dim: int) -> Tensor:
        parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(self.count, dim))
        out = x.new_empty(parts.shape[0] // self.count, *parts.shape[1:])
        _scatter(out, parts, group=self.group)
        return out

    def _exchanged(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, received, sent, group=self.group)
        return out


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


class _Communicated(torch.autograd.Function):
    """x -> there(x), whose gradient is back(dy): a linear map over all ranks, and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.maps = there, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        there, back = ctx.maps
        return _Communicated.apply(dy, back, there), None, None
