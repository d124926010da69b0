"""XLM for `accelerate`: its layers are no modules, but four lists side by side, of which attention and FFNs are computed by us.

The model itself adds, normalizes and sets what stands at padding to 0, so that padding stays in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import masks
from fastattn.integrations.accelerate_layers import heads_of
from fastattn.integrations.accelerate_parts import activation_name
from fastattn.integrations.accelerate_prenorm import LINEARS, Seen, otherwise
from fastattn.ops.attention import attention
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear

MODELS = "XLMModel"


class Attention(NamedTuple):
    models: str = MODELS
    does: str = "fused attention"
    inputs: tuple[str, ...] = ("input", "mask", "kv", "cache", "output_attentions")
    tupled: bool = True

    def proving(self, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Without the cache, to which a call writes, and of real tokens: of a sequence that has none, XLM's own code attends to
        padding."""
        return {**given, "cache": None}, None if given["mask"].dim() == 3 else given["mask"] != 0

    def unserved(self, block: Any, given: dict[str, Any], seen: Seen) -> str | None:
        for name in ("kv", "output_attentions"):
            if given.get(name) is not None and given[name] is not False:
                return f"{name} was given"
        x, mask, cache = given["input"], given.get("mask"), _of_keys(given.get("cache"))
        if not isinstance(mask, Tensor) or mask.shape not in (x.shape[:2], (*x.shape[:2], x.shape[1])):
            return "mask is not (batch, length) or (batch, length, length)"
        if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length(block.layer_id)):
            return "a cache that has keys was given"
        return None

    def made_otherwise(self, block: Any) -> str | None:
        return otherwise(block, dict.fromkeys(("q_lin", "k_lin", "v_lin", "out_lin"), LINEARS))

    def computed(self, block: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> Tensor:
        keep = given["mask"] != 0
        mask = masks.key_padding(keep) if keep.dim() == 2 else masks.dense(keep[:, None])
        q, k, v = heads_of(x, block.n_heads, block.q_lin, block.k_lin, block.v_lin)
        cache = _of_keys(given.get("cache"))
        if cache is not None:
            k, v = cache.update(k, v, block.layer_id)
        y = attention(q, k, v, mask, dropout=block.dropout if block.training else 0.0)
        return linear(y.transpose(1, 2).flatten(-2), block.out_lin.weight, block.out_lin.bias)


class FeedForward(NamedTuple):
    models: str = MODELS
    does: str = "fused FFN"
    inputs: tuple[str, ...] = ("input",)
    tupled: bool = False

    def proving(self, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        return given, None

    def unserved(self, block: Any, given: dict[str, Any], seen: Seen) -> str | None:
        return None

    def made_otherwise(self, block: Any) -> str | None:
        why = otherwise(block, dict.fromkeys(("lin1", "lin2"), LINEARS))
        return why if why is not None or _activation(block) is not None else f"activation {block.act} is not served"

    def computed(self, block: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> Tensor:
        up, down, name = block.lin1, block.lin2, _activation(block)
        assert name is not None
        y = ffn(x, up.weight, up.bias, down.weight, down.bias, activation=name)
        return F.dropout(y, block.dropout, block.training)


HOME = "transformers.models.xlm.modeling_xlm"
KINDS: dict[str, Any] = {f"{HOME}.MultiHeadAttention": Attention(), f"{HOME}.TransformerFFN": FeedForward()}


def _of_keys(cache: Any) -> Any:
    """Of self attention: transformers' cache of encoders and decoders has two."""
    return getattr(cache, "self_attention_cache", cache)


def _activation(block: Any) -> str | None:
    """Our name of what it computes; None: not served."""
    if isinstance(block.act, nn.Module):
        return activation_name(block.act)
    return "relu" if block.act is F.relu else None
