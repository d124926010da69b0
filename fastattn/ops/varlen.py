"""`varlen_attention`: attention over packed sequences, by the ops of `attention`, to which a packing is a part of the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from fastattn.biases import Bias
from fastattn.lowering import NO_EXTRAS, LoweredMask, Prepared, batched
from fastattn.masks import Mask, packed_fields
from fastattn.ops.attention import SCALES, as_mask, checked, direct, direct_with, forward_autograd
from fastattn.ops.attention_extras import extras_of
from fastattn.packing import Packing
from fastattn.planned import PLAIN, observed, plain, watched


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, mask: Mask | Tensor | None = None, *, key_packing: Packing | None = None,
    bias: Tensor | Bias | None = None, scale: float | None = None, dropout: float = 0.0, seed: int | Tensor | None = None,
    return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, mask: Mask | Tensor | None = None, *, key_packing: Packing | None = None,
    bias: Tensor | Bias | None = None, scale: float | None = None, dropout: float = 0.0, seed: int | Tensor | None = None,
    return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    mask: Mask | Tensor | None = None,
    *,
    key_packing: Packing | None = None,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each sequence of a packed batch, of which nothing but its tokens is computed.

    Args:
        q: (Tq, H, D), k: (Tk, Hkv, D), v: (Tk, Hkv, Dv), with the rows that `packing.pack` makes; else as for `attention`.
        packing: where the sequences of q lie.
        key_packing: where those of k and v lie, as many as of q; None: as those of q, self-attention.
        mask: as for `attention`, for B sequences of max_length queries and of the key packing's max_length keys. Queries and keys
            count from 0 in each sequence, and N - M is the sequence's own. `documents` takes ids of tokens, (Tq,) and (Tk,).
        bias: as for `attention`, of shape (number of sequences, H, max_length, max_length), each or 1, by sequence and by the
            query's and the key's place in it.
        dropout, seed: as for `attention`; the same weights are kept as where the sequences are padded on the right.
        scale, return_lse, backend: as for `attention`; lse is (H, Tq).

    Returns:
        out (Tq, H, Dv), contiguous, or (out, lse). Rows of no sequence have output 0, lse -inf and gradients 0.

    Raises:
        As `attention` does.

    >>> packing = fastattn.Packing.from_lengths([3, 1], max_length=4)
    >>> q, k, v = (packing.pack(torch.randn(2, 4, 8, 16)) for _ in range(3))  # (B, L, H, D) -> (T, H, D)
    >>> fastattn.varlen_attention(q, k, v, packing, fastattn.masks.causal()).shape
    torch.Size([4, 8, 16])
    """
    if not observed() and (prepared := known(q, k, v, packing, mask, key_packing)) is not None:
        more = None if bias is None and dropout == 0.0 and seed is None else (bias, dropout, seed)
        if (found := direct(q, k, v, prepared, scale, backend, return_lse, False, more)) is not None:
            return found
    return first(q, k, v, packing, mask, key_packing, bias, scale, dropout, seed, return_lse, backend)


def first(
    q,
    k,
    v,
    packing,
    mask,
    key_packing,
    bias,
    scale,
    dropout,
    seed,
    return_lse: bool,
    backend: str,
    record: Callable | None = None,
) -> Any:
    """`varlen_attention` of a call that is checked. record: as of `attention.direct`."""
    if key_packing is None:
        key_packing = packing
    _check_packings(q, k, v, packing, key_packing)
    lowered = _lowered(packing, key_packing, mask, q.shape[1])
    *four, lowered, checked_scale = checked(batched(q), batched(k), batched(v), lowered, scale, backend)
    extras = extras_of(bias, dropout, seed, four[0], four[1], lowered, backend)
    if not observed() and not watched() and plain(q, k, v, *lowered.tensors, *extras.tensors) and isinstance(scale, SCALES):
        prepared = _prepared(packing, key_packing, mask, q.shape[1], lowered)
        if extras is NO_EXTRAS:
            return direct(q, k, v, prepared, scale, backend, return_lse, True, None, record)
        return direct_with(q, k, v, prepared, bias, extras, scale, backend, return_lse, record)
    out, lse = forward_autograd(*four, *lowered, *extras, checked_scale, backend, return_lse)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def checked_packing(q, k, v, packing, mask, scale, backend) -> Prepared:
    """The packing and the mask of a call of self-attention, all of whose arguments are checked here."""
    _check_packings(q, k, v, packing, packing)
    lowered = _lowered(packing, packing, mask, q.shape[1])
    checked(batched(q), batched(k), batched(v), lowered, scale, backend)
    return _prepared(packing, packing, mask, q.shape[1], lowered)


def _prepared(packing: Packing, key_packing: Packing, mask: Any, H: int, lowered: LoweredMask) -> Prepared:
    prepared = Prepared(lowered)
    if mask is None:
        packing.keep_prepared(key_packing, prepared)
    elif type(mask) is Mask:
        mask.keep_prepared((packing, key_packing, H), prepared)
    return prepared


def _lowered(packing: Packing, key_packing: Packing, mask: Mask | Tensor | None, H: int) -> LoweredMask:
    if mask is None:
        return LoweredMask(**packed_fields(packing, key_packing))
    return as_mask(mask).lower_packed(packing, key_packing, H)


def prepared_of(packing: Packing, mask: Mask | None, H: int) -> Prepared:
    """A packing as a mask for self-attention, for callers that make sure that tensors fit it."""
    return Prepared(_lowered(packing, packing, mask, H))


def known(q, k, v, packing, mask, key_packing) -> Prepared | None:
    """The packing and the mask as they were prepared, once the rows are as many as the packings say, which no plan knows."""
    if key_packing is None:
        key_packing = packing
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or not q.dim() == k.dim() == v.dim() == 3:
        return None
    if type(packing) is not Packing or type(key_packing) is not Packing or k.shape[0] != v.shape[0]:
        return None
    if mask is None:
        prepared = packing.prepared(key_packing)
    else:
        prepared = mask.prepared.get((packing, key_packing, q.shape[1])) if type(mask) is Mask else None
    if prepared is None or (packing.trusted and q.shape[0] != packing.capacity):
        return None
    if key_packing.trusted and k.shape[0] != key_packing.capacity:
        return None
    return prepared


def _check_packings(q: Tensor, k: Tensor, v: Tensor, packing: Packing, key_packing: Packing) -> None:
    for name, given in (("packing", packing), ("key_packing", key_packing)):
        if not isinstance(given, Packing):
            raise TypeError(f"{name} must be a fastattn.Packing, got {type(given).__name__}")
    for name, x, rows in (("q", q, packing), ("k", k, key_packing), ("v", v, key_packing)):
        _check_rows(name, x, rows)
    if key_packing.lengths.shape != packing.lengths.shape:
        counts = f"{key_packing.lengths.numel()} sequences, but packing has {packing.lengths.numel()}"
        raise ValueError(f"key_packing has {counts}")


def _check_rows(name: str, x: Tensor, packing: Packing) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions (rows, heads, head dimension), got shape {tuple(x.shape)}")
    if packing.trusted and x.shape[0] != packing.capacity:
        raise ValueError(f"{name} has {x.shape[0]} rows, but its packing {packing.capacity}")
    if packing.cu_seqlens.device != x.device:
        raise ValueError(f"{name} is on {x.device}, but its packing on {packing.cu_seqlens.device}")
