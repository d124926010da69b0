"""`MultiHeadAttention`: torch.nn.MultiheadAttention, by fastattn's ops: its arguments, its state dict, its numbers.

B, L, S, T: sequences, queries, keys, packed tokens; E = H D: features, heads, features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn import biases
from fastattn.biases import Bias
from fastattn.dropout import draw_seed, dropout_mask, rescale
from fastattn.masks import Mask
from fastattn.nn.feed_forward import own_memory
from fastattn.nn.masking import translated, with_columns
from fastattn.nn.plain import LINEAR, is_plain
from fastattn.nn.rotary import Rotary
from fastattn.nn.shards import Shards
from fastattn.ops.attention import attention
from fastattn.ops.attention_qkv import attention_qkv
from fastattn.ops.attention_weights import attention_weights
from fastattn.ops.linear import linear
from fastattn.ops.varlen import varlen_attention
from fastattn.packing import Packing


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, arXiv:1706.03762) with torch.nn.MultiheadAttention's constructor, forward and
    state dict.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as there.
        num_kv_heads: heads of keys and values, each for num_heads / num_kv_heads query heads; None: num_heads. `in_proj_weight`
            has rows for no more; keys and values have the width of queries then.
        rotary: turn queries and keys by their places (Su et al., 2021, arXiv:2104.09864); of self-attention alone.
        alibi: add -slope |j - i| to the scores, slopes 2^(-8 h / H) for h = 1..H (Press et al., 2022, arXiv:2108.12409).
        backend: of all ops inside: "auto", "triton", "cpu" or "eager".

    Raises:
        ValueError: sizes do not fit.
        NotImplementedError: options that do not go together.

    It differs in three points. A query that sees no key gives `out_proj.bias`, with weights of 0; torch.nn gives NaN or that,
    by the way it takes. The keys of add_bias_kv and add_zero_attn are seen by all; torch.nn hides them where it takes the hint
    is_causal. And in training it drops by fastattn's draws, whose seed comes from PyTorch's generator.

    >>> mha = fastattn.nn.MultiHeadAttention(32, 4, batch_first=True)
    >>> x, padding = torch.randn(2, 7, 32), torch.arange(7) >= torch.tensor([[7], [5]])
    >>> out, weights = mha(x, x, x, key_padding_mask=padding)
    >>> out.shape, weights.shape
    (torch.Size([2, 7, 32]), torch.Size([2, 7, 7]))
    """

    in_proj_weight: Any  # parameters, or None
    in_proj_bias: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    bias_k: Any
    bias_v: Any
    shards: Shards | None = None  # of `HeadParallel`: parameters are divided, num_heads and num_kv_heads are a rank's

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: Rotary | None = None,
        alibi: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, both positive, got {embed_dim} and {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.dropout, self.batch_first, self.add_zero_attn, self.backend = dropout, batch_first, add_zero_attn, backend
        self.rotary, self.alibi = rotary, alibi
        self._check_options(add_bias_kv)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if self._qkv_same_embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim, **like))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **like))
            self.k_proj_weight = nn.Parameter(torch.empty(embed_dim, self.kdim, **like))
            self.v_proj_weight = nn.Parameter(torch.empty(embed_dim, self.vdim, **like))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(rows, **like)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **like)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, embed_dim, **like)) if add_bias_kv else None)
        self._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """torch.nn's name; its TransformerEncoderLayer asks for it."""
        return self.kdim == self.embed_dim and self.vdim == self.embed_dim

    def _check_options(self, add_bias_kv: bool) -> None:
        if self.num_kv_heads <= 0 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}")
        if self.num_kv_heads != self.num_heads and (add_bias_kv or not self._qkv_same_embed_dim):
            raise NotImplementedError("num_kv_heads does not go with add_bias_kv, nor with a kdim or vdim other than embed_dim")
        if (self.alibi or self.rotary is not None) and (add_bias_kv or self.add_zero_attn):
            raise NotImplementedError("rotary and alibi do not go with add_bias_kv and add_zero_attn: their keys have no place")
        if self.rotary is not None and not isinstance(self.rotary, Rotary):
            raise TypeError(f"rotary must be a fastattn.nn.Rotary or None, got {type(self.rotary).__name__}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be a probability, 0 to 1, got {self.dropout}")

    def _reset_parameters(self) -> None:
        """torch.nn's initial weights, drawn in its order."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | Tensor | None = None,
        bias: Tensor | Bias | None = None,
        packing: Packing | None = None,
        key_packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`.

        Args:
            query: (L, B, E), with batch_first (B, L, E), of one sequence (L, E), or with a packing (T, E).
            key, value: the same with S, kdim and vdim. Where all three are one tensor they are projected by one product, which
                attention reads in place.
            key_padding_mask: (B, S), or (S,) of one sequence: bool, True = hidden, or float, added.
            need_weights: also return the weights, after dropout as torch.nn does, which costs a tensor of them.
            attn_mask: (L, S) or (B H, L, S), bool, True = hidden, or float, added and differentiable.
            average_attn_weights: average the weights over heads.
            is_causal: attn_mask, which has to be given, is the causal mask, and is not read.
            mask: fastattn's: a `masks.Mask`, or a bool tensor that broadcasts to (B, H, L, S), True = may attend.
            bias: a float tensor that broadcasts to (B, H, L, S), or one of `fastattn.biases`; added to a float attn_mask.
            packing: tokens lie end to end, and padding is nowhere: `Packing.pack` makes such rows. Masks are `mask` alone.
            key_packing: of key and value, where it is another one.

        Returns:
            The output in query's layout; and the weights (B, L, S), of all heads (B, H, L, S), without a batch (L, S) or
            (H, L, S); or None.

        Raises:
            ValueError, TypeError, NotImplementedError: an argument does not fit, in a sentence that names it.
        """
        self._check_inputs(query, key, value, packing)
        if packing is not None:
            if need_weights or is_causal or key_padding_mask is not None or attn_mask is not None:
                wrong = "need_weights=True, is_causal, key_padding_mask and attn_mask are not served with packing"
                raise NotImplementedError(f"{wrong}: pass need_weights=False, and what hides tokens as mask=")
            bias = self._with_alibi(bias, query.device)
            return self._output(self._packed(query, key, value, mask, bias, packing, key_packing)), None
        if key_packing is not None:
            raise ValueError("key_packing is given without packing")
        if query.dim() == 2:
            options = {"mask": mask, "bias": bias}
            return self._one(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, **options
            )
        sizes = self._sizes(query, key)
        mask, floats = translated(key_padding_mask, attn_mask, is_causal, mask, sizes, query.dtype)
        bias = joined_bias(self._with_alibi(bias, query.device), floats)
        if not need_weights:
            return self._output(self._batch_first(self._attended(query, key, value, mask, bias))), None
        out, weights = self._with_weights(*self._heads(query, key, value, mask, bias))
        return self._output(self._batch_first(out)), weights.mean(1) if average_attn_weights else weights

    def _one(self, query, key, value, key_padding_mask, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """`forward` of one sequence, (L, E), as of a batch of one. What is one tensor stays one."""
        batch = 0 if self.batch_first else 1
        given = {id(x): x.unsqueeze(batch) for x in (query, key, value)}
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        query, key, value = (given[id(x)] for x in (query, key, value))
        out, weights = self.forward(query, key, value, key_padding_mask, *rest, **options)  # without the hooks, which were called
        return out.squeeze(batch), None if weights is None else weights[0]

    # What attention is given

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> None:
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.is_nested:
                raise TypeError(f"{name} is a nested tensor, which is not served: pass its values with packing=")
            dims = (2,) if packing is not None else (2, 3)
            if x.dim() not in dims or x.dim() != query.dim() or x.shape[-1] != width:
                layout = "(rows, features) of a packing" if packing is not None else "(length, features), with or without a batch"
                raise ValueError(f"{name} must be {layout}, like query, with {width} features, got shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key has the shape {tuple(key.shape)}, but value {tuple(value.shape)}")
        batch = 0 if self.batch_first else 1
        if self.rotary is not None and query is not key:
            raise NotImplementedError("rotary is of self-attention: query and key must be one tensor")
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(f"query has {query.shape[batch]} sequences, but key {key.shape[batch]}")

    def _sizes(self, query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
        """(B, H, L, S) of a batch."""
        B, L = query.shape[:2] if self.batch_first else query.shape[1::-1]
        return B, self.num_heads, L, key.shape[1 if self.batch_first else 0]

    def _with_alibi(self, bias: Tensor | Bias | None, device: torch.device) -> Tensor | Bias | None:
        if not self.alibi:
            return bias
        if bias is not None:
            raise NotImplementedError("bias does not go with alibi=True, which is one")
        first, heads = (0, self.num_heads) if self.shards is None else self.shards.places(self.num_heads)
        h = torch.arange(first + 1, first + 1 + self.num_heads, device=device)
        return biases.alibi(2.0 ** (-8 * h / heads))

    # What it computes

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask, bias) -> Tensor:
        """(B, L, H, D)"""
        plain = self.bias_k is None and not self.add_zero_attn
        if plain and self._in_place(query, key, value):
            return attention_qkv(self._batch_first(self._qkv(query)), mask, bias=bias, **self._options(query.device))
        q, k, v, mask, bias = self._heads(query, key, value, mask, bias)
        return attention(q, k, v, mask, bias=bias, **self._options(query.device)).transpose(1, 2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, mask, bias, packing: Packing, key_packing) -> Tensor:
        """(T, H, D)"""
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError("packing does not go with add_bias_kv and add_zero_attn")
        if key_packing is None and self._in_place(query, key, value):
            return attention_qkv(self._qkv(query), mask, packing=packing, bias=bias, **self._options(query.device))
        q, k, v = self._projected(query, key, value)
        if self.rotary is not None:
            q, k = self.rotary.turned(q, k, packing, self.backend)
        return varlen_attention(q, k, v, packing, mask, key_packing=key_packing, bias=bias, **self._options(query.device))

    def _options(self, device: torch.device) -> dict[str, Any]:
        """Of `attention`. A rank of several draws by a seed of its own."""
        options = {"dropout": self.dropout if self.training else 0.0, "backend": self.backend}
        if self.shards is not None and options["dropout"]:
            options["seed"] = self.shards.seed(device)
        return options

    def _in_proj(self) -> tuple[Any, Any]:
        """in_proj_weight and in_proj_bias, or None, of the heads that there are here."""
        found, shards = (self.in_proj_weight, self.in_proj_bias), self.shards
        if shards is None:
            return found
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        weight, bias = (None if x is None else shards.rows(x, heads) for x in found)
        return weight, bias

    def _own(self, *parameters: Any) -> tuple[Any, ...]:
        """Of parameters, what is here."""
        return parameters if self.shards is None else tuple(x.to_local() for x in parameters)

    def _in_place(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether attention reads query, key and value where one product writes them."""
        one = query is key and key is value and self._qkv_same_embed_dim
        return one and self.num_kv_heads == self.num_heads and self.rotary is None

    def _qkv(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., 3, H, D)"""
        weight, bias = self._in_proj()
        qkv = linear(x, weight, bias, backend=self.backend)
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Each (..., H, D), in the layout of what was given, by as few products as there are tensors."""
        joined, wide = self._in_proj()
        widths = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        biases = (None, None, None) if wide is None else wide.split(widths)

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear(x, weight, bias, backend=self.backend)

        if joined is None:
            separate = self._own(self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = [product(*given) for given in zip((query, key, value), separate, biases, strict=True)]
        elif query is key and key is value:
            parts = [*product(query, joined, wide).split(widths, -1)]
        elif key is value:
            weights = joined.split((widths[0], 2 * widths[1]))
            first, rest = (None, None) if wide is None else wide.split((widths[0], 2 * widths[1]))
            parts = [product(query, weights[0], first), *product(key, weights[1], rest).chunk(2, -1)]
        else:
            weights = joined.split(widths)
            parts = [product(*given) for given in zip((query, key, value), weights, biases, strict=True)]
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, mask, bias) -> tuple[Any, ...]:
        """q (B, H, L, D), k and v (B, Hkv, S, D), with the keys that torch.nn may add at the end; mask and bias for as many."""
        q, k, v = (self._batch_first(x).transpose(1, 2) for x in self._projected(query, key, value))
        if self.rotary is not None:
            q, k = self.rotary.turned(q, k, None, self.backend)
        added = []
        if self.bias_k is not None:
            pairs = zip(self._own(self.bias_k, self.bias_v), (k, v), strict=True)
            added.append([x.view(1, self.num_heads, 1, -1).expand(k.shape[0], -1, -1, -1).to(y.dtype) for x, y in pairs])
        if self.add_zero_attn:
            added.append([x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (k, v)])
        if added:
            if isinstance(bias, Bias):
                raise NotImplementedError("one of fastattn.biases does not go with add_bias_kv and add_zero_attn")
            k, v = (torch.cat([x, *more], 2) for x, more in zip((k, v), zip(*added, strict=True), strict=True))
            mask, bias = with_columns(mask, bias, len(added), self._sizes(query, key), q.device)
        return q, k, v, mask, bias

    def _with_weights(self, q, k, v, mask, bias) -> tuple[Tensor, Tensor]:
        """The output (B, L, H, D), and the weights (B, H, L, S)."""
        options = self._options(q.device)
        if options["dropout"] and "seed" not in options:
            options["seed"] = draw_seed(None, q.device)
        out, lse = attention(q, k, v, mask, bias=bias, return_lse=True, **options)
        weights = attention_weights(q, k, lse, mask, bias=bias)
        if options["dropout"]:
            B, H, L, S = weights.shape
            weights = weights * dropout_mask(options["seed"], B, H, L, S, self.dropout) * rescale(self.dropout)
        return out.transpose(1, 2), weights.to(out.dtype)

    # Layouts

    def _batch_first(self, x: Tensor) -> Tensor:
        """(L, B, ...) as (B, L, ...), and back: a view; with `batch_first` as it is."""
        return x if self.batch_first else x.transpose(0, 1)

    def _output(self, out: Tensor) -> Tensor:
        """(..., H, D) -> (..., E)"""
        if self.shards is None:
            if not is_plain(self.out_proj, *LINEAR):
                return self.out_proj(out.flatten(-2))
            return own_memory(linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias, backend=self.backend))
        (weight,) = self._own(self.out_proj.weight)
        return self.shards.leave(linear(out.flatten(-2), weight, backend=self.backend), self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def joined_bias(bias: Tensor | Bias | None, floats: Tensor | None) -> Tensor | Bias | None:
    """The sum of a `bias` and the floats of masks."""
    if bias is None or floats is None:
        return floats if bias is None else bias
    if isinstance(bias, Bias):
        raise NotImplementedError("one of fastattn.biases does not go with a mask of floats: hide pairs by bools, or by mask=")
    return bias + floats
