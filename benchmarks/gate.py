"""The accuracy gate: no provider is timed before its result on that very shape has passed.

fastattn must meet the project's own rule, `fastattn.testing.assert_accurate`. Others must compute the same thing: their largest
error may be twice the larger of eager PyTorch's and of the specification's in that dtype, plus the same term for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.testing import COLD, HALF, UNIT, Yardstick, assert_accurate


def check(actual: dict[str, Tensor], yardstick: Yardstick, *, ours: bool, cpu_half_gradients: bool = False) -> float:
    """The largest absolute error over all tensors; raises AssertionError with the tensor and the bound."""
    if ours:
        assert_accurate(actual, yardstick, cpu_half_gradients=cpu_half_gradients)
    return max(_check_peer(name, tensor, yardstick, raising=not ours) for name, tensor in actual.items())


def _check_peer(name: str, tensor: Tensor, yardstick: Yardstick, raising: bool) -> float:
    exact = yardstick.exact[name]
    error = float((tensor.double() - exact).abs().max())
    if not raising:
        return error
    rivals = [yardstick.model[name], *([yardstick.eager[name]] if name in yardstick.eager else [])]
    known = max(float((rival.double() - exact).abs().max()) for rival in rivals)
    factor = 4 if tensor.device.type == "cpu" and tensor.dtype in HALF else 2  # PyTorch's CPU kernel sums gradients in the dtype
    bound = factor * known + COLD * 2.0**-24 * float(yardstick.magnitude[name].max())
    if not error <= bound:  # NaN fails too
        raise AssertionError(f"{name}: max error {error:.3e} over {bound:.3e}")
    return error


def model_bound(eager_error: float, scale: float, dtype: torch.dtype) -> float:
    """How far a whole model may be from the fp64 run of the same weights: twice eager's error in that dtype, and a rest.

    The rest is 32 roundoffs in fp32 and 2 in half precision of a value of size `scale`, the reference's largest: where eager
    happens to be lucky the bound must not shrink to nothing.
    """
    return 2 * eager_error + (2 if dtype in HALF else 32) * UNIT[dtype] * scale


def eager_limit(scale: float, dtype: torch.dtype) -> float:
    """Beyond this an eager run is no yardstick: 2^-13 of the scale in fp32, a quarter of it in half precision."""
    return scale * (0.25 if dtype in HALF else 2.0**-13)
