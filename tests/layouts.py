"""The memory layouts in which models hand over matrices; what lies between the elements is NaN."""

import torch

LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "last stride 2": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(-2)[..., ::2],
    "odd address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "wide rows": lambda t: torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]],
    "stride 0": lambda t: t[:1].expand(t.shape),
}
