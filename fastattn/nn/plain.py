"""Whether a part of a layer is what it seems, so that its weights may be read past its `forward`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def is_plain(part: Any, *classes: type) -> bool:
    """Of one of these classes exactly, without hooks, and with its class's `forward`: not one that an adapter has replaced, nor
    one whose weight is made anew before each call."""
    return type(part) in classes and not has_hooks(part) and "forward" not in vars(part)


def has_hooks(part: nn.Module) -> bool:
    return any(getattr(part, name) for name in HOOKS)
