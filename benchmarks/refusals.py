"""The request of encoder training, put to every provider: padding mask + dropout 0.1 + additive bias.

Each answers with a result or with its own error sentence; nothing is timed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import attention_providers, measure, shapes

B, H, S, D = 4, 12, 128, 64
REQUEST_WORDS = f"The request: padding mask, dropout 0.1 and an additive bias in training, B={B} H={H} S={S} D={D}"
SERVED = "served"


def ask(device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One {"provider", "answer"} per provider; the answer is SERVED, or who refused in its own words."""
    lengths = shapes.ragged_lengths(B, S, 0.5).to(device)
    bias = torch.randn(1, H, S, S, device=device, dtype=dtype)
    request = attention_providers.Request(B, H, S, D, False, lengths, device, attention_providers.TENSOR, 0.1)
    rows = []
    for provider in attention_providers.providers(device):
        served, refusal = measure.attempt(functools.partial(_train, provider, request, bias, dtype), provider.package)
        rows.append({"provider": provider.name, "answer": SERVED if served is not None else refusal})
    return rows


def _train(
    provider: attention_providers.Provider, request: attention_providers.Request, bias: Tensor, dtype: torch.dtype
) -> bool:
    q, k, v = (torch.randn(B, S, H, D, device=request.device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    bias = bias.detach().requires_grad_()
    out = provider.build(request)(q, k, v, bias)
    torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))
    return True
