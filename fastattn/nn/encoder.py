"""`EncoderLayer` and `Encoder`: torch.nn's TransformerEncoderLayer and TransformerEncoder, by fastattn's ops, without padding.

B, L, E, T: sequences, padded length, features, packed tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import masks
from fastattn.biases import Bias
from fastattn.masks import Mask
from fastattn.nn.attention import MultiHeadAttention, joined_bias
from fastattn.nn.feed_forward import activation_name, feed_forward, first_rows, own_memory, rate
from fastattn.nn.masking import causal_by_looks, padding_of, translated
from fastattn.nn.plain import is_plain
from fastattn.nn.rotary import Rotary
from fastattn.nn.shards import Shards
from fastattn.ops.norm import add_layer_norm
from fastattn.packing import Packing
from fastattn.planned import PLAIN

NAMES = "src_key_padding_mask", "mask"


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each with dropout, a residual sum and a LayerNorm.

    norm_first=False: x = LN(x + attention(x)), LN(x + ffn(x)); True: x = x + attention(LN(x)), x + ffn(LN(x)).

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as of
            torch.nn.TransformerEncoderLayer, and so is the state dict.
        activation: as of `FeedForward`: a name, gated ones too, or PyTorch's relu, gelu or silu.
        num_kv_heads, rotary, alibi, backend: as of `MultiHeadAttention`.

    Raises:
        ValueError: an argument does not fit.

    >>> layer = fastattn.nn.EncoderLayer(32, 4, 64, batch_first=True)
    >>> layer(torch.randn(2, 7, 32)).shape
    torch.Size([2, 7, 32])
    """

    shards: Shards | None = None  # of `LayerParallel`: parameters are divided, and perhaps the sequence

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
        options: dict[str, Any] = {"num_kv_heads": num_kv_heads, "rotary": rotary, "alibi": alibi}
        self.self_attn = MultiHeadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, backend=backend, **options, **like
        )
        self.activation, self.norm_first, self.backend = activation_name(activation), norm_first, backend
        self.linear1 = nn.Linear(d_model, first_rows(dim_feedforward, self.activation), bias=bias, **like)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **like)
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **like)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **like)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        mask: Mask | Tensor | None = None,
        bias: Tensor | Bias | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """src (L, B, E), with batch_first (B, L, E), of one sequence (L, E), or with a packing (T, E); the result likewise.

        src_mask, src_key_padding_mask, is_causal: torch.nn's; mask, bias, packing: fastattn's, as of `MultiHeadAttention`.
        Padding is computed here, where nothing else is asked for: `Encoder` takes it out, or `packing` does.
        """
        given: dict[str, Any] = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        given |= {"mask": mask, "bias": bias, "packing": packing, "need_weights": False}
        if self.norm_first:
            normal = norm_of(self, self.norm1, src)
            attended = self.self_attn(normal, normal, normal, **given)[0]
            normal, total = norm_of_sum(self, self.norm2, attended, src, self.dropout1, return_sum=True)
            return total + dropped(self, self.dropout2, feed_forward(self, normal))
        attended = self.self_attn(src, src, src, **given)[0]
        x = norm_of_sum(self, self.norm1, attended, src, self.dropout1)
        return norm_of_sum(self, self.norm2, feed_forward(self, x), x, self.dropout2)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, norm_first={self.norm_first}"


