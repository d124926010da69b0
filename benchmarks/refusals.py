"""The request of encoder training, put to every provider: padding mask + dropout 0.1 + additive bias.

Each answers with a result or with its own error sentence; nothing is timed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import attention_providers, measure, shapes
from fastattn.testing import AttentionInputs, assert_accurate, attention_yardstick

B, H, S, D = 4, 12, 128, 64
DROPOUT = 0.1
REQUEST_WORDS = f"The request: padding mask, dropout {DROPOUT} and an additive bias in training, B={B} H={H} S={S} D={D}"
SERVED = "served"


def ask(device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One {"provider", "answer", "errors"} per provider: SERVED, or who refused in its own words. Where the weights that are
    dropped are known, results are held to the accuracy rule, and `errors` are relative ones in units of the dtype's roundoff."""
    lengths, g = shapes.ragged_lengths(B, S, 0.5).to(device), torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, S, H, D, generator=g).to(device, dtype).transpose(1, 2) for _ in range(4))
    bias = torch.randn(1, H, S, S, generator=g).to(device, dtype)
    request = attention_providers.Request(B, H, S, D, False, lengths, device, attention_providers.TENSOR, DROPOUT)
    x = AttentionInputs(q, k, v, dout, None, request.mask(), D**-0.5, bias, DROPOUT, request.seed)
    rows = []
    for provider in attention_providers.providers(device):
        found, refusal = measure.attempt(functools.partial(_train, provider, request, x), provider.package)
        row: dict = {"provider": provider.name, "answer": SERVED if found is not None else refusal}
        if found is not None and provider.ours:
            half_gradients = provider.name.endswith("cpu")
            row["errors"] = assert_accurate(found, attention_yardstick(x), cpu_half_gradients=half_gradients)
        rows.append(row)
    return rows


def _train(provider: attention_providers.Provider, request: attention_providers.Request, x: AttentionInputs) -> dict[str, Tensor]:
    assert isinstance(x.bias, Tensor)
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
    out = provider.build(request)(*leaves)
    grads = torch.autograd.grad(out, leaves, x.dout)
    return dict(zip(("out", "dq", "dk", "dv", "dbias"), (out.detach(), *grads), strict=True))
