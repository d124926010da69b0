"""What every op shares: its registration with PyTorch, the choice of a backend, and the refusal of second derivatives.

A backend is a plain module per op, `fastattn.kernels.<backend>.<op>`, with `unsupported(problem) -> list[str]`, `forward` and
`backward`. `choose` walks the op's ordered tuple of backends; the first without a reason serves.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fastattn", "DEF")
below_autograd = torch._C._AutoDispatchBelowAutograd
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
    """Whether a call must be recorded, or, in a forward-mode level, must reach the Function that refuses it."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0


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


def rejections(op: str, backends: tuple[str, ...], problem: Problem) -> dict[str, list[str]]:
    """For each backend of an op the sentences that say why it cannot serve; an empty list means it can."""
    return {name: _reasons(op, name, problem) for name in backends}


@functools.lru_cache(maxsize=4096)
def choose(op: str, backends: tuple[str, ...], problem: Problem, backend: str):
    """The module that serves the problem: the named one, or for "auto" the first that can.

    Raises NotImplementedError with the backend's own sentences; a named backend never falls back.
    """
    reasons: dict[str, list[str]] = {}
    for name in candidates(backends, problem, backend):
        reasons[name] = _reasons(op, name, problem)
        if not reasons[name]:
            return _module(op, name)
    lines = [f"  {name}: {'; '.join(sentences)}" for name, sentences in reasons.items()]
    raise NotImplementedError(f"no backend serves {problem}\n" + "\n".join(lines))


def candidates(backends: tuple[str, ...], problem: Problem, backend: str) -> tuple[str, ...]:
    """The backends that a request may use: "auto" leaves the interpreter of GPU kernels to tests."""
    if backend == "auto":
        return tuple(name for name in backends if name != "triton" or problem.device != "cpu")
    return (backend,)


def check_backend(backend: str, backends: tuple[str, ...]) -> None:
    if backend != "auto" and backend not in backends:
        raise ValueError(f"backend must be one of {', '.join(('auto', *backends))}; got {backend!r}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for x, or None where it is off or x is not a floating point number it would cast."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _reasons(op: str, backend: str, problem: Problem) -> list[str]:
    try:
        return _module(op, backend).unsupported(problem)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("fastattn"):
            raise
        return [f"{error.name} is not installed"]


def _module(op: str, backend: str):
    return importlib.import_module(f"fastattn.kernels.{backend}.{op}")
