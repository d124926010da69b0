"""CLAP's audio encoder and Donut's for `accelerate`: pre-norm layers over windows of a grid, every other one shifted.

Their attention is of all windows at once, each a sequence of its own, with a bias for each pair of places in a window; in shifted
layers a window that lies around the edge hides its parts from one another, by what the layer's own method adds to scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations.accelerate_layers import heads_of, rate
from fastattn.integrations.accelerate_parts import activation_name
from fastattn.integrations.accelerate_prenorm import DROPOUTS, LINEARS, NORMS, Seen, bias_of, norm_of_sum, otherwise
from fastattn.ops.attention import attention
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear


class Windows(NamedTuple):
    """Layers of one of transformers' models."""

    models: str
    home: str  # where its classes are
    prefix: str  # of their names
    drop_path: str
    does: str = "fused attention, FFN and norms"
    inputs: tuple[str, ...] = ("hidden_states", "input_dimensions", "output_attentions", "always_partition")
    tupled: bool = True

    def proving(self, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        return given, None

    def unserved(self, layer: Any, given: dict[str, Any], seen: Seen) -> str | None:
        if given.get("output_attentions"):
            return "output_attentions=True"
        size = given.get("input_dimensions")
        if not isinstance(size, tuple) or size[0] * size[1] != given[self.inputs[0]].shape[1]:
            return "input_dimensions are not those of the grid"
        return None

    def made_otherwise(self, layer: Any) -> str | None:
        mine: dict[str, tuple[str, ...]] = {path: (f"{self.home}.{self.prefix}{name}",) for path, name in CLASSES.items()}
        mine["drop_path"] = f"{self.home}.{self.drop_path}", "torch.nn.modules.linear.Identity"
        why = otherwise(layer, {**mine, **PLAIN})
        if why is not None:
            return why
        name = activation_name(layer.intermediate.intermediate_act_fn)
        return None if name is not None else f"activation {type(layer.intermediate.intermediate_act_fn).__name__} is not served"

    def computed(self, layer: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> Tensor:
        """x: (B, height width, C)."""
        size = given["input_dimensions"]
        if not given.get("always_partition"):
            layer.set_shift_and_window_size(size)
        up, down = layer.intermediate.dense, layer.output.dense
        normal = norm_of_sum(layer.layernorm_before, x, None, 0.0)[0]
        y, dropout = _attended(layer, normal.unflatten(1, size)), rate(layer.attention.output.dropout)
        if layer.drop_path.training and getattr(layer.drop_path, "drop_prob", 0.0):
            y, dropout = layer.drop_path(F.dropout(y, dropout) if dropout else y), 0.0
        normal, x = norm_of_sum(layer.layernorm_after, y, x, dropout)
        name: Any = activation_name(layer.intermediate.intermediate_act_fn)
        y, dropout = ffn(normal, up.weight, up.bias, down.weight, down.bias, activation=name), rate(layer.output.dropout)
        return x + (F.dropout(y, dropout) if dropout else y)


CLASSES = {  # what follows the prefix
    "attention": "Attention",
    "attention.self": "SelfAttention",
    "attention.output": "SelfOutput",
    "intermediate": "Intermediate",
    "output": "Output",
}
PLAIN = {
    **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), LINEARS),
    **dict.fromkeys(("attention.output.dense", "intermediate.dense", "output.dense"), LINEARS),
    **dict.fromkeys(("attention.self.dropout", "attention.output.dropout", "output.dropout"), DROPOUTS),
    **dict.fromkeys(("layernorm_before", "layernorm_after"), NORMS),
}
CLAP = Windows("transformers' ClapAudioModel", "transformers.models.clap.modeling_clap", "ClapAudio", "ClapDropPath")
DONUT = Windows("DonutSwinModel", "transformers.models.donut.modeling_donut_swin", "DonutSwin", "DonutDropPath")
KINDS = {f"{kind.home}.{kind.prefix}Layer": kind for kind in (CLAP, DONUT)}


def _attended(layer: Any, x: Tensor) -> Tensor:
    """What attention gives each place, (B, height width, C), its last product included. x: (B, height, width, C)."""
    batch, height, width, _ = x.shape
    numbers, out = layer.attention.self, layer.attention.output.dense
    size, shift = layer.window_size, layer.shift_size
    grid, _ = layer.maybe_pad(x, height, width)  # to whole windows
    _, rows, columns, _ = grid.shape
    grid = grid.roll((-shift, -shift), (1, 2)) if shift else grid
    grid = grid.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, rows / S, S, columns / S, S, C)
    windows = grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B W, S S, C)
    hidden = layer.get_attn_mask(rows, columns, dtype=x.dtype, device=x.device)  # (W, S S, S S), added, or None
    q, k, v = heads_of(windows, numbers.num_attention_heads, numbers.query, numbers.key, numbers.value)
    y = attention(q, k, v, bias=bias_of(_bias(numbers, hidden, batch), x), dropout=rate(numbers.dropout))
    y = linear(y.transpose(1, 2).flatten(-2), out.weight, out.bias)
    grid = y.unflatten(1, (size, size)).unflatten(0, (batch, rows // size, columns // size)).transpose(2, 3)
    grid = grid.flatten(3, 4).flatten(1, 2)
    grid = grid.roll((shift, shift), (1, 2)) if shift else grid
    return grid[:, :height, :width].flatten(1, 2)


def _bias(numbers: Any, hidden: Tensor | None, batch: int) -> Tensor:
    """For each pair of places in a window, (1, H, S S, S S), and what hides them, (B W, H, S S, S S)."""
    area = numbers.window_size[0] * numbers.window_size[1]
    bias = numbers.relative_position_bias_table[numbers.relative_position_index.view(-1)].view(area, area, -1)
    bias = bias.permute(2, 0, 1).contiguous()  # every window reads it
    if hidden is None:
        return bias[None]
    return (bias + hidden[:, None]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
