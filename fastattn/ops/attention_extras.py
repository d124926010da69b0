"""What `attention` and `varlen_attention` make of `bias`, `dropout` and `seed`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.biases import Bias, check_dtype
from fastattn.dropout import seed_for
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask, Prepared
from fastattn.ops.dropout import BACKENDS, attention_bits
from fastattn.planned import PLAIN


def extras_of(
    bias: Any, dropout: float, seed: int | Tensor | None, q: Tensor, k: Tensor, mask: LoweredMask | Prepared, backend: str,
    checked: bool = False,
) -> Extras:  # fmt: skip
    """The bias checked, unless one like it was, and the bits of the weights that are kept, drawn now. Without either NO_EXTRAS
    itself. Packed tokens are (1, H, T, D) or (T, H, D)."""
    fields = mask.fields if isinstance(mask, Prepared) else mask
    if fields.query_starts is None:
        sizes, rows = (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.shape[2]
    else:
        assert fields.max_queries is not None and fields.max_keys is not None
        sizes = fields.query_starts.shape[0] - 1, q.shape[1], fields.max_queries, fields.max_keys
        rows = q.shape[2] if q.dim() == 4 else q.shape[0]
    extras = _of_bias(bias) if checked else bias_extras(bias, sizes, q)
    drawn = seed_for(dropout, seed, q.device)
    if drawn is None:
        return extras
    drawn_by = backend if backend in BACKENDS else "auto"  # one that draws none refuses dropout itself, in its own words
    kept = attention_bits(drawn, rows, *sizes, dropout, mask, drawn_by)
    return extras._replace(kept=kept, dropout=float(dropout))


def bias_extras(bias: Any, sizes: tuple[int, int, int, int], q: Tensor) -> Extras:
    """sizes: (B, H, M, N), of packed sequences how many they are and the greatest lengths."""
    if isinstance(bias, Bias):
        bias.check(*sizes[:2], q)
    elif bias is not None:
        _check_tensor(bias, sizes, q)
    return _of_bias(bias)


def _of_bias(bias: Tensor | Bias | None) -> Extras:
    if bias is None:
        return NO_EXTRAS
    if isinstance(bias, Bias):
        return bias.extras()
    return Extras(bias if bias.dim() == 4 else bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)))


def _check_tensor(bias: Any, sizes: tuple[int, int, int, int], q: Tensor) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, one of fastattn.biases or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be of floating point numbers, got {bias.dtype}; a bool tensor is a mask")
    check_dtype(bias, q, "bias")
    if bias.device != q.device:
        raise ValueError(f"bias is on {bias.device}, but q is on {q.device}")
    given = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(given) != 4 or any(size not in (1, whole) for size, whole in zip(given, sizes, strict=True)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, which does not broadcast to (B, H, M, N) = {tuple(sizes)}")


def kind_of(bias: Any, packed: bool) -> tuple[Any, tuple[Tensor, ...]] | None:
    """The kind of a bias and the tensors that a call which was checked has like another; None where these do not tell whether it
    fits: of packed sequences no plan's key knows how many they are, nor how long."""
    if bias is None:
        return None, ()
    if type(bias) is Bias and bias.table is not None and bias.buckets is not None:
        return ("table", bias.align), (bias.table, bias.buckets)
    if packed:
        return None
    if type(bias) is Bias and bias.slopes is not None:
        return ("slopes", bias.align), (bias.slopes,)
    return ("tensor", (bias,)) if type(bias) in PLAIN else None
