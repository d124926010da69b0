"""`attention_weights`: rows of the attention map, which the fused kernels never write down, from the log-sum-exp they return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.biases import Bias, bias_of
from fastattn.lowering import LEAST_SCORE, LoweredMask
from fastattn.masks import Mask
from fastattn.ops.attention import lower_mask
from fastattn.ops.attention_extras import bias_extras


def attention_weights(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask | Tensor | None = None, *,
    bias: Tensor | Bias | None = None,
    rows: Sequence[int] | Tensor | None = None, heads: Sequence[int] | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """exp(scale q k^T + bias - lse) at visible pairs and 0 at hidden ones: the weights that `attention` gave to the keys, before
    dropout.

    Args:
        q, k, mask, bias, scale: as they were passed to `attention`.
        lse: (B, H, M), its second result with return_lse=True.
        rows, heads: indices of the queries and of the query heads wanted, from 0; None = all of them.

    Returns:
        (B, len(heads), len(rows), N) in lse's dtype. Each row sums to 1, or to 0 where the query sees no key. Plain PyTorch:
        differentiable, and of as much memory as it returns.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.

    >>> q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
    >>> out, lse = fastattn.attention(q, k, v, fastattn.masks.causal(), return_lse=True)
    >>> weights = fastattn.attention_weights(q, k, lse, fastattn.masks.causal(), rows=[0, 4], heads=[3])
    >>> weights.shape, weights[0, 0, 0].round(decimals=3)  # the first query sees the first key
    (torch.Size([2, 1, 2, 5]), tensor([1., 0., 0., 0., 0.]))
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} are not (B, H, M, D) and (B, Hkv, N, D) with H a multiple of Hkv"
        )
    B, H, M, D = q.shape
    N = k.shape[2]
    if tuple(lse.shape) != (B, H, M):
        raise ValueError(f"lse has shape {tuple(lse.shape)}, but that of q {tuple(q.shape)} is {(B, H, M)}")
    i, h = _indices(rows, M, "rows", q.device), _indices(heads, H, "heads", q.device)
    lowered = LoweredMask() if mask is None else lower_mask(mask, B, H, M, N, q.device)
    visible = lowered.pairs(i, torch.arange(N, device=q.device))
    if visible.shape[1] > 1:
        visible = visible[:, h]
    scale = (D**-0.5 if D else 1.0) if scale is None else scale
    q = q[:, h][:, :, i].to(lse.dtype)
    k = k[:, h // (H // k.shape[1])].to(lse.dtype)
    k = torch.where(visible.any(-2)[..., None], k, 0)  # a hidden key may hold NaN
    scores = q @ k.mT * scale
    if bias is not None:
        added = bias_of(bias_extras(bias, (B, H, M, N), q), M, N).to(scores.dtype)
        added = added if added.dim() == 4 else added[None]
        added = added[:, h] if added.shape[1] > 1 else added
        scores = scores + (added[:, :, i] if added.shape[2] > 1 else added)
        visible = visible & ~(scores < LEAST_SCORE)
    return torch.where(visible, torch.exp(scores - lse[:, h][:, :, i, None]), 0)


def _indices(chosen: Sequence[int] | Tensor | None, size: int, name: str, device: torch.device) -> Tensor:
    if chosen is None:
        return torch.arange(size, device=device)
    indices = torch.as_tensor(chosen, device=device)
    if indices.numel() == 0:
        return indices.reshape(0).long()
    if indices.dtype.is_floating_point or indices.dtype == torch.bool or indices.dim() != 1:
        raise TypeError(f"{name} must be a list of integers, got {chosen!r}")
    if not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(f"{name} must lie in 0..{size - 1}, got {chosen!r}")
    return indices.long()
