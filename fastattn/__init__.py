"""Fused masked multi-head attention and FFN for encoders: BERT, CLIP, ViT and their kin."""

from fastattn import masks
from fastattn.ops.attention import attention, explain, scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = ["attention", "explain", "masks", "scaled_dot_product_attention"]
