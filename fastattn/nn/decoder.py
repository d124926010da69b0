"""`DecoderLayer`: torch.nn.TransformerDecoderLayer, by fastattn's ops: self-attention, attention over a memory, feed-forward.

B, L, S, E: sequences, their length, that of the memory, features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.masks import Mask
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.encoder import dropped, norm_of, norm_of_sum
from fastattn.nn.feed_forward import activation_name, feed_forward, first_rows
from fastattn.nn.rotary import Rotary
from fastattn.nn.shards import Shards
from fastattn.packing import Packing


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention over a memory and a feed-forward block, each with dropout, a residual sum and a LayerNorm.

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as of
            torch.nn.TransformerDecoderLayer, and so is the state dict; torch.nn.TransformerDecoder takes such a layer.
        activation: as of `FeedForward`.
        num_kv_heads, backend: as of `MultiHeadAttention`, for both attentions; rotary, alibi: for self-attention.

    Raises:
        ValueError: an argument does not fit.

    >>> layer = fastattn.nn.DecoderLayer(32, 4, 64, batch_first=True)
    >>> words, image = torch.randn(2, 7, 32), torch.randn(2, 16, 32)
    >>> layer(words, image, mask=fastattn.masks.causal()).shape
    torch.Size([2, 7, 32])
    """

    shards: Shards | None = None  # of `LayerParallel`: parameters are divided, and perhaps the sequence of tgt

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: Rotary | None = None,
        alibi: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"batch_first": batch_first, "num_kv_heads": num_kv_heads, "backend": backend}
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout, bias, rotary=rotary, alibi=alibi, **options, **like)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, dropout, bias, **options, **like)
        self.activation, self.norm_first, self.backend = activation_name(activation), norm_first, backend
        self.linear1 = nn.Linear(d_model, first_rows(dim_feedforward, self.activation), bias=bias, **like)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **like)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **like) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(3))

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        mask: Mask | Tensor | None = None,
        packing: Packing | None = None,
        memory_packing: Packing | None = None,
    ) -> Tensor:
        """tgt (L, B, E) and memory (S, B, E), with batch_first (B, L, E) and (B, S, E), of one sequence (L, E) and (S, E), or
        with packings rows of tokens; the result is like tgt.

        The first eight arguments are torch.nn's. mask: fastattn's, of self-attention, True = may attend. packing and
        memory_packing go together: tgt's and the memory's tokens lie end to end.
        """
        if (packing is None) != (memory_packing is None):
            raise ValueError("packing and memory_packing go together")
        own: dict[str, Any] = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        own |= {"mask": mask, "packing": packing, "need_weights": False}
        over: dict[str, Any] = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
        over |= {"is_causal": memory_is_causal, "packing": packing, "key_packing": memory_packing, "need_weights": False}
        if self.norm_first:
            normal = norm_of(self, self.norm1, tgt)
            x = self.self_attn(normal, normal, normal, **own)[0]
            normal, tgt = norm_of_sum(self, self.norm2, x, tgt, self.dropout1, return_sum=True)
            x = self.multihead_attn(normal, memory, memory, **over)[0]
            normal, tgt = norm_of_sum(self, self.norm3, x, tgt, self.dropout2, return_sum=True)
            return tgt + dropped(self, self.dropout3, feed_forward(self, normal))
        x = norm_of_sum(self, self.norm1, self.self_attn(tgt, tgt, tgt, **own)[0], tgt, self.dropout1)
        x = norm_of_sum(self, self.norm2, self.multihead_attn(x, memory, memory, **over)[0], x, self.dropout2)
        return norm_of_sum(self, self.norm3, feed_forward(self, x), x, self.dropout3)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, norm_first={self.norm_first}"
