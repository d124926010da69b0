"""Plans: what depends on a call's metadata alone is decided once.

    key    shapes, strides, dtypes, devices, alignment, the mask's structure, scale, backend: what a public function was given
    plan   a function of the call's tensors that allocates its results, fills in addresses and launches

An op makes the key of a call and looks for its plan. A key that is known was checked when its plan was made, so nothing is
checked again; for a new one the op checks, chooses a backend, and `keep`s the plan that the backend's module makes. What varies
from batch to batch while its kernels do not (the rows of packed tokens, of a linear, of a norm) is no part of a key.

A call goes to its plan without PyTorch's dispatcher where its tensors are plain and nothing `watches` it; else through the
registered op. Forward, an op has plans of its own: it serves what the public function never checked, or checked by other rules,
as autocast's. Most calls make no key but the first time: guards `recall` their plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

LIMIT = 4096
REMEMBERED = 16  # kinds of tensors for each request, at most
PLAIN = (Tensor, nn.Parameter)  # exactly: a subclass may compute anything
_PLAIN_OR_NONE = {*PLAIN, type(None)}
misses = 0  # plans that were made
pretending = False  # whether tensors of the CPU stand for those of a GPU
PLANS: dict[tuple, Any] = {}  # a plan by the key of a call, or by a request a list of what is remembered

_include, _autocast = torch._C._dispatch_tls_local_include_set, torch._C._is_any_autocast_enabled
_traced, _switch = torch.compiler.is_dynamo_compiling, torch._C._get_fp32_precision_getter
_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiled = torch._C._autograd._profiler_enabled
_MEMORY = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_keys = torch._C._dispatch_keys


Known = tuple[Callable[..., Any], bool]  # a plan, and whether a gradient is wanted
Request = tuple[tuple, tuple, tuple]  # what is no tensor, the tensors of rows, and all tensors, they first


def keep(key: tuple, plan: Callable[..., Any]) -> Callable[..., Any]:
    global misses
    misses += 1
    if len(PLANS) >= LIMIT:
        PLANS.clear()
    PLANS[key] = plan
    return plan


def known(key: tuple) -> Any:
    """What is kept under a key; None too for what no key can hold, which the checks name."""
    try:
        return PLANS.get(key)
    except TypeError:
        return None


def remember(request: Request, found: Known, precision: str | None = None, tokens: int = 0) -> None:
    """Let `recall` find this for calls like the one that it is for, if all tensors start at multiples of 16 bytes.

    Tensors of rows are contiguous, and may have other sizes next time, but for their last; the first `tokens` of all may be
    longer or shorter. `precision` is what `fp32_precision` says now.

    What PyTorch's compiler guards its graphs with compares types, dtypes, devices, sizes, strides, requires_grad and the
    dispatcher's keys of all tensors at once, in a fraction of the time that a key takes.
    """
    name, rows, tensors = request
    kinds = PLANS.setdefault(name, [])
    dense = all(x.is_contiguous() and x.stride()[-2:-1] in ((), (x.shape[-1],)) for x in rows)
    if len(kinds) == REMEMBERED or not dense or any(x.data_ptr() % 16 for x in tensors):
        return
    sizes: list[Any] = [list(x.shape) for x in tensors]
    strides: list[Any] = [list(x.stride()) for x in tensors]
    for size, stride in zip(sizes[: len(rows)], strides, strict=False):
        size[:-1], stride[:-1] = ([None] * (len(size) - 1) for _ in range(2))
    for size in sizes[:tokens]:
        size[0] = None
    fits = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if fits(*tensors):  # a tensor that is there twice never does
        kinds.append((fits, precision, found))


def look_up(key: tuple, make: Callable[[], Callable[..., Any]], checked: bool) -> Any:
    """The plan under a key. Where there is none, it is made if the call was checked, else None."""
    plan = known(key)
    return keep(key, make()) if plan is None and checked else plan


def recall(name: tuple, rows: tuple, tensors: tuple) -> Known | None:
    """What is remembered of calls like this one; nothing is `observed`. Whether rows are equally many, the caller has to see."""
    for fits, precision, found in known(name) or ():
        if fits(*tensors) and (precision is None or precision == _switch("cuda", "matmul")):
            for x in rows:
                if not x.is_contiguous():
                    return None
            addresses = 0
            for x in tensors:
                address = x.data_ptr()
                if not address:
                    return None
                addresses |= address
            return None if addresses & 15 else found
    return None


def observed() -> bool:
    """Whether something of PyTorch's is to see what happens now that no tensor's keys tell of: a trace, a mode, a profiler, or
    forward mode, in which a call has to reach the op, which refuses."""
    return _traced() or _modes() > 0 or _functions() > 0 or _profiled() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether something of PyTorch's is to see what happens now: also a transform, or autocast, which are keys of the dispatcher
    on this thread, as most of what is `observed` is."""
    return (
        _traced()
        or _include().raw_repr() not in _QUIET
        or _functions() > 0
        or _autocast()
        or _profiled()
        or forward_ad._current_level >= 0
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are memory of a CPU or a GPU and no more: no subclass, nothing that stands for other values.

    Those are keys of the dispatcher too: of a view to be negated, of zeros without memory, of what a transform wraps.
    """
    return all(x is None or (type(x) in PLAIN and not _keys(x).raw_repr() & _OTHER) for x in tensors)


def plain_types(*tensors: Tensor | None) -> bool:
    """The same of tensors whose device is in a key, and whether they are to be negated."""
    return _PLAIN_OR_NONE.issuperset(map(type, tensors))


def layout(x: Tensor | None) -> Any:
    """Of a key: how the rows of a matrix or a vector lie; of a contiguous one it leaves out how many there are.

    One row is contiguous whatever the step to a next one; a matrix is told from a vector by having such a step.
    """
    if x is None:
        return None
    shape, steps = x.shape, x.stride()
    where = (len(shape), shape[-1], steps[-2:]) if shape and x.is_contiguous() else (shape, steps)
    return where, x.dtype, x.device, x.is_neg()


def memory(x: Tensor, shape: torch.Size, width: int) -> Tensor:
    """Memory for (*shape[:-1], width) beside x, of its dtype; PyTorch reads sizes faster than a tuple of them."""
    dims = len(shape)
    if dims == 3:
        return x.new_empty(shape[0], shape[1], width)
    return x.new_empty(shape[0], width) if dims == 2 else x.new_empty(*shape[:-1], width)


def fp32_precision(dtype: torch.dtype) -> str | None:
    """Of a key: PyTorch's own switch, by which fp32 may be multiplied in less."""
    return _switch("cuda", "matmul") if dtype is torch.float32 else None


def without_memory(*tensors: Tensor | None) -> Any:
    """Of a key: True where all have memory; else, of what is empty or has but a shape, how many elements there are and where."""
    for x in tensors:
        if x is not None and not x.data_ptr():
            return tuple((t.numel(), t.device) for t in tensors if t is not None)
    return True


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


def _other() -> int:
    """The dispatcher's keys that a tensor which is memory has not."""
    memory = 0
    for name in _MEMORY:
        memory |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return ~memory


_QUIET, _OTHER = _quiet(), _other()
