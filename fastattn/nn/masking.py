"""The masks of torch.nn as fastattn's: there True hides and floats are added; here a mask says what may be seen, a bias is added.

B, H, L, S: sequences, heads, queries, keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import masks
from fastattn.masks import Mask
from fastattn.packing import readable

Sizes = tuple[int, int, int, int]  # (B, H, L, S)


def translated(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool, mask: Mask | Tensor | None, sizes: Sizes,
    dtype: torch.dtype, names: tuple[str, str] = ("key_padding_mask", "attn_mask"),
) -> tuple[Mask | None, Tensor | None]:  # fmt: skip
    """What may be seen, `mask` included, and what is added to scores of that dtype, (B or 1, H or 1, L or 1, S).

    key_padding_mask (B, S) and attn_mask (L, S) or (B H, L, S), each bool or float. is_causal says that attn_mask is the causal
    one, which is then not read. Floats of which the host sees that they are 0 or -inf hide as bools do.

    Raises:
        ValueError, TypeError: a mask does not fit, by its name in `names`.
    """
    B, H, L, S = sizes
    visible = [] if mask is None else [mask if isinstance(mask, Mask) else masks.dense(mask)]
    added: list[Tensor] = []
    if attn_mask is not None:
        layouts = "(queries, keys) or (batch heads, queries, keys)"
        _check(attn_mask, [(L, S), (B * H, L, S)], layouts, names[1])
    if is_causal:
        if attn_mask is None:
            raise ValueError(f"is_causal says that {names[1]} is the causal mask: pass it, or mask=fastattn.masks.causal()")
        visible.append(masks.causal("top_left"))
    elif attn_mask is not None:
        four = attn_mask.unflatten(0, (B, H)) if attn_mask.dim() == 3 else attn_mask[None, None]
        if _adds(four):
            added.append(_cast(four, dtype))
        else:
            visible.append(masks.dense(~_hidden(four)))
    if key_padding_mask is not None:
        _check(key_padding_mask, [(B, S)], "(batch, keys)", names[0])
        if _adds(key_padding_mask):
            added.append(_cast(key_padding_mask[:, None, None], dtype))
        else:
            visible.append(masks.key_padding(~_hidden(key_padding_mask)))
    joined = None
    for one in visible:
        joined = one if joined is None else joined & one
    return joined, sum(added[1:], added[0]) if added else None


def with_columns(mask: Mask | None, bias: Tensor | None, count: int, sizes: Sizes, device: torch.device):
    """Mask and bias of S keys for S + count, of which the last ones are seen by all, and have nothing added."""
    if mask is not None:
        mask = masks.dense(torch.nn.functional.pad(mask.dense(*sizes).to(device), (0, count), value=True))
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, count))
    return mask, bias


def causal_by_looks(mask: Tensor | None, is_causal: bool | None) -> bool:
    """Whether a mask is the causal one: as `is_causal` says, else by its values, which the host then reads."""
    if mask is None:
        if is_causal:
            raise ValueError("is_causal says that mask is the causal mask: pass it, or mask=fastattn.masks.causal()")
        return False
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or one of fastattn.masks, got {type(mask).__name__}")
    if is_causal is not None:
        return is_causal
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or torch.compiler.is_compiling() or mask.requires_grad:
        return False
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return bool(torch.equal(mask, later))
    return bool(torch.equal(mask, torch.zeros_like(mask).masked_fill(later, float("-inf"))))


def padding_of(key_padding_mask: Tensor, shape: tuple[int, int], name: str) -> Tensor | None:
    """`real_tokens`. Raises ValueError or TypeError, by its name, where it is no mask of that shape."""
    _check(key_padding_mask, [shape], "(batch, length)", name)
    return real_tokens(key_padding_mask)


def real_tokens(key_padding_mask: Tensor) -> Tensor | None:
    """bool (B, S) of a padding mask, True = a token; None where it adds other floats than 0 and -inf, or the host cannot see."""
    return None if _adds(key_padding_mask) else ~_hidden(key_padding_mask)


def _check(x: Tensor, shapes: list[tuple[int, ...]], layout: str, name: str) -> None:
    shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    if shape not in shapes:
        raise ValueError(f"{name} must have the shape {layout} = {' or '.join(map(str, shapes))}, got {shape}")
    if x.dtype != torch.bool and not x.is_floating_point():
        raise TypeError(f"{name} must be a bool tensor, True = hidden, or a float tensor that is added, got {x.dtype}")


def _adds(x: Tensor) -> bool:
    """Whether floats have to be added. Not where the host can tell, without waiting, that all are 0 or -inf."""
    if not x.is_floating_point():
        return False
    return x.requires_grad or not readable(x) or not bool(((x == 0) | (x == float("-inf"))).all())


def _hidden(x: Tensor) -> Tensor:
    return x != 0 if x.is_floating_point() else x


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype in (dtype, torch.float32) else x.to(dtype)
