"""`explain`: which backend `attention` takes for a request, and why."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastattn import plans
from fastattn.biases import Bias
from fastattn.dropout import check_rate
from fastattn.lowering import LoweredMask
from fastattn.masks import Mask
from fastattn.ops import dispatch
from fastattn.ops.attention import checked
from fastattn.ops.attention_extras import bias_extras
from fastattn.ops.attention_plans import BACKENDS, AttentionProblem, problem_of


def explain(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, bias: Tensor | Bias | None = None,
    scale: float | None = None, dropout: float = 0.0, seed: int | Tensor | None = None, return_lse: bool = False,
    backend: str = "auto", verbose: bool = False,
) -> dispatch.Explanation:  # fmt: skip
    """Which backend `attention` would take for these arguments, and why not the others. Runs no kernel.

    `return_lse` is taken so that a call can be explained as it stands; the choice does not depend on it. `verbose` adds, for
    backends with kernels of their own, each kernel's config, the tiles that it visits under this mask, FLOPs and bytes beside the
    least possible, and the time that an H100 needs at least; for that it reads the mask's tensors.

    >>> q = torch.randn(2, 4, 5, 16)
    >>> fastattn.explain(q, q, q).backend
    'cpu'
    """
    q, k, v, lowered, _ = checked(q, k, v, mask, scale, backend)
    extras = bias_extras(bias, (*q.shape[:3], k.shape[2]), q)
    check_rate(dropout)
    problem = problem_of(q, k, v, lowered, extras)._replace(dropout=dropout > 0)
    notes = [
        f"{name} has a last stride of {x.stride(-1)} and is copied"
        for name, x in (("q", q), ("k", k), ("v", v))
        if x.stride(-1) != 1 and x.shape[-1] != 1
    ]
    explanation = dispatch.explain("attention", BACKENDS, problem, backend, notes)
    if not verbose or explanation.backend == "none":
        return explanation
    return replace(explanation, details=_details(explanation.backend, problem, lowered))


def _details(backend: str, problem: AttentionProblem, mask: LoweredMask) -> list[str]:
    """Of forward and backward, what the backend's kernels would do."""
    module = dispatch.backend_module("attention", backend)
    if not hasattr(module, "plan"):
        return ["computed by PyTorch: no tiles to count"]
    lines = []
    for name, backward in (("forward", False), ("backward", True)):
        lines += [
            f"{name}:",
            *(f"  {line}" for line in plans.work(module.plan(problem, backward), mask, problem, backward).lines()),
        ]
    return lines
