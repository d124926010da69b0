"""CUDA graphs of a module's inference calls: captured on first use, replayed after, each by the shapes of its inputs.

A replay runs what the first call ran, on the memory that it ran on: inputs are copied in, outputs are copied out. So a call is
captured only where nothing else than its inputs can change what it computes, and `Calls` asks in each one whether that is so.

`graphed(model)` is for models of plain tensors, such as those of `fastattn.models`; `fastattn.accelerate(model,
cuda_graphs=True)` uses the same parts. Only `capture` needs a GPU.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastattn.kept import nothing_kept
from fastattn.watched import GLOBAL_HOOKS, TENSORS, Watched

logger = logging.getLogger("fastattn")
DEVICE = "cuda"
LIMIT = 16  # graphs at a time, where nobody says how many
STEPS = 8  # of `bucket`, from one power of two to the next
LEAST = 16  # rows of a bucket
PLAIN = (bool, int, float, str, type(None))  # inputs that are a part of the key by their value
KINDS = frozenset((*PLAIN, *TENSORS))
_thread = threading.local()  # .capturing: inside a warm-up or a capture of ours


def on_gpu(x: Tensor) -> bool:
    return x.device.type == DEVICE


def bucket(tokens: int) -> int:
    """Rows for a packed batch of so many tokens, so that many batches share a graph: at most an eighth more, beyond 128 tokens.

    For `fastattn.Packing.from_mask(mask, capacity=bucket(total))`. There are eight sizes from one power of two to the next.

    >>> [fastattn.graphs.bucket(tokens) for tokens in (1, 1000, 1025)]
    [16, 1024, 1152]
    """
    step = max(LEAST, (1 << max(tokens.bit_length() - 1, 0)) // STEPS)
    return max(-(-tokens // step), 1) * step


class NotCaptured(Exception):
    """A capture failed; the words say why."""


def capture(function: Callable[[], Any], pool: Any, stream: torch.cuda.Stream) -> tuple[Callable[[], None], Any]:
    """The replay of a graph of `function`, and the result of its capture, which a replay writes to. On the current device.

    It runs once before, because first launches load and compile code. What it raises then is raised; what a capture raises is
    a NotCaptured.
    """
    before, random = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    stream.wait_stream(before)
    graph, cause = torch.cuda.CUDAGraph(), None
    with torch.cuda.stream(stream):  # a capture that fails does not leave it
        function()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    result = function()
                except Exception as error:
                    cause = error  # the end of a capture that has failed raises as well, and says less
                    raise
        except Exception as error:
            abandon(stream.device.index, pool)
            torch.cuda.set_rng_state(random)
            raise NotCaptured(_told(cause or error)) from error
    before.wait_stream(stream)
    return graph.replay, result


def _told(error: Exception) -> str:
    first, *_ = f"{error}".strip().splitlines() or [""]
    return f"its capture failed with {type(error).__name__}: {first}"


def abandon(device: int, pool: Any) -> None:
    """Undo what a failed capture leaves behind up to torch 2.12, with which `empty_cache` and random numbers raise."""
    with suppress(RuntimeError):  # of an allocator that no longer believes in the capture
        torch._C._cuda_endAllocateToPool(device, pool)
    fresh = torch.Generator(torch.device("cuda", device)).graphsafe_get_state()
    torch.cuda.default_generators[device].graphsafe_set_state(fresh)


# What is captured


class Captured(NamedTuple):
    inputs: list[Tensor]  # static: a replay reads them
    stream: Any  # whose memory they are
    replay: Callable[[], None]
    output: Any  # what the call gave; a replay writes to the tensors in it

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Nothing waits, and the caller may write to its tensors again, in the host's memory too."""
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x.clone() if not on_gpu(x) and x.is_pinned() else x, non_blocking=True)

    def taken(self) -> Any:
        """What the call gave, in memory of the caller's own."""
        return _copied(self.output, {})


def _copied(x: Any, copies: dict[int, Tensor]) -> Any:
    """x with copies of its tensors, of one that is in it twice the same.

    Of a class of transformers' an object is filled, not made: its fields are items as well, and the class takes longer to check
    them than the copies take.
    """
    if isinstance(x, Tensor):
        if id(x) not in copies:
            copies[id(x)] = x.clone()
        return copies[id(x)]
    kind = type(x)
    if kind in PLAIN:
        return x
    if kind is tuple:
        return tuple([_copied(y, copies) for y in x])
    if not (isinstance(x, OrderedDict) and is_dataclass(x) and kind.__module__.startswith("transformers.")):
        return tree_map(lambda leaf: _copied(leaf, copies) if isinstance(leaf, Tensor) else leaf, x)
    record = kind.__new__(kind)
    vars(record).update(dict.fromkeys(vars(x)))
    for name, y in x.items():
        record[name] = _copied(y, copies)
    return record


