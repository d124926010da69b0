"""`sdpa_override`: code that calls `torch.nn.functional.scaled_dot_product_attention` runs on fastattn, unchanged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._device import DeviceContext

from fastattn.ops.sdpa import scaled_dot_product_attention

logger = logging.getLogger("fastattn")
_torch_attention = F.scaled_dot_product_attention
_lock = threading.Lock()
_active: list[tuple[OverrideRecord, bool]] = []  # (record, strict) of every open override, innermost last
_with_handlers = 0  # calls, in all threads, that a __torch_function__ is answering
_NO_HANDLER = torch._C._disabled_torch_function_impl
NO_CALL = (
    "no call of F.scaled_dot_product_attention came this way. nn.MultiheadAttention makes none with need_weights=True, its "
    "default, nor on its fast path for inference (torch.backends.mha.set_fastpath_enabled(False)); a name that was imported "
    "from torch.nn.functional before is not reached, and calls inside compiled code are not counted"
)


@dataclass(eq=False)
class OverrideRecord:
    """What happened to the calls inside one `sdpa_override`. Calls made by compiled code are not counted."""

    calls: int = 0  # served by fastattn
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls that went to torch's function

    def __repr__(self) -> str:
        counts = f"OverrideRecord(calls={self.calls}, fallbacks={self.fallbacks})"
        return counts if self.calls or self.fallbacks else f"{counts}: {NO_CALL}"


@contextmanager
def sdpa_override(strict: bool = False) -> Iterator[OverrideRecord]:
    """Inside the block `torch.nn.functional.scaled_dot_product_attention` is `fastattn.scaled_dot_product_attention`.

    The attribute is replaced for the whole process, all threads included, until the last open override ends. A name taken
    earlier by `from torch.nn.functional import scaled_dot_product_attention` is not reached, nor are calls that never come
    this way: `nn.MultiheadAttention` with need_weights=True, and its fused path for inference (switch that off with
    `torch.backends.mha.set_fastpath_enabled(False)`).

    A call that fastattn refuses goes to torch's function, is counted under its reason and is logged once per reason and
    block by the logger "fastattn". A call that is wrong for torch as well raises torch's error. Where overrides are nested,
    all of them count and the innermost decides about `strict`. Which weights dropout drops repeats after torch.manual_seed, but
    they are fastattn's draws and not torch's. Besides what `fastattn.scaled_dot_product_attention` refuses (a batch of keys and
    values that would have to be broadcast, a float mask of another dtype than query's or fp32), these calls are left to torch and
    counted:

    - nested tensors, devices other than "cpu" and "cuda", transforms of `torch.func`;
    - an argument whose class has a `__torch_function__` (`torch.nn.attention.bias.CausalBias`, `torch.fx` proxies, any subclass
      of Tensor but Parameter), or an active `TorchFunctionMode` other than that of `torch.set_default_device`. While such a
      handler runs, the attribute is torch's own again, in all threads: their calls in that moment go to torch uncounted;
    - an argument whose class has a `__torch_dispatch__`, or an active `TorchDispatchMode` (a counter of FLOPs, a logger, fake
      tensors), which thus sees the ops that it knows;
    - `torch.jit.trace` and `torch.export`: what they make needs no fastattn. `torch.jit.script` compiles torch's function.

    Under `torch.compile` fastattn, or torch's function for a refused call, becomes part of the graph, and entering or leaving
    the block recompiles. Counting and logging are left out of graphs: `record` covers what runs eagerly. A second derivative
    raises when it is taken, which is too late to fall back.

    Args:
        strict: raise instead of falling back.

    Yields:
        A record with `calls`, the number of calls served, and `fallbacks`, a dict from reason to number of calls.

    Raises:
        NotImplementedError, ValueError, TypeError: with strict=True, from a call that fastattn refuses, with the reason.

    >>> q = torch.randn(2, 4, 5, 16)
    >>> with fastattn.sdpa_override() as record:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> record.calls, record.fallbacks
    (1, {})
    """
    entry = (OverrideRecord(), strict)
    _fill_torchs_tables()
    with _lock:
        _active.append(entry)
        if not _with_handlers:
            F.scaled_dot_product_attention = _attention
    try:
        yield entry[0]
    finally:
        with _lock:
            _active[:] = [other for other in _active if other is not entry]
            _place()


def _fill_torchs_tables() -> None:
    """torch keeps what it once read of its functions; read inside a block, ours would stand in torch's place for good."""
    torch.overrides.get_testing_overrides()
    torch.overrides.get_overridable_functions()


def _place() -> None:
    """Under the lock: set the attribute to ours or torch's, whichever is due, unless somebody else has replaced it since."""
    due, other = (_attention, _torch_attention) if _active and not _with_handlers else (_torch_attention, _attention)
    if F.scaled_dot_product_attention is other:
        F.scaled_dot_product_attention = due


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    innermost = _active[-1:]  # one look: another thread may end its block at any time
    if not innermost:  # somebody kept a reference to this function beyond the block
        return _torch_attention(*args, **kwargs)
    arguments = (*args, *kwargs.values())
    handler = _handler(arguments)
    try:
        _refuse_what_is_no_plain_call(handler, arguments)
        if len(args) > 6:
            raise TypeError("torch's function takes scale and enable_gqa by name only")
        out = scaled_dot_product_attention(*args, **kwargs)
        reason = None
    except (NotImplementedError, ValueError, TypeError) as error:
        if innermost[0][1]:
            raise
        reason = str(error)
    if not torch.compiler.is_dynamo_compiling():
        _count(reason)
    if reason is None:
        return out
    return _torch_attention(*args, **kwargs) if handler is None else _with_handler(args, kwargs)


torch.jit._builtins._register_builtin(_attention, "aten::scaled_dot_product_attention")  # what torch.jit.script makes of it


def _handler(arguments: tuple) -> str | None:
    """Whose `__torch_function__` answers this call, if any. Types alone are read: it answers a tensor's attributes too."""
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if not isinstance(mode, DeviceContext):  # which changes nothing but where tensors are made
            return type(mode).__name__
    for x in arguments:
        kind = type(x)
        if kind is not Tensor and getattr(kind, "__torch_function__", _NO_HANDLER) is not _NO_HANDLER:
            return kind.__name__
    return None


def _refuse_what_is_no_plain_call(handler: str | None, arguments: tuple) -> None:
    """Requests that torch's function takes, and that an op of ours would answer differently or with an internal error."""
    if torch.compiler._is_exporting_flag:  # Dynamo of torch 2.11 takes is_exporting() to be true in every graph
        raise NotImplementedError("an exported program keeps torch's function")
    if handler == "NestedTensor":
        raise NotImplementedError("nested tensors are not served")
    if handler is not None:
        raise NotImplementedError(f"the __torch_function__ of {handler} is left to answer")
    for x in arguments:
        if isinstance(x, Tensor):
            if x.is_nested:
                raise NotImplementedError("nested tensors are not served")
            if x.device.type not in ("cpu", "cuda"):
                raise NotImplementedError(f"tensors on {x.device.type} are not served")
            if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                raise NotImplementedError(f"{type(x).__name__} has a __torch_dispatch__, which may not know fastattn's ops")
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError("torch.func transforms are not served")
        if torch._C._len_torch_dispatch_stack():
            raise NotImplementedError("a TorchDispatchMode is active, which may not know fastattn's ops")
        if torch._C._get_tracing_state() is not None:
            raise NotImplementedError("torch.jit.trace keeps torch's function")


def _with_handler(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """torch's function with the attribute torch's as well, for a handler that compares the two or calls it again."""
    _hand_over(1)
    try:
        return _torch_attention(*args, **kwargs)
    finally:
        _hand_over(-1)


def _hand_over(calls: int) -> None:
    global _with_handlers
    if torch.compiler.is_dynamo_compiling():  # it traces the attribute's changes without making them, and traces no lock
        F.scaled_dot_product_attention = _torch_attention if calls > 0 else _attention
        return
    with _lock:
        _with_handlers += calls
        _place()


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
