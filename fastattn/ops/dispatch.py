"""What every op shares: its registration with PyTorch, the choice of a backend, and the refusal of second derivatives.

A backend is a plain module per op, `fastattn.kernels.<backend>.<op>`, with `unsupported(problem) -> list[str]`, `forward` and
`backward`, and maybe `notes(problem) -> list[str]`: what it does that a user should know. `choose` walks the op's ordered tuple
of backends; the first without a reason serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import planned

LIBRARY = torch.library.Library("fastattn", "DEF")
below_autograd = torch._C._AutoDispatchBelowAutograd
GPU_BACKENDS = ("triton", "cuda")  # on a CPU these are interpreted or emulated
_functorch = torch._C._functorch
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


class Problem(Protocol):
    """A frozen, hashable description of one request, made from metadata alone."""

    @property
    def device(self) -> str: ...


def define(schema: str, implementation: Callable, fake: Callable, autograd: Callable) -> torch._ops.OpOverload:
    """Register an op: its kernel entry for CPU and CUDA, its shapes, and what runs when a gradient is wanted.

    Without the autograd entry an exported module would train with gradients of None, silently.
    """
    name = schema.split("(")[0]

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # what is to be cast was cast by the public function
            return implementation(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastattn, name).default


def wants_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call must be recorded, or, in a forward-mode level, must reach the Function that refuses it.

    Raises NotImplementedError inside `torch.vmap` where what is mapped over needs a gradient: it would be lost without a word.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
        if _functorch.maybe_current_level() is not None and any(_mapped_over_requires_grad(tensor) for tensor in tensors):
            raise NotImplementedError("fastattn has no gradients under torch.vmap: use a batch dimension, or torch.no_grad()")
    return forward_ad._current_level >= 0


def _mapped_over_requires_grad(tensor: Tensor | None) -> bool:
    while tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor is not None and tensor.requires_grad


class FirstDerivative(torch.autograd.Function):
    """Runs a backward op so that differentiating it again raises; PyTorch's `once_differentiable` would give zeros silently."""

    @staticmethod
    def forward(ctx, op, *args):
        with below_autograd():
            return op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("fastattn has no second derivatives: a gradient of its gradients was asked for")


def call_backward(op: torch._ops.OpOverload, *args: Any) -> tuple[Tensor, ...]:
    """Run a backward op, recorded (so that a second derivative raises) only where a graph of gradients is being built."""
    if wants_autograd(*(x for x in args if isinstance(x, Tensor))):
        return FirstDerivative.apply(op, *args)
    with below_autograd():
        return op(*args)


def choose(op: str, backends: tuple[str, ...], backend: str, *problems: Problem):
    """The module that serves all the problems of a request: the named one, or for "auto" the first that can.

    Raises NotImplementedError with the backend's own sentences; a named backend never falls back.
    """
    reasons: dict[str, list[str]] = {}
    for name in candidates(backends, problems[0], backend):
        reasons[name] = [reason for problem in problems for reason in _reasons(op, name, problem)]
        if not reasons[name]:
            return backend_module(op, name)
    lines = [f"  {name}: {'; '.join(dict.fromkeys(sentences))}" for name, sentences in reasons.items()]
    raise NotImplementedError(f"no backend serves {' and '.join(map(str, problems))}\n" + "\n".join(lines))


def candidates(backends: tuple[str, ...], problem: Problem, backend: str) -> tuple[str, ...]:
    """The backends that a request may use: "auto" leaves the interpreter and the emulator of GPU kernels to tests."""
    if backend == "auto":
        on_cpu = problem.device == "cpu" and not planned.pretending
        return tuple(name for name in backends if name not in GPU_BACKENDS or not on_cpu)
    return (backend,)


@dataclass(frozen=True)
class Explanation:
    """What an op would do with a request. `str()` of it is for reading."""

    problem: Problem
    backend: str  # "none" where nothing serves the request
    rejected: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)  # of a verbose explanation

    def __str__(self) -> str:
        lines = [f"{self.problem}", f"  served by: {self.backend}"]
        lines += [f"  not by {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines + [f"  {detail}" for detail in self.details])


def explain(op: str, backends: tuple[str, ...], problem: Problem, backend: str, notes: list[str]) -> Explanation:
    """The choice that `choose` would make, the reasons against the others, and `notes` with those of the chosen module."""
    allowed = candidates(backends, problem, backend)
    rejected, chosen = {}, "none"
    for name in backends:
        reasons = _reasons(op, name, problem)
        if name not in allowed and not reasons:
            reasons = [f"backend={backend!r} was asked for"] if backend != "auto" else ["auto runs no GPU kernel on a CPU"]
        if reasons:
            rejected[name] = reasons
        elif chosen == "none":
            chosen = name
    if chosen != "none":
        notes = notes + getattr(backend_module(op, chosen), "notes", lambda _: [])(problem)
    return Explanation(problem, chosen, rejected, notes)


def check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        hint = ": pass its .weight and .bias" if isinstance(getattr(x, "weight", None), Tensor) else ""
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}{hint}")


def check_backend(backend: str, backends: tuple[str, ...]) -> None:
    if backend != "auto" and backend not in backends:
        raise ValueError(f"backend must be one of {', '.join(('auto', *backends))}; got {backend!r}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for x, or None where it is off or x is not a floating point number it would cast."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _reasons(op: str, backend: str, problem: Problem) -> list[str]:
    try:
        return backend_module(op, backend).unsupported(problem)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("fastattn"):
            raise
        return [f"{error.name} is not installed"]


def backend_module(op: str, backend: str):
    return importlib.import_module(f"fastattn.kernels.{backend}.{op}")