class Graphs:
    """At most `limit` of them, the one that was used longest ago thrown out first. They share one pool of memory, so that one
    is replayed after the other, whatever threads and streams call."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.captures = self.replays = 0  # so far
        self._lock = threading.RLock()
        self._captured: OrderedDict[Hashable, Captured | str] = OrderedDict()  # or why there is none
        self._last: Any = None  # the event behind the last replay and the copies of its outputs
        self._pool: Any = None
        self._streams: dict[torch.device, Any] = {}  # captures run on: memory of a pool is a stream's

    def __reduce__(self) -> tuple:
        """A copy starts without graphs."""
        return Graphs, (self.limit,)

    def __len__(self) -> int:
        return sum(isinstance(x, Captured) for x in self._captured.values())

    def drop(self, owner: object = None) -> None:
        """Throw out the graphs of one owner, the first part of their keys; None: all."""
        with self._lock:
            for key in [key for key in self._captured if owner is None or key[0] is owner]:  # type: ignore[index]
                self._throw_out(key)

    def call(self, key: Hashable, inputs: Sequence[Tensor], function: Callable[[list[Tensor]], Any]) -> Any:
        """What function(inputs) gives, by a replay. Raises NotCaptured where there can be none."""
        device = next(x.device for x in inputs if on_gpu(x))
        with self._lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            captured = self._found(key, inputs, function, stream, device)
            try:
                captured.fill(inputs)
                captured.replay()
                self.replays += 1
                return captured.taken()
            finally:
                for x in captured.inputs if stream != captured.stream else ():
                    x.record_stream(stream)
                self._last = stream.record_event()

    def _found(self, key: Hashable, inputs: Any, function: Any, stream: Any, device: torch.device) -> Captured:
        found = self._captured.get(key)
        if found is None:
            while len(self._captured) >= self.limit:
                self._throw_out(next(iter(self._captured)))
            try:
                found = self._capture(inputs, function, stream, device)
                self.captures += 1
            except NotCaptured as error:
                found = str(error)
                logger.warning("a call runs without a CUDA graph: %s", found)
            self._captured[key] = found
        self._captured.move_to_end(key)
        if isinstance(found, str):
            raise NotCaptured(found)
        return found

    def _capture(self, inputs: Any, function: Any, stream: Any, device: torch.device) -> Captured:
        if not len(self):
            self._pool = torch.cuda.graph_pool_handle()  # a pool ends with the last of its graphs
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        inference, output = torch.is_inference_mode_enabled(), None
        # In inference mode, what PyTorch makes for random numbers with its first graph could be written to in that mode alone.
        with torch.inference_mode(False), torch.no_grad():
            static = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs]
            for x, given in zip(static, inputs, strict=True):
                x.copy_(given)

            def run() -> list[Any]:
                nonlocal output
                with torch.inference_mode(inference), torch.no_grad(), _capturing():
                    output = function(static)
                return tree_leaves(output)

            with _collecting_nothing():
                replay, leaves = capture(run, self._pool, self._streams[device])
        strange = next((type(x).__name__ for x in leaves if not isinstance(x, (Tensor, *PLAIN))), None)
        if strange is not None:
            raise NotCaptured(f"its output holds a {strange}")
        return Captured(static, stream, replay, output)

    def _throw_out(self, key: Hashable) -> None:
        """Its memory goes back to the pool; with the last graph, the pool's to the device."""
        if self._last is not None:
            self._last.synchronize()  # what is freed is in use no more
        del self._captured[key]


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Inside, no garbage is collected: a graph that is destroyed during a capture makes it fail."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _capturing() -> Iterator[None]:
    """Inside, on this thread, nothing that is made of weights is kept or used, and no call is captured by itself."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    _thread.capturing = True
    try:
        with nothing_kept():
            yield
    finally:
        _thread.capturing = False
        torch.set_autocast_cache_enabled(cached)


# What may be captured


class Calls:
    """Calls of one module: which of them may be captured, and that what was captured still holds."""

    def __init__(
        self,
        module: nn.Module,
        graphs: Graphs,
        *,
        own_hooks: bool = True,
        refuse: Callable[[nn.Module], str | None] | None = None,
    ) -> None:
        """own_hooks: whether the module's own hooks run inside of what is captured. refuse: why a module, as it is, cannot be
        captured at all, or None; asked again after each change."""
        self.module, self.graphs, self.own_hooks, self.refuse = module, graphs, own_hooks, refuse
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own module."""
        return {name: x for name, x in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._owner = object()
        self._lock = threading.Lock()
        self._watched: Watched | None = None
        self._doubted = False
        self._strange: str | None = None
        self._changes = 0  # in so many calls, one after the other

    def unchanged(self) -> bool:
        """Whether nothing in the module is another than when `refusal` looked at it last, and no hook would see what happens
        inside of it in inference. False where `doubt` was called since."""
        with self._lock:
            if self._watched is None or self._doubted or any(GLOBAL_HOOKS):
                return False
            return self._watched.same() and not self._watched.hooked()

    def doubt(self) -> None:
        """What others conclude from the module was concluded anew, maybe of another state than `refusal` has seen."""
        self._doubted = True

    def refusal(self, inputs: Sequence[Any], unchanged: bool = False) -> str | None:
        """Why a call with these inputs, tensors and others, is not to be captured, or None.

        unchanged: that `unchanged` has said so in this call; what it has looked at is not looked at again.
        """
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        why = _refused_inputs(inputs, tensors) or _refused_here()
        if why is not None:
            return why
        with self._lock:
            return self._refused_module(tensors, unchanged)

    def _refused_module(self, tensors: list[Tensor], unchanged: bool) -> str | None:
        watched = self._look(unchanged)
        if self._changes > 1:
            return "the model, or where its weights lie, changes from call to call"
        if watched.training():
            return "the model is in training mode"
        if not unchanged and watched.hooked():
            return "there are hooks inside, which a replay would not run"
        if torch.is_grad_enabled() and (watched.requires_grad() or any(x.requires_grad for x in tensors)):
            return "a gradient may be wanted: call it under torch.no_grad() or torch.inference_mode()"
        if not watched.plain:
            return "its weights are not all plain tensors"
        if not watched.devices <= {tensors[0].device}:
            return f"its weights are not all on {tensors[0].device}"
        return self._strange

    def _look(self, unchanged: bool) -> Watched:
        """The module as it is now; what was captured of it as it was before is dropped."""
        self._doubted = False
        if self._watched is not None and (unchanged or self._watched.same()):
            self._changes = 0
            return self._watched
        self.graphs.drop(self._owner)
        self._changes += self._watched is not None
        self._watched = Watched(self.module, self.own_hooks)
        self._strange = None if self.refuse is None else self.refuse(self.module)
        return self._watched

    def __call__(self, key: tuple, inputs: Sequence[Tensor], function: Callable[[list[Tensor]], Any]) -> Any:
        """What function(inputs) gives, by a replay; `refusal` has been asked. key: what else it depends on.

        Raises NotCaptured where a capture has failed.
        """
        shapes = tuple((x.shape, x.dtype, on_gpu(x)) for x in inputs)
        return self.graphs.call((self._owner, key, shapes, *_state()), inputs, function)


def _refused_inputs(inputs: Sequence[Any], tensors: list[Tensor]) -> str | None:
    elsewhere = [x.device for x in tensors if not on_gpu(x)]
    if elsewhere or not tensors:
        return f"only calls on a CUDA device are captured, and this one is on {elsewhere[0] if elsewhere else 'none'}"
    strange = [type(x).__name__ for x in inputs if type(x) not in KINDS]
    if strange:
        return f"an input is a {strange[0]}"
    device = tensors[0].device
    for x in tensors:
        if x.device != device:
            return "the inputs are on several devices"
        if x.layout is not torch.strided:
            return "an input is sparse"
        if x.numel() == 0:
            return "an input is empty"
    return None


def _refused_here() -> str | None:
    """Why nothing is captured where this call is made, or None."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is traced or compiled"
    if getattr(_thread, "capturing", False) or torch.cuda.is_current_stream_capturing():
        return "it is part of another capture"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "it is inside a transformation of torch.func or a forward-mode derivative"
    if any(type(mode) is not DeviceContext for mode in _modes()) or torch._C._len_torch_dispatch_stack():
        return "a mode that sees each torch function is on"
    return "there are hooks on every module, which a replay would not run" if any(GLOBAL_HOOKS) else None


def _modes() -> Sequence[Any]:
    return torch.overrides._get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()


def _state() -> tuple:
    """What decides how a call is computed, beside its module and its inputs. The switches of torch.backends are asked
    for what their properties ask for, in Python."""
    c = torch._C
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE),
        tuple([mode.device for mode in _modes()]),
        torch.get_default_dtype(),
        c._get_fp32_precision_getter("cuda", "matmul"),
        c._get_fp32_precision_getter("cuda", "conv"),
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_cublas_allow_fp16_accumulation(),
        c._get_deterministic_algorithms(),
        c._get_cudnn_enabled(), c._get_cudnn_deterministic(),
        c._get_flash_sdp_enabled(), c._get_mem_efficient_sdp_enabled(), c._get_math_sdp_enabled(), c._get_cudnn_sdp_enabled(),
    )  # fmt: skip


# Models of plain tensors


class Graphed:
    """A model, or a method of one, whose inference calls are replays of CUDA graphs.

    not_captured: why calls ran as they were, and how many.
    """

    def __init__(self, call: Callable, module: nn.Module, limit: int) -> None:
        self.not_captured: Counter[str] = Counter()
        self._call, self._calls = call, Calls(module, Graphs(limit))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        why = self._calls.refusal(leaves)
        if why is None:
            try:
                return self._replayed(leaves, spec)
            except NotCaptured as error:
                why = str(error)
        self.not_captured[why] += 1
        return self._call(*args, **kwargs)

    def _replayed(self, leaves: list[Any], spec: Any) -> Any:
        def run(static: list[Tensor]) -> Any:
            given = iter(static)
            args, kwargs = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
            return self._call(*args, **kwargs)

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = (spec, *((type(x), None if isinstance(x, Tensor) else x) for x in leaves))
        return self._calls(key, tensors, run)

    def clear(self) -> None:
        """Drop the graphs, and give back their memory."""
        self._calls.graphs.drop()

    def __repr__(self) -> str:
        graphs = self._calls.graphs
        return f"<Graphed {type(self._calls.module).__name__}: {len(graphs)} graphs, at most {graphs.limit}>"


def check_limit(limit: Any, name: str) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"{name} must be a number of graphs, got {limit!r}")
    if limit < 1:
        raise ValueError(f"{name} must be at least 1, got {limit}")


def graphed(call: Callable, limit: int = LIMIT) -> Graphed:
    """A callable that does what a model does, by replays of CUDA graphs where a call can be one.

    For models whose inputs are tensors, Packings and plain values, such as those of `fastattn.models`; `fastattn.accelerate`
    has `cuda_graphs` for Hugging Face's. A call is captured the first time that its shapes, dtypes and plain values are seen,
    and replayed afterwards: the same kernels on the same memory, with one launch from the host. Inputs are copied in, outputs
    are copies that belong to the caller. Weights may change in place; where one is replaced, moved or cast, or a module or a
    number in it is changed, the next call is captured anew.

    Args:
        call: a module, or a method of one: `graphed(clip.get_text_features)`.
        limit: graphs at a time; the one that was used longest ago is dropped for a new one.

    Returns:
        A `Graphed`: call it as you would call the model. `not_captured` counts the calls that ran as they were, by reason: in
        training mode, with a gradient wanted, with hooks inside, traced or compiled, on a CPU. `clear()` drops the graphs.

    Raises:
        TypeError, ValueError: `call` belongs to no module, or `limit` is not a number from 1 on.

    The code of the model must do the same in each call with such inputs: what it prints, counts or reads on the host happens in
    the capture alone, or makes it fail, and a tensor that it keeps beside weights and buffers has to stay where it is. A packing
    needs a capacity that many batches share, see `bucket`.

    >>> model = fastattn.graphs.graphed(torch.nn.Linear(4, 2))
    >>> model(torch.ones(1, 4)).shape, dict(model.not_captured)
    (torch.Size([1, 2]), {'only calls on a CUDA device are captured, and this one is on cpu': 1})
    """
    check_limit(limit, "limit")
    module = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"call must be a torch.nn.Module or a method of one, got {type(call).__name__}")
    return Graphed(call, module, limit)