class Encoder(nn.Module):
    """A stack of copies of a layer, which computes no padding: real tokens are laid end to end once for all layers.

    Args:
        encoder_layer: an `EncoderLayer`, of which each layer is a copy.
        num_layers, norm: as of torch.nn.TransformerEncoder, and so is the state dict.
        enable_nested_tensor: take padding out, as torch.nn does for some inference: here in training too, on any side, and in
            holes. False: leave it in.

    >>> encoder = fastattn.nn.Encoder(fastattn.nn.EncoderLayer(32, 4, 64, batch_first=True), num_layers=2)
    >>> padding = torch.arange(7) >= torch.tensor([[7], [5]])
    >>> encoder(torch.randn(2, 7, 32), src_key_padding_mask=padding)[1, 5:].abs().max().item()
    0.0
    """

    def __init__(
        self, encoder_layer: EncoderLayer, num_layers: int, norm: nn.Module | None = None, enable_nested_tensor: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(encoder_layer, EncoderLayer):
            raise TypeError(f"encoder_layer must be a fastattn.nn.EncoderLayer, got {type(encoder_layer).__name__}")
        self.layers = nn.ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.num_layers, self.norm, self.enable_nested_tensor = num_layers, norm, enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        bias: Tensor | Bias | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """src (L, B, E), with batch_first (B, L, E), of one sequence (L, E), or with a packing (T, E); the result likewise.

        Args:
            mask: torch.nn's, (L, L) or (B H, L, L), bool with True = hidden, or float; or one of `fastattn.masks`.
            src_key_padding_mask: (B, L), bool with True = padding, or float. Where padding is taken out, results there are 0.
            is_causal: whether `mask` is the causal one; None: by its values, which the host then reads.
            bias, packing: as of `MultiHeadAttention`.

        Padding is taken out unless something else than it and causality says what is seen, a `bias`, or ALiBi, whose distances
        it may change, and while the call is traced, since the number of tokens is read on the host.
        """
        return self.computed(src, mask, src_key_padding_mask, is_causal, bias, packing, self.enable_nested_tensor)

    def computed(self, src: Tensor, mask, src_key_padding_mask, is_causal, bias=None, packing=None, unpad: bool = True) -> Tensor:
        """`forward`, with padding taken out where it may be, or in no case."""
        visible, attn_mask = (mask, None) if isinstance(mask, Mask) else (None, mask)
        if visible is not None and is_causal:
            raise ValueError("is_causal is about torch.nn's masks: join fastattn.masks.causal() to mask by &")
        is_causal = causal_by_looks(attn_mask, None if visible is not None else is_causal)
        if src.dim() != 3 or packing is not None:
            given = attn_mask, src_key_padding_mask, is_causal
            return self._run(src, *given, mask=visible, bias=bias, packing=packing)
        nothing_else = visible is None and bias is None and (attn_mask is None or is_causal)
        B, L = src.shape[:2] if self._batch_first else src.shape[1::-1]
        if src_key_padding_mask is not None and nothing_else and unpad and self._may_unpad(src):
            keep = padding_of(src_key_padding_mask, (B, L), NAMES[0])
            if keep is not None:
                return self._unpadded(src, keep, masks.causal() if is_causal else None)
        if self._first.shards is not None:  # it has some of the heads that a mask may be for, and layers perhaps parts of src
            return self._run(src, attn_mask, src_key_padding_mask, is_causal, mask=visible, bias=bias)
        # once for all layers
        sizes = B, self._first.num_heads, L, L
        visible, floats = translated(src_key_padding_mask, attn_mask, is_causal, visible, sizes, src.dtype, NAMES)
        return self._run(src, mask=visible, bias=joined_bias(bias, floats))

    def _unpadded(self, src: Tensor, keep: Tensor, mask: Mask | None) -> Tensor:
        """keep: bool (B, L), the real tokens."""
        batches = src if self._batch_first else src.transpose(0, 1)
        packing = Packing.from_mask(keep)
        if packing.known_total == keep.numel():
            return self._run(src, mask=mask)
        out = own_memory(packing.unpack(self._run(packing.pack(batches), mask=mask, packing=packing)))
        return out if self._batch_first else out.transpose(0, 1).contiguous()

    def _run(self, x: Tensor, *given: Any, **options: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *given, **options)
        return x if self.norm is None else self.norm(x)

    def _may_unpad(self, src: Tensor) -> bool:
        """Whether the host may read how many tokens there are, nothing counts places between them, and no rank has a part."""
        shards = self._first.shards
        if shards is not None and shards.sequence is not None:
            return False
        if self._first.alibi or type(src) not in PLAIN:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return False
        return not (src.is_cuda and torch.cuda.is_current_stream_capturing()) and src.device.type != "meta"

    @property
    def _first(self) -> Any:
        """The attention of the first layer, like which are all."""
        first: Any = self.layers[0]
        return first.self_attn

    @property
    def _batch_first(self) -> bool:
        return self._first.batch_first


# Of a layer, which may be a rank's part of one


def norm_of(layer: Any, norm: nn.LayerNorm, x: Tensor) -> Any:
    if not is_plain(norm, nn.LayerNorm):
        return norm(x)
    return add_layer_norm(x, None, *_weights(layer, norm), eps=norm.eps, backend=layer.backend)


def norm_of_sum(layer: Any, norm: nn.LayerNorm, y: Tensor, x: Tensor, dropout: nn.Dropout, return_sum: bool = False) -> Any:
    """LayerNorm of dropout(y) + x, and with `return_sum` that sum, in the wider of their dtypes, as PyTorch's sum is."""
    if not (is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout)):
        total = x + dropped(layer, dropout, y)
        return (norm(total), total) if return_sum else norm(total)
    y = y.to(torch.promote_types(x.dtype, y.dtype))
    options: dict[str, Any] = {"eps": norm.eps, "dropout": rate(dropout), "return_sum": return_sum, "backend": layer.backend}
    if options["dropout"] and _is_part(layer):
        options["seed"] = layer.shards.seed(x.device)
    return add_layer_norm(y, x, *_weights(layer, norm), **options)


def dropped(layer: Any, dropout: nn.Dropout, x: Tensor) -> Tensor:
    """dropout(x); of a part of the sequence, what the whole would lose there."""
    if not _is_part(layer) or not rate(dropout):
        return dropout(x)
    return x * layer.shards.kept(x, dropout)


def _weights(layer: Any, norm: nn.LayerNorm) -> tuple[Any, Any]:
    if layer.shards is None:
        return norm.weight, norm.bias
    return layer.shards.whole(norm.weight), None if norm.bias is None else layer.shards.whole(norm.bias)


def _is_part(layer: Any) -> bool:
    """Whether ranks have different places of the sequence, and have to draw differently."""
    return layer.shards is not None and layer.shards.sequence is not None
