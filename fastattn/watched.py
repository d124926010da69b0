"""Whether a module is as it was: asked in each call by what a CUDA graph of an earlier one rests on.

A graph has the addresses of weights in it, and all that Python decided when it was captured. So both are compared, by C loops
over lists made in advance. Values that are written to a weight in place are none of its business: a graph reads them.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn

TENSORS = (Tensor, nn.Parameter, nn.Buffer)
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # those of a backward pass have no part in inference
GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{name}") for name in FORWARD_HOOKS]
RECORDING = "transformers.utils.output_capturing"  # whose hooks record what a call asks for: that is among its outputs
WITHOUT_NUMBERS = (nn.Linear, nn.Dropout, nn.Identity, nn.ModuleList)  # weights are all that these compute with in inference
INTERNAL = frozenset(vars(nn.Module()))
CHILDREN, TRAINING = operator.itemgetter("_modules"), operator.itemgetter("training")
HOOKS = [*map(operator.itemgetter, FORWARD_HOOKS)]
READ = (Tensor.data_ptr, Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.stride)  # type: ignore[attr-defined]
REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Watched:
    """The modules inside of one, their classes, hooks and instance attributes, by identity, the values in its config, and of
    parameters and buffers where they lie and how."""

    def __init__(self, module: nn.Module, own_hooks: bool) -> None:
        """own_hooks: whether the module's own hooks count as inside."""
        modules = [*module.modules()]
        self._modules, self._attributes = modules, [*map(vars, modules)]
        self._inside = self._attributes if own_hooks else self._attributes[1:]
        self._types, self._counts = [*map(type, modules)], [*map(len, self._attributes)]
        self._children = [dict(m._modules) for m in modules]
        self._classes: list[Any] = [*dict.fromkeys(self._types)]
        self._methods = [c.forward for c in self._classes]
        read = [(vars(m), name) for m in modules for name in vars(m) if _is_read(m, name)]
        self._owners, self._names = [owner for owner, _ in read], [name for _, name in read]
        self._values = [owner[name] for owner, name in read]
        self._config = getattr(module, "config", None)
        self._settings = dict(getattr(self._config, "__dict__", {}))
        registered = [d for m in modules for d in _registered(m)]
        self._empty, self._filled = [d for d in registered if not d], [d for d in registered if d]
        self._loose = [x for x in self._values if isinstance(x, Tensor)]
        tensors = self.tensors()
        self.plain = all(type(x) in TENSORS for x in tensors)  # others may have no address
        self._read = [(f, [*map(f, tensors)]) for f in (type, *(READ if self.plain else ()))]
        self.devices = {x.device for x in tensors}

    def same(self) -> bool:
        return (
            not any(self._empty)
            and all(map(operator.is_, map(type, self._modules), self._types))
            and all(map(operator.eq, map(len, self._attributes), self._counts))
            and [*map(CHILDREN, self._attributes)] == self._children
            and [c.forward for c in self._classes] == self._methods
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and getattr(self._config, "__dict__", {}) == self._settings
            and self._weights_same()
        )

    def _weights_same(self) -> bool:
        tensors = self.tensors()
        if len(tensors) != len(self._read[0][1]):
            return False
        return all(all(map(operator.eq, map(f, tensors), before)) for f, before in self._read)

    def tensors(self) -> list[Tensor]:
        return [x for x in itertools.chain(*map(dict.values, self._filled), self._loose) if x is not None]

    def requires_grad(self) -> bool:
        return any(map(REQUIRES_GRAD, self.tensors()))

    def training(self) -> bool:
        return any(map(TRAINING, self._attributes))

    def hooked(self) -> bool:
        filled = itertools.chain.from_iterable(filter(None, map(hooks, self._inside)) for hooks in HOOKS)
        return any(getattr(hook, "__module__", None) != RECORDING for hooks in filled for hook in hooks.values())


def _registered(module: Any) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    return module._parameters, module._buffers


def _is_read(module: nn.Module, name: str) -> bool:
    """Whether what an instance holds under a name may have a part in what it computes."""
    return name not in INTERNAL and (type(module) not in WITHOUT_NUMBERS or name == "forward")
