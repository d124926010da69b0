"""`Packing`: where the real tokens of a padded batch go when they are laid end to end, and back.

B, L, T: sequences, their padded length, rows of a packed tensor. Everything that kernels read is made here, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip

Integers = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False)
class Packing:
    """Make one with `from_lengths`, `from_mask` or `from_cu_seqlens`. Immutable, and a pytree.

    Sequence b has the rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of a packed tensor of `capacity` rows, in its own order;
    rows after the last sequence are of none, and 0.

    >>> packing = fastattn.Packing.from_lengths([3, 1], max_length=4)
    >>> packing.pack(torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]]))
    tensor([1, 2, 3, 4])
    """

    lengths: Tensor  # (B,) int32
    cu_seqlens: Tensor  # (B + 1,) int32, from 0, never decreasing, at most `capacity`
    indices: Tensor  # (capacity,) int64: row b * L + column of the padded tensor; B * L for a row of no sequence
    overflowed: Tensor  # () bool: there were more tokens than `capacity`, and the last ones are left out
    max_length: int  # L: no sequence is longer
    capacity: int
    known_total: int | None  # the number of tokens, where the host has read it
    trusted: bool = True  # False: from `from_cu_seqlens(validate=False)`, where a tensor may have any number of rows

    @classmethod
    def from_lengths(cls, lengths: Integers, max_length: int, capacity: int | None = None) -> Packing:
        """Sequence b of a padded batch (B, max_length) has its lengths[b] tokens at its start.

        Args:
            lengths: integers (B,), 0 included.
            max_length: the padded length.
            capacity: rows of a packed tensor. None: as many as there are tokens, which reads `lengths` on the host. With a
                number nothing is read: shapes are static, as torch.compile and CUDA graphs need; lengths beyond 0..max_length
                are cut, and `overflowed` says whether tokens had to be dropped.

        Raises:
            ValueError, TypeError: an argument does not fit.
        """
        lengths = integers(lengths, "lengths")
        max_length, capacity = _sizes(max_length, capacity)
        if capacity is None or readable(lengths):
            _check_range(lengths, max_length, "lengths")
        return cls._of(_starts(lengths.clamp(0, max_length)), None, max_length, capacity)

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> Packing:
        """mask: bool (B, L), True = a real token; padding may be on the right, on the left or anywhere between.

        `capacity` as for `from_lengths`. Raises TypeError or ValueError if the mask is none.

        >>> packing = fastattn.Packing.from_mask(torch.tensor([[False, True, True], [True, False, True]]))
        >>> packing.pack(torch.tensor([[0, 1, 2], [3, 0, 4]])), packing.cu_seqlens
        (tensor([1, 2, 3, 4]), tensor([0, 2, 4], dtype=torch.int32))
        """
        check_bool(mask, "mask")
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape (B, L), got {tuple(mask.shape)}")
        _, capacity = _sizes(mask.shape[1], capacity)
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # the columns of real tokens first
        return cls._of(_starts(mask.sum(1)), order, mask.shape[1], capacity)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Integers, max_length: int, validate: bool = True, capacity: int | None = None
    ) -> Packing:
        """Sequence b has the rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1; its padded form is (B, max_length), tokens first.

        Args:
            cu_seqlens: integers (B + 1,), from 0, never decreasing.
            max_length: at least the longest sequence.
            validate: read the values on the host, and raise if they are not so. Without it nothing is read: values that are not
                so are cut to such that are, and `varlen_attention` takes tensors of any number of rows, of which it reads and
                writes none that is not there. Rows in no sequence are 0.
            capacity: rows of what `pack` returns; None: cu_seqlens[-1], or B * max_length without `validate`. Offsets beyond are
                cut to it.

        Raises:
            ValueError, TypeError: an argument does not fit.

        >>> fastattn.Packing.from_cu_seqlens([0, 3, 4], max_length=3).lengths
        tensor([3, 1], dtype=torch.int32)
        """
        cu = integers(cu_seqlens, "cu_seqlens")
        max_length, capacity = _sizes(max_length, capacity)
        if cu.numel() == 0:
            raise ValueError("cu_seqlens must hold at least a 0")
        if validate:
            if int(cu[0]) != 0:
                raise ValueError(f"cu_seqlens must begin with 0, got {int(cu[0])}")
            _check_range(cu.diff(), max_length, "cu_seqlens: lengths")
            return cls._of(cu, None, max_length, capacity)
        cu = torch.cummax(cu.clamp(0, 2**31 - 1), 0)[0]
        capacity = (cu.numel() - 1) * max_length if capacity is None else capacity
        return cls._of(cu, None, max_length, capacity, trusted=False)

    @classmethod
    def _of(cls, cu: Tensor, order: Tensor | None, max_length: int, capacity: int | None, trusted: bool = True) -> Packing:
        """cu: (B + 1,), never decreasing. order: (B, L), the column of the padded tensor of each token of a sequence, None: its
        own place."""
        total = None
        if trusted and (capacity is None or readable(cu)):
            total = int(cu[-1])
            capacity = total if capacity is None else capacity
            total = min(total, capacity)
        assert capacity is not None
        B = cu.numel() - 1
        with lasting():
            overflowed, cu = cu[-1] > capacity, cu.clamp(max=capacity)
            row = torch.arange(capacity, device=cu.device)
            sequence = torch.searchsorted(cu, row, right=True) - 1  # not in cu[1:]: inductor of torch 2.11 takes no view there
            column = row - cu[sequence]
            live = (column >= 0) & (column < max_length) & (row < cu[-1])
            if order is not None and order.numel():
                column = order[sequence.clamp(max=B - 1), column.clamp(0, max_length - 1)]
            indices = torch.where(live, sequence * max_length + column, B * max_length)
            lengths, cu = cu.diff().clamp(max=max_length).to(torch.int32), cu.to(torch.int32)
        return cls(lengths, cu, indices, overflowed, max_length, capacity, total, trusted)

    def __repr__(self) -> str:
        rows = f"{self.lengths.numel()} sequences of at most {self.max_length} tokens in {self.capacity} rows"
        return f"Packing({rows}, {self.lengths.device})"

    @property
    def total(self) -> int:
        """The number of packed tokens. With a static capacity on a GPU the host waits for it."""
        return int(self.lengths.sum()) if self.known_total is None else self.known_total

    @property
    def full(self) -> bool:
        """Whether the host knows that every row of a packed tensor is a token."""
        return self.known_total == self.capacity

    def prepared(self, key_packing: Packing) -> Any:
        """What `keep_prepared` was given last, if it was for these keys. It is no field: torch.compile guards those."""
        kept = self.__dict__.get("_prepared")
        return kept[1] if kept is not None and kept[0] is (None if key_packing is self else key_packing) else None

    def keep_prepared(self, key_packing: Packing, prepared: Any) -> None:
        """Both packings as a mask for attention; not in the memory of a CUDA graph that is being captured."""
        if not (self.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
            keys = None if key_packing is self else key_packing  # no cycle: its memory is freed with it
            self.__dict__["_prepared"] = keys, prepared

    @property
    def positions(self) -> Tensor:
        """(capacity,) int64: the column of each packed row in the padded tensor; 0 for a row of no sequence."""
        return torch.where(self.live, self.indices % max(self.max_length, 1), 0)

    @property
    def live(self) -> Tensor:
        """(capacity,) bool: whether a packed row is a token of some sequence."""
        return self.indices < self._places

    @property
    def _places(self) -> int:
        return self.lengths.numel() * self.max_length

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (capacity, ...), differentiable. What stands at padding is not read, NaN included."""
        if tuple(x.shape[:2]) != (self.lengths.numel(), self.max_length):
            expected = (self.lengths.numel(), self.max_length)
            raise ValueError(f"x must begin with (sequences, max_length) = {expected}, got shape {tuple(x.shape)}")
        if x.device != self.indices.device:
            raise ValueError(f"x is on {x.device}, but the packing on {self.indices.device}")
        if self.full:
            return x.flatten(0, 1).index_select(0, self.indices)
        if self._places == 0:
            return x.new_zeros(self.capacity, *x.shape[2:])
        taken = x.flatten(0, 1).index_select(0, self.indices.clamp(max=self._places - 1))
        return taken.masked_fill(~self.live.view(-1, *(1,) * (x.dim() - 2)), 0)

    def unpack(self, x: Tensor) -> Tensor:
        """(capacity, ...) -> (B, L, ...), differentiable. Padding is exactly 0.

        >>> fastattn.Packing.from_lengths([3, 1], max_length=4).unpack(torch.tensor([1, 2, 3, 4]))
        tensor([[1, 2, 3, 0],
                [4, 0, 0, 0]])
        """
        if x.dim() == 0 or x.shape[0] != self.capacity:
            raise ValueError(f"x must have capacity = {self.capacity} rows, got shape {tuple(x.shape)}")
        if x.device != self.indices.device:
            raise ValueError(f"x is on {x.device}, but the packing on {self.indices.device}")
        rows = self._places if self.full else self._places + 1  # the last one gathers rows of no sequence
        padded = x.new_zeros(rows, *x.shape[1:]).index_copy_(0, self.indices, x)
        return padded[: self._places].unflatten(0, (self.lengths.numel(), self.max_length))


