"""Plans: what depends on a call's metadata alone is decided once.

    key    shapes, strides, dtypes, devices, alignment, the mask's structure, scale, backend: what a public function was given
    plan   a function of the call's tensors that allocates its results, fills in addresses and launches

An op makes the key of a call and looks for its plan. A key that is known was checked when its plan was made, so nothing is
checked again; for a new one the op checks, chooses a backend, and `keep`s the plan that the backend's module makes. What varies
from batch to batch while its kernels do not (the rows of packed tokens, of a linear, of a norm) is no part of a key.

A call goes to its plan without PyTorch's dispatcher where its tensors are plain and nothing `watches` it; else through the
registered op, which looks for the same plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

LIMIT = 4096
PLAIN = (Tensor, nn.Parameter)  # exactly: a subclass may compute anything
_PLAIN_OR_NONE = {*PLAIN, type(None)}
misses = 0  # plans that were made
pretending = False  # whether tensors of the CPU stand for those of a GPU
PLANS: dict[tuple, Callable[..., Any]] = {}

_include, _autocast = torch._C._dispatch_tls_local_include_set, torch._C._is_any_autocast_enabled
_traced, _switch = torch.compiler.is_dynamo_compiling, torch._C._get_fp32_precision_getter
_functions, _profiled = torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled


def keep(key: tuple, plan: Callable[..., Any]) -> Callable[..., Any]:
    global misses
    misses += 1
    if len(PLANS) >= LIMIT:
        PLANS.clear()
    PLANS[key] = plan
    return plan


def watched() -> bool:
    """Whether something of PyTorch's is to see what happens now: a trace, a mode, a transform, autocast, a profiler.

    Traces, modes of the dispatcher and transforms are keys that it has included on this thread. In forward mode a call has to
    reach the op, which refuses.
    """
    return (
        _traced()
        or _include().raw_repr() not in _QUIET
        or _functions() > 0
        or _autocast()
        or _profiled()
        or forward_ad._current_level >= 0
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are memory of a CPU or a GPU and no more: no subclass, nothing that stands for other values."""
    return all(x is None or (type(x) in PLAIN and (x.is_cuda or x.is_cpu) and not x.is_neg()) for x in tensors)


def plain_types(*tensors: Tensor | None) -> bool:
    """The same of tensors whose device is in a key. (The last stride of a negated view is 2, and such tensors are copied.)"""
    return _PLAIN_OR_NONE.issuperset(map(type, tensors))


def layout(x: Tensor | None) -> Any:
    """Of a key: how the rows of a matrix or a vector lie; of a contiguous one it leaves out how many there are."""
    if x is None:
        return None
    where = x.shape[-1:] if x.is_contiguous() else (x.shape, x.stride())
    return where, x.dtype, x.get_device()


def fp32_precision(dtype: torch.dtype) -> str | None:
    """Of a key: PyTorch's own switch, by which fp32 may be multiplied in less."""
    return _switch("cuda", "matmul") if dtype is torch.float32 else None


def unaligned(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Of a key, where not all tensors start at multiples of 16 bytes: which do."""
    return tuple(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def _quiet() -> set[int]:
    """The dispatcher's included keys on a thread where nothing goes on: in inference mode and outside."""
    found = set()

    def look() -> None:
        for inference in (False, True):
            with torch.inference_mode(inference):
                found.add(_include().raw_repr())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found


_QUIET = _quiet()
