"""The shapes that the suite measures, and what each needs at least: useful FLOPs and bytes.

Padding never counts as useful, causal masks count their half, and a backward pass counts 2.5 times its forward in attention
(five products instead of two) and 2 times elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of one layer: heads H, length S, head dimension D. batch and cpu_batch: sequences on a GPU and on a CPU."""

    name: str
    H: int
    S: int
    D: int = 64
    causal: bool = False
    fills: tuple[float, ...] = (1.0,)
    batch: int = 32
    cpu_batch: int = 4


ATTENTION = (
    AttentionShape("bert-base-128", 12, 128, fills=(1.0, 0.5), cpu_batch=8),
    AttentionShape("bert-base-512", 12, 512, fills=(1.0, 0.5), cpu_batch=2),
    AttentionShape("clip-text-77", 8, 77, causal=True, fills=(1.0, 0.5), cpu_batch=8),
    AttentionShape("clip-vision-50", 12, 50, cpu_batch=8),
    AttentionShape("clip-vision-197", 12, 197),
    AttentionShape("clip-vision-257", 16, 257),
)


@dataclass(frozen=True)
class FeedForwardShape:
    """The FFN of one layer, and its add + LayerNorm: width d, hidden width F, tokens on a GPU and on a CPU."""

    name: str
    d: int
    F: int
    activation: str
    tokens: int
    cpu_tokens: int


FEED_FORWARD = (
    FeedForwardShape("bert-base", 768, 3072, "gelu", 32 * 128, 1024),
    FeedForwardShape("clip-text", 512, 2048, "quick_gelu", 32 * 77, 616),
)


def ragged_lengths(batch: int, longest: int, fill: float) -> Tensor:
    """(batch,) int64 lengths with a mean of about fill * longest, spread from short to `longest`, in a fixed shuffled order.

    u ** (1 / fill - 1) has the mean `fill` for u uniform in (0, 1). The longest sequence fills its row, as in a real batch.
    """
    if not 0 < fill <= 1:
        raise ValueError(f"fill must be in (0, 1], got {fill}")
    u = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    lengths = (longest * u ** (1 / fill - 1)).round().clamp(1, longest).long()
    if batch > 1:
        lengths[-1] = longest
    return lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def attention_work(lengths: Tensor, H: int, D: int, causal: bool, itemsize: int) -> dict[str, tuple[float, float]]:
    """Useful (FLOPs, bytes) of "forward" and "backward": only real tokens and visible pairs, every tensor moved once."""
    n = lengths.double()
    return pairs_work(float((n * (n + 1) / 2).sum() if causal else (n * n).sum()), float(n.sum()), H, D, itemsize)


def pairs_work(pairs: float, tokens: float, H: int, D: int, itemsize: int) -> dict[str, tuple[float, float]]:
    """`attention_work` where each head has so many visible pairs, over all sequences."""
    elements = tokens * H * D * itemsize  # one of q, k, v, out, dout, dq, dk, dv
    lse = tokens * H * 4
    return {
        "forward": (4 * D * pairs * H, 4 * elements + lse),
        "backward": (10 * D * pairs * H, 8 * elements + lse),
    }


def feed_forward_work(shape: FeedForwardShape, tokens: int, itemsize: int) -> dict[str, tuple[float, float]]:
    """Useful (FLOPs, bytes) of both linears: x and y of each pass and the two weights, read or written once."""
    weights, x = 2 * shape.d * shape.F, tokens * shape.d
    return {
        "forward": (2.0 * tokens * weights, (weights + 2 * x) * itemsize),
        "backward": (4.0 * tokens * weights, (2 * weights + 3 * x + tokens * shape.F) * itemsize),
    }


def norm_work(d: int, tokens: int, itemsize: int) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes) of y = LayerNorm(x + residual): it reads two and writes one tensor; backward reads dy and the sum."""
    elements = tokens * d
    return {"forward": (8.0 * elements, 3.0 * elements * itemsize), "backward": (14.0 * elements, 3.0 * elements * itemsize)}


@dataclass(frozen=True)
class Tower:
    """One stack of encoder layers over `positions` tokens at most."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    positions: int
    causal: bool = False

    def work(self, lengths: Tensor, itemsize: int) -> tuple[float, float]:
        """Useful (FLOPs, bytes) of a forward pass: the four projections, the FFN and attention on real tokens.

        Bytes: every weight once, and the hidden state once in and once out of each layer.
        """
        weights = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        tokens = float(lengths.sum())
        attention, _ = attention_work(lengths, self.heads, self.hidden // self.heads, self.causal, itemsize)["forward"]
        moved = (weights + 2 * self.layers * tokens * self.hidden) * itemsize
        return 2 * weights * tokens + self.layers * attention, moved

    def config(self, **extra) -> dict:
        """The keys that Hugging Face's text and vision configs share."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, **extra,
        }  # fmt: skip


def towers(config: dict) -> list[Tower]:
    """The towers of a BERT or CLIP config.json, as dictionaries: [text] or [text, vision]."""

    def read(part: dict, positions: int, causal: bool) -> Tower:
        layers, heads = part["num_hidden_layers"], part["num_attention_heads"]
        return Tower(layers, part["hidden_size"], heads, part["intermediate_size"], positions, causal)

    if "vision_config" not in config:
        return [read(config, config["max_position_embeddings"], False)]
    text, vision = config["text_config"], config["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return [read(text, text["max_position_embeddings"], True), read(vision, patches + 1, False)]


def bert(layers: int, hidden: int, heads: int) -> dict:
    tower = Tower(layers, hidden, heads, 4 * hidden, 512)
    return {"model_type": "bert", "vocab_size": 30522, "hidden_act": "gelu", "max_position_embeddings": 512, **tower.config()}


def torch_encoder(layers: int, hidden: int, heads: int) -> dict:
    """torch.nn.TransformerEncoder with BERT's layers, and no embeddings."""
    return {**bert(layers, hidden, heads), "model_type": "torch-encoder"}


def clip(text: Tower, vision: Tower, patch: int, projection: int) -> dict:
    words = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    image = {"image_size": 224, "patch_size": patch}
    return {
        "model_type": "clip", "projection_dim": projection,
        "text_config": text.config(hidden_act="quick_gelu", **words),
        "vision_config": vision.config(hidden_act="quick_gelu", **image),
    }  # fmt: skip


CLIP_B_TEXT, CLIP_B_VISION = Tower(12, 512, 8, 2048, 77), Tower(12, 768, 12, 3072, 0)
CONFIGS = {
    "bert-base": bert(12, 768, 12),
    "bert-large": bert(24, 1024, 16),
    "clip-vit-b-32": clip(CLIP_B_TEXT, CLIP_B_VISION, 32, 512),
    "clip-vit-b-16": clip(CLIP_B_TEXT, CLIP_B_VISION, 16, 512),
    "clip-vit-l-14": clip(Tower(12, 768, 12, 3072, 77), Tower(24, 1024, 16, 4096, 0), 14, 768),
    "torch-encoder": torch_encoder(12, 768, 12),
}
MODELS = ("minilm", "digits-clip", *CONFIGS)
