"""`sdpa_override`: code that calls `torch.nn.functional.scaled_dot_product_attention` runs on fastattn, unchanged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.attention import scaled_dot_product_attention

logger = logging.getLogger("fastattn")
_torch_attention = F.scaled_dot_product_attention
_lock = threading.Lock()
_active: list[tuple[OverrideRecord, bool]] = []  # (record, strict) of every open override, innermost last


@dataclass(eq=False)
class OverrideRecord:
    """What happened to the calls inside one `sdpa_override`. Calls made by compiled code are not counted."""

    calls: int = 0  # served by fastattn
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls that went to torch's function


@contextmanager
def sdpa_override(strict: bool = False) -> Iterator[OverrideRecord]:
    """Inside the block `torch.nn.functional.scaled_dot_product_attention` is `fastattn.scaled_dot_product_attention`.

    The attribute is replaced for the whole process, all threads included, until the last open override ends. A name taken
    earlier by `from torch.nn.functional import scaled_dot_product_attention` is not reached, nor are calls that never come
    this way: `nn.MultiheadAttention` with need_weights=True, and its fused path for inference (switch that off with
    `torch.backends.mha.set_fastpath_enabled(False)`).

    A call that fastattn refuses goes to torch's function, is counted under its reason and is logged once per reason and
    block by the logger "fastattn". A call that is wrong for torch as well raises torch's error. Where overrides are nested,
    all of them count and the innermost decides about `strict`.

    Under `torch.compile` fastattn, or torch's function for a refused call, becomes part of the graph, and entering or leaving
    the block recompiles. Counting and logging are left out of graphs: `record` covers what runs eagerly. A second derivative
    raises when it is taken, which is too late to fall back.

    Args:
        strict: raise instead of falling back.

    Yields:
        A record with `calls`, the number of calls served, and `fallbacks`, a dict from reason to number of calls.

    Raises:
        NotImplementedError, ValueError, TypeError: with strict=True, from a call that fastattn refuses, with the reason.
    """
    entry = (OverrideRecord(), strict)
    with _lock:
        _active.append(entry)
        F.scaled_dot_product_attention = _attention
    try:
        yield entry[0]
    finally:
        with _lock:
            _active[:] = [other for other in _active if other is not entry]
            if not _active and F.scaled_dot_product_attention is _attention:
                F.scaled_dot_product_attention = _torch_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not _active:  # somebody kept a reference to this function beyond the block
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    strict = _active[-1][1]
    try:
        _refuse_what_is_no_plain_call(query, key, value)
        out = scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        reason = None
    except (NotImplementedError, ValueError, TypeError) as error:
        if strict:
            raise
        reason = str(error)
    if not torch.compiler.is_compiling():
        _count(reason)
    if reason is None:
        return out
    return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _refuse_what_is_no_plain_call(*tensors: Tensor) -> None:
    """Requests that torch's function takes and that an op of ours would meet with an internal error."""
    for x in tensors:
        if x.is_nested:
            raise NotImplementedError("nested tensors are not served")
        if x.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"tensors on {x.device.type} are not served")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError("torch.func transforms are not served")


def _count(reason: str | None) -> None:
    with _lock:
        records = [record for record, _ in _active]
        new = bool(records) and reason is not None and reason not in records[-1].fallbacks
        for record in records:
            if reason is None:
                record.calls += 1
            else:
                record.fallbacks[reason] = record.fallbacks.get(reason, 0) + 1
    if new:
        logger.warning("scaled_dot_product_attention falls back to torch: %s", reason)