torch.export.register_dataclass(Packing)


def lasting() -> AbstractContextManager:
    """What is made inside may be saved for a backward pass, in inference mode too; views of what was made there may not."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def integers(x: Integers, name: str) -> Tensor:
    """(B,) as int64. Raises TypeError or ValueError, naming it, for anything else."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got an array of {x.dtype}")
        x = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))
    tensor = int64(x if isinstance(x, Tensor) else _listed(x, name), name)
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have shape (B,), got {tuple(tensor.shape)}")
    return tensor


def int64(x: Tensor, name: str) -> Tensor:
    """Any integers as int64. A uint64 beyond is refused where the host sees it; elsewhere it wraps around."""
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers, got {x.dtype}")
    wide = x.long()
    if x.dtype == torch.uint64 and readable(x) and wide.numel() and int(wide.min()) < 0:
        raise ValueError(f"{name} must be below 2^63, got {int(wide.min()) + 2**64}")
    return wide


def _listed(x: Any, name: str) -> Tensor:
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
        raise TypeError(f"{name} must be a tensor, an array or a list of integers, got {x!r}")
    numbers = []
    for number in x:
        scalar = isinstance(number, Tensor) and number.dim() == 0 and number.dtype in INTEGERS
        if not scalar and not _is_integer(number):
            raise TypeError(f"{name} must hold integers, got {number!r}")
        numbers.append(int(number) if isinstance(number, np.integer) else number)
    if not torch.compiler.is_compiling() and any(isinstance(n, int) and not -(2**63) <= n < 2**63 for n in numbers):
        raise ValueError(f"{name} must be from -2^63 to 2^63 - 1, got {numbers}")
    return torch.tensor(numbers, dtype=torch.int64)


