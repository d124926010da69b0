"""`FeedForward`: the two linear maps of a transformer layer with an activation between them, by `fastattn.ffn`.

F: hidden features. A gated activation multiplies F of the 2 F features of the first map by the activation of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.activations import ACTIVATIONS, GATED
from fastattn.nn.plain import LINEAR, is_plain
from fastattn.nn.shards import Shards
from fastattn.ops.ffn import ffn

FUNCTIONS = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu", torch.relu: "relu"}  # and ours for an equal
MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}


class FeedForward(nn.Module):
    """dropout(act(x W1^T + b1)) W2^T + b2, or with a gated activation dropout(act(x W1a^T + b1a) * (x W1b^T + b1b)) W2^T + b2.

    Args:
        d_model: features of x and of the result.
        dim_feedforward: F. `linear1.weight` is (F, d_model), or of a gated activation (2 F, d_model), the activated rows first.
        activation: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "geglu", "geglu_tanh", "swiglu"; or one of F.relu, F.gelu,
            F.silu, nn.ReLU(), nn.GELU(), nn.SiLU().
        dropout: of the hidden features, in training.
        bias, device, dtype: as of nn.Linear. backend: "auto", "triton", "cpu" or "eager".

    Raises:
        ValueError: another activation.

    >>> fastattn.nn.FeedForward(32, 64, activation="swiglu")(torch.randn(2, 7, 32)).shape
    torch.Size([2, 7, 32])
    """

    shards: Shards | None = None  # of `FeatureParallel`: parameters are divided

    def __init__(
        self, d_model: int, dim_feedforward: int = 2048, activation: str | Callable = "gelu", dropout: float = 0.0,
        bias: bool = True, device: Any = None, dtype: torch.dtype | None = None, *, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.backend = activation_name(activation), backend
        rows = first_rows(dim_feedforward, self.activation)
        self.linear1 = nn.Linear(d_model, rows, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model)."""
        return own_memory(feed_forward(self, x))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def feed_forward(module: Any, x: Tensor) -> Tensor:
    """By linear1, linear2, activation, dropout and backend of a module, which may be a rank's part of one."""
    linear1, linear2, shards = module.linear1, module.linear2, module.shards
    if not (is_plain(linear1, *LINEAR) and is_plain(linear2, *LINEAR) and is_plain(module.dropout, nn.Dropout)):
        return linear2(module.dropout(activated(linear1(x), module.activation)))
    options: dict[str, Any] = {"activation": module.activation, "dropout": rate(module.dropout), "backend": module.backend}
    if shards is None:
        return ffn(x, linear1.weight, linear1.bias, linear2.weight, linear2.bias, **options)
    blocks = (1, 1) if module.activation in GATED else (1,)
    weight = shards.rows(linear1.weight, blocks)
    bias = None if linear1.bias is None else shards.rows(linear1.bias, blocks)
    seed = shards.seed(x.device) if options["dropout"] else None
    part = ffn(shards.enter(x), weight, bias, linear2.weight.to_local(), None, seed=seed, **options)
    return shards.leave(part, linear2.bias)


def activated(z: Tensor, activation: str) -> Tensor:
    """In plain PyTorch."""
    if activation not in GATED:
        return ACTIVATIONS[activation][0](z)
    a, b = z.chunk(2, -1)
    return ACTIVATIONS[GATED[activation]][0](a) * b


def own_memory(x: Tensor) -> Tensor:
    """x as it is, and no view: what torch.nn gives may be changed in place."""
    return torch.ops.aten._unsafe_view(x, x.shape)


def first_rows(dim_feedforward: int, activation: str) -> int:
    return 2 * dim_feedforward if activation in GATED else dim_feedforward


def rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def activation_name(activation: str | Callable) -> str:
    """Our name of an activation that torch.nn may have been given. Raises ValueError for one that has none."""
    names = (*ACTIVATIONS, *GATED)
    if isinstance(activation, str) and activation in names:
        return activation
    if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
        return "gelu_tanh"
    name = MODULES.get(type(activation)) if isinstance(activation, nn.Module) else None  # type: ignore[arg-type]
    if name is None and not isinstance(activation, (str, nn.Module)):
        name = FUNCTIONS.get(activation)
    if name is None:
        known = "one of F.relu, F.gelu, F.silu, nn.ReLU(), nn.GELU(), nn.SiLU()"
        raise ValueError(f"activation must be a name, {', '.join(names)}, or {known}; got {activation!r}")
    return name
