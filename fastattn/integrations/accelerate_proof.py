"""An accelerated encoder's first call computes each layer both ways, on that call's own input, and compares.

That catches what no list of classes can: a scale, an activation or an order that is not the one we know, an attention function
that somebody registered, a method that was replaced.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.kept import nothing_kept
from fastattn.ops.dispatch import autocast_dtype

# Rounding units, and how many of them two ways of computing a layer may be apart: sums in another order, and where products are
# rounded to the dtype, those roundings. tests/test_accelerate_proof.py measures both.
UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
REDUCED = {"tf32": 2.0**-11, "bf16": 2.0**-8}  # of fp32, where PyTorch's switch says that products may be in less
FULL, HALF = 512, 8
Layer = Callable[[Tensor], Tensor]  # x -> its output, of one shape


class Proof:
    """Of one call. From the first layer that differs on, layers run their own code."""

    def __init__(self, keep: Tensor | None) -> None:
        """keep: bool (B, L), or (T,) of a packed batch: the real tokens; None: all."""
        self.keep = keep
        self.asked = self.compared = 0
        self.difference: tuple[str, float, float] | None = None  # of that layer: name, error, bound

    def holds(self, name: str, layer: nn.Module, x: Tensor, own: Layer, ours: Layer) -> bool:
        """Compute a layer both ways, as in evaluation, and compare."""
        self.asked += 1
        if self.difference is not None:
            return False
        with as_in_evaluation(layer):
            error, bound = relative_error(ours(x), own(x), x, self.keep), bound_of(x)
        self.compared += not math.isnan(error)
        if error > bound:
            self.difference = name, error, bound
        return self.difference is None


def relative_error(ours: Tensor, theirs: Tensor, x: Tensor, keep: Tensor | None) -> float:
    """The greatest error of a real token, in the 2-norm, as a share of what the layer was given and gave. All are
    (B, L, C) or (T, C).

    A token that is not finite in one way alone is infinitely far off; those that are so in both ways prove nothing. NaN where
    none is left.
    """
    x, theirs, ours = x.double(), theirs.double(), ours.double()
    size = (x.norm(dim=-1) + theirs.norm(dim=-1)).clamp(min=torch.finfo(torch.float64).tiny)
    share = (ours - theirs).norm(dim=-1) / size
    finite, ours_finite = theirs.isfinite().all(-1), ours.isfinite().all(-1)
    share = share.masked_fill(~(finite & ours_finite), torch.inf)
    wanted = finite | ours_finite if keep is None else keep & (finite | ours_finite)
    return float(share[wanted].max()) if bool(wanted.any()) else math.nan


def bound_of(x: Tensor) -> float:
    """What `relative_error` may be for products in the dtype that x is multiplied in."""
    dtype = autocast_dtype(x) or x.dtype
    library: Any = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    precision = library.matmul.fp32_precision
    if dtype == torch.float32 and precision in REDUCED:
        return HALF * REDUCED[precision]
    return UNITS[dtype] * (FULL if dtype in (torch.float32, torch.float64) else HALF)


@contextlib.contextmanager
def as_in_evaluation(layer: nn.Module) -> Iterator[None]:
    """Inside, no gradients and no dropout; and nothing made of weights is kept, by us or by autocast, for a later step."""
    training = [module for module in layer.modules() if module.training]
    cached = torch.is_autocast_cache_enabled()
    for module in training:
        module.training = False
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), nothing_kept():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module in training:
            module.training = True


def tell(difference: tuple[str, float, float]) -> str:
    name, error, bound = difference
    return f"layer {name} differs from its own code by {error:.1e} of its size, where {bound:.1e} is rounding"
