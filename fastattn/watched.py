"""Whether a module is as it was: asked in each call by what a CUDA graph of an earlier one rests on.

A graph has the addresses of weights in it, and all that Python decided when it was captured. So both are compared, by C loops
over lists made in advance: a model has hundreds of modules and weights, and this is most of what a replay costs the host. Values
that are written to a weight in place are none of its business: a graph reads them.
"""

from __future__ import annotations

import gc
import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

TENSORS = (Tensor, nn.Parameter, nn.Buffer)
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # those of a backward pass have no part in inference
GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{name}") for name in FORWARD_HOOKS]
RECORDING = "transformers.utils.output_capturing"  # whose hooks record what a call asks for: that is among its outputs
WITHOUT_NUMBERS = (nn.Linear, nn.Dropout, nn.Identity, nn.ModuleList)  # weights are all that these compute with in inference
UNREAD = frozenset(vars(nn.Module())) | {"_is_hf_initialized", "_replicate_for_data_parallel"}  # no part in what is computed
REGISTERED = ("_parameters", "_buffers")
CHILDREN, TRAINING = operator.itemgetter("_modules"), operator.itemgetter("training")
HOOKS = [*map(operator.itemgetter, FORWARD_HOOKS)]
LAYOUT = (type, Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.stride)  # type: ignore[attr-defined]
REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Watched:
    """The modules inside of one, their classes, hooks and instance attributes, by identity, the values in its config, and its
    parameters and buffers, where they lie and how."""

    def __init__(self, module: nn.Module, own_hooks: bool) -> None:
        """own_hooks: whether the module's own hooks count as inside."""
        modules = [*module.modules()]
        self._modules, self._attributes = modules, [*map(vars, modules)]
        self._inside = self._attributes if own_hooks else self._attributes[1:]
        self._types, self._counts = [*map(type, modules)], [*map(len, self._attributes)]
        self._parents, self._leaves = ([a for a in self._attributes if bool(a["_modules"]) is some] for some in (True, False))
        self._children = [dict(a["_modules"]) for a in self._parents]
        self._classes: list[Any] = [*dict.fromkeys(self._types)]
        self._methods = [c.forward for c in self._classes]
        read = [(vars(m), name) for m in modules for name in vars(m) if _is_read(m, name)]
        self._owners, self._names = [owner for owner, _ in read], [name for _, name in read]
        self._values = [owner[name] for owner, name in read]
        self._config = getattr(module, "config", None)
        self._settings = dict(getattr(self._config, "__dict__", {}))
        self._holders = [(operator.itemgetter(name), [a for a in self._attributes if a[name]]) for name in REGISTERED]
        self._empty = [a[name] for a in self._attributes for name in REGISTERED if not a[name]]
        self._registered = self._held()
        self._note_tensors([x for x in (*self._registered, *self._values) if isinstance(x, Tensor)])

    def _note_tensors(self, tensors: list[Tensor]) -> None:
        self._tensors = [*{id(x): x for x in tensors}.values()]  # a tied weight once
        self.plain = all(type(x) in TENSORS for x in self._tensors)  # others may have no address
        self._addresses = [*map(Tensor.data_ptr, self._tensors)] if self.plain else []
        self._layouts = Layouts(self._tensors) if self.plain else None
        self.devices = {x.device for x in self._tensors}

    def same(self) -> bool:
        return (
            [*map(type, self._modules)] == self._types
            and [*map(len, self._attributes)] == self._counts
            and [*map(CHILDREN, self._parents)] == self._children
            and not any(map(CHILDREN, self._leaves))
            and [c.forward for c in self._classes] == self._methods
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and getattr(self._config, "__dict__", {}) == self._settings
            and not any(self._empty)
            and _identical(self._held(), self._registered)
            and (self._layouts is None or self._weights_stay())
        )

    def _held(self) -> list[Any]:
        """What is registered now. The dicts are those that modules have now; the collector lists what is in them at once."""
        return gc.get_referents(*chain.from_iterable(map(get, owners) for get, owners in self._holders))

    def _weights_stay(self) -> bool:
        """Whether tensors that are the same objects lie where they did, and so: `.data = ` changes both."""
        return [*map(Tensor.data_ptr, self._tensors)] == self._addresses and self._layouts.same()  # type: ignore[union-attr]

    def requires_grad(self) -> bool:
        return any(map(REQUIRES_GRAD, self._tensors))

    def training(self) -> bool:
        return any(map(TRAINING, self._attributes))

    def hooked(self) -> bool:
        filled = chain.from_iterable(filter(None, map(hooks, self._inside)) for hooks in HOOKS)
        return any(getattr(hook, "__module__", None) != RECORDING for hooks in filled for hook in hooks.values())


class Layouts:
    """Of tensors, all different: the class, dtype, shape and strides of each.

    PyTorch has a guard of all of that in one call, several times faster than one call for each. It fails as well where no more
    than inference mode, autocast or what requires gradients is another; so where it fails, all is compared, and it is made anew.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._before = [[*map(read, tensors)] for read in LAYOUT]
        self._guard = _guard(tensors)

    def same(self) -> bool:
        if self._guard is not None and self._guard.check(*self._tensors):
            return True
        if [[*map(read, self._tensors)] for read in LAYOUT] != self._before:
            return False
        self._guard = _guard(self._tensors)
        return True


def _guard(tensors: list[Tensor]) -> Any:
    """None where there are no tensors, or PyTorch has no such guard: it is not a part of its public interface."""
    guard = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    return guard(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None) if guard is not None and tensors else None


def _identical(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _is_read(module: nn.Module, name: str) -> bool:
    """Whether what an instance holds under a name may have a part in what it computes."""
    return name not in UNREAD and (type(module) not in WITHOUT_NUMBERS or name == "forward")
