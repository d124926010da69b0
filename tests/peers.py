"""What xFormers, flash-attn and timm are documented to compute, in plain PyTorch, under their names: none of them is installed.

`modules()` is for sys.modules. Only what docs/migrating.md calls is here; an argument that is not computed is refused.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float, scale: float | None) -> Tensor:
    """softmax(scale q k^T + bias) v for (B, L, H, D), whose k and v may have fewer heads; 0 where all of a row is -inf."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def places(M: int, N: int, bottom_right: bool = True) -> Tensor:
    """(M, N): how far key j is beyond query i, with the last ones side by side, or the first."""
    return torch.arange(N) - torch.arange(M)[:, None] - (N - M if bottom_right else 0)


def hiding(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))


# flash-attn


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), *, alibi_slopes=None
) -> Tensor:
    """A query at i sees keys from i + N - M - left to i + N - M + right, -1 = no bound; causal: right is 0; slopes are (H,)."""
    assert dropout_p == 0.0
    d = places(q.shape[1], k.shape[1])
    left, right = window_size
    keep = torch.ones_like(d, dtype=torch.bool)
    if left >= 0:
        keep &= d >= -left
    if causal or right >= 0:
        keep &= d <= (0 if causal else right)
    bias = hiding(keep)
    if alibi_slopes is not None:
        bias = bias - alibi_slopes[:, None, None] * d.abs()
    return attend(q, k, v, bias, softmax_scale)


def flash_attn_qkvpacked_func(qkv, *args, **options) -> Tensor:
    return flash_attn_func(*qkv.unbind(2), *args, **options)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **options) -> Tensor:
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    queries, keys = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in part), *args, **options)[0] for part in parts])


def unpad_input(hidden_states, attention_mask):
    """The tokens (T, ...), their indices in the flat batch, cu_seqlens, the longest length, and the lengths."""
    lengths = attention_mask.sum(1, dtype=torch.int32)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = attention_mask.flatten().nonzero().flatten()
    return hidden_states.flatten(0, 1)[indices], indices, starts, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen) -> Tensor:
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


class FusedMLP(nn.Module):
    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # activation="gelu_approx", the default


def layer_norm_fn(x, weight, bias, residual=None, *, eps=1e-6, prenorm=False):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return (y, total) if prenorm else y


def apply_rotary_emb(x, cos, sin, interleaved=False) -> Tensor:
    """x (B, L, H, D), cos and sin (L, R / 2)."""
    R = 2 * cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


# xFormers


class Bias:
    """materialize: float (M, N), or with more dimensions in front."""

    def __init__(self, materialize) -> None:
        self.materialize = materialize


def of_places(keep, bottom_right: bool) -> Bias:
    return Bias(lambda M, N: hiding(keep(places(M, N, bottom_right))))


def causal_mask(bottom_right: bool = False) -> Bias:
    return of_places(lambda d: d <= 0, bottom_right)


def local_causal_mask(window_size: int) -> Bias:
    return of_places(lambda d: (d <= 0) & (d > -window_size), True)


def local_mask(window_left: int, window_right: int) -> Bias:
    return of_places(lambda d: (d >= -window_left) & (d <= window_right), True)


def causal_mask_with_bias(bias: Tensor) -> Bias:
    return Bias(lambda M, N: causal_mask().materialize(M, N) + bias)


class BlockDiagonalMask(Bias):
    def __init__(self, queries: list[int], keys: list[int], inside: Bias | None = None) -> None:
        self.queries, self.keys, self.inside = queries, keys, inside

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen or q_seqlen)

    @classmethod
    def from_tensor_list(cls, tensors):
        return cls.from_seqlens([x.shape[1] for x in tensors]), torch.cat(tensors, 1)

    def make_causal(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.queries, self.keys, causal_mask())

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.queries, self.keys, causal_mask(bottom_right=True))

    def make_local_attention(self, window_size: int) -> BlockDiagonalMask:
        """Of a mask made by make_causal."""
        return BlockDiagonalMask(self.queries, self.keys, of_places(lambda d: (d <= 0) & (d > -window_size), False))

    def materialize(self, M: int, N: int) -> Tensor:
        sizes = list(zip(self.queries, self.keys, strict=True))
        blocks = [torch.zeros(m, n) if self.inside is None else self.inside.materialize(m, n) for m, n in sizes]
        apart = hiding(torch.block_diag(*(torch.ones(m, n) for m, n in sizes)).bool())
        assert apart.shape == (M, N)
        return apart + torch.block_diag(*blocks)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.queries, 1)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None) -> Tensor:
    """For (B, M, H, K)."""
    assert p == 0.0
    if isinstance(attn_bias, Bias):
        attn_bias = attn_bias.materialize(query.shape[1], key.shape[1])
    return attend(query, key, value, 0.0 if attn_bias is None else attn_bias, scale)


# timm


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused_attn = num_heads, (dim // num_heads) ** -0.5, True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.norm = nn.Dropout(0.0), nn.Identity()
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, self.attn_drop.p if self.training else 0.0, is_causal)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).reshape(B, N, C))))


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1, self.norm = (
            nn.Linear(in_features, hidden_features),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Identity(),
        )
        self.fc2, self.drop2 = nn.Linear(hidden_features, in_features), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, qk_norm: bool, init_values: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads, qkv_bias, qk_norm), Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim, init_values), LayerScale(dim, init_values)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def modules() -> dict[str, ModuleType]:
    """By name, with packages in front of what they hold."""
    masks = SimpleNamespace(
        LowerTriangularMask=causal_mask,
        LowerTriangularFromBottomRightMask=lambda: causal_mask(bottom_right=True),
        LowerTriangularFromBottomRightLocalAttentionMask=local_causal_mask,
        LocalAttentionFromBottomRightMask=local_mask,
        LowerTriangularMaskWithTensorBias=causal_mask_with_bias,
    )
    fmha = {"attn_bias": masks, "BlockDiagonalMask": BlockDiagonalMask}
    contents = {
        "flash_attn": {f.__name__: f for f in (flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func)},
        "flash_attn.bert_padding": {"pad_input": pad_input, "unpad_input": unpad_input},
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
        "flash_attn.modules": {},
        "flash_attn.modules.mlp": {"FusedMLP": FusedMLP},
        "flash_attn.ops": {},
        "flash_attn.ops.triton": {},
        "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": fmha,
        "timm": {},
        "timm.models": {},
        "timm.models.vision_transformer": {"Block": Block},
    }
    made: dict[str, ModuleType] = {}
    for name, held in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(held)
        package, _, short = name.rpartition(".")
        if package:
            setattr(made[package], short, made[name])
    return made