def _is_integer(x: Any) -> bool:
    """Python's, NumPy's, or one of a trace."""
    return isinstance(x, (int, np.integer, torch.SymInt)) and not isinstance(x, bool)


def integer(x: Any, name: str) -> int:
    """x as Python's integer, or that of a trace. Raises TypeError, naming it, for anything else."""
    if not _is_integer(x):
        raise TypeError(f"{name} must be an integer, got {x!r}")
    return int(x) if isinstance(x, np.integer) else x


def check_bool(x: Any, name: str) -> None:
    if isinstance(x, Tensor) and x.dtype == torch.bool:
        return
    if isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a bool tensor, got a NumPy array: pass torch.from_numpy({name}).bool()")
    got = x.dtype if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(f"{name} must be a bool tensor, got {got}; for a 0/1 attention_mask pass attention_mask.bool()")


def check_sizes(**sizes: int | None) -> None:
    """Raise TypeError or ValueError, naming it, for a size that is neither None nor an integer from 0 on."""
    for name, size in sizes.items():
        if size is not None and integer(size, name) < 0:
            raise ValueError(f"{name} must not be negative, got {size}")


def _sizes(max_length: int, capacity: int | None) -> tuple[int, int | None]:
    check_sizes(max_length=max_length, capacity=capacity)
    return integer(max_length, "max_length"), None if capacity is None else integer(capacity, "capacity")


def _check_range(lengths: Tensor, max_length: int, name: str) -> None:
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= max_length:
        raise ValueError(f"{name} must be in 0..max_length = {max_length}, got {lengths.tolist()}")


def readable(x: Tensor) -> bool:
    """Whether the host reads it without waiting, and not for a trace."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
