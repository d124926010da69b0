"""Fused masked multi-head attention and FFN for encoders: BERT, CLIP, ViT and their kin."""

import torch

from fastattn import batching, biases, graphs, masks, nn
from fastattn.dropout import dropout_mask
from fastattn.integrations.accelerate import accelerate, restore
from fastattn.integrations.torch_sdpa import sdpa_override
from fastattn.kept import clear_packed
from fastattn.ops.attention import attention
from fastattn.ops.attention_explain import explain
from fastattn.ops.attention_qkv import attention_qkv
from fastattn.ops.attention_weights import attention_weights
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import explain_linear, linear
from fastattn.ops.norm import add_layer_norm, add_rms_norm
from fastattn.ops.rotary import rotary, rotary_tables
from fastattn.ops.sdpa import scaled_dot_product_attention
from fastattn.ops.varlen import varlen_attention
from fastattn.packing import Packing
from fastattn.version import __version__

__all__ = [
    "Packing",
    "__version__",
    "accelerate",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_qkv",
    "attention_weights",
    "batching",
    "biases",
    "clear_packed",
    "dropout_mask",
    "explain",
    "explain_linear",
    "ffn",
    "graphs",
    "linear",
    "masks",
    "nn",
    "restore",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "sdpa_override",
    "varlen_attention",
]

# PyTorch calls Intel's vector library (oneMKL 2024.2) from several threads. In the first such call of a process, exp, sqrt or
# erf, it writes down the type of processor in two steps and without a lock: a thread that reads between them computes its part
# of that one call to some twelve bits. So one thread comes first.
torch.exp(torch.zeros(1, dtype=torch.float32, device="cpu"))
