"""The accuracy gate: no provider is timed before its result on that very shape has passed.

fastattn must meet the project's own rule, `fastattn.testing.assert_accurate`. Others must compute the same thing: their largest
error may be twice the larger of eager PyTorch's and of the specification's in that dtype, plus the same term for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.testing import COLD, HALF, UNIT, Yardstick, assert_accurate, linear_yardstick


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


def feed_forward_yardstick(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dy: Tensor, activation: str) -> Yardstick:
    """For `ffn`: y, dx, dw1, dw2."""

    def run(x, w1, b1, w2, b2, dy):
        hidden, z = reference.linear(x, w1, b1, activation, None)
        y, _ = reference.linear(hidden, w2, b2, None, None)
        dhidden, dw2, _ = reference.linear_backward(dy, hidden, w2, None, None)
        dx, dw1, _ = reference.linear_backward(dhidden, x, w1, z, activation)
        return {"y": y, "dx": dx, "dw1": dw1, "dw2": dw2}

    tensors = (x, w1, b1, w2, b2, dy)
    wide = tuple(t.double() for t in tensors)
    x, w1, b1, w2, b2, dy = (t.abs() for t in wide)
    hidden = 1.2 * linear_yardstick(x, w1, b1, None, dy @ w2, None).magnitude["y"]
    second = linear_yardstick(hidden, w2, b2, None, dy, None).magnitude
    first = linear_yardstick(x, w1, b1, None, second["dx"], activation).magnitude
    magnitude = {"y": second["y"], "dx": first["dx"], "dw1": first["dw"], "dw2": second["dw"]}
    return Yardstick(run(*wide), run(*tensors), magnitude)


def norm_yardstick(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float) -> Yardstick:
    """For `add_layer_norm`: y and dx."""

    def run(x, residual, weight, bias, dy):
        total = x + residual
        y, mean, rstd = reference.layer_norm(total, weight, bias, eps)
        dx, _, _ = reference.layer_norm_backward(dy, total, mean, rstd, weight)
        return {"y": y.to(x.dtype), "dx": dx.to(x.dtype)}

    tensors = (x, residual, weight, bias, dy)
    wide = tuple(t.double() for t in tensors)
    total = wide[0] + wide[1]
    _, _, rstd = reference.layer_norm(total, None, None, eps)
    size = total.abs() + total.abs().mean(-1, keepdim=True)
    normal, g = size * rstd, (wide[4] * wide[2]).abs()
    dx = rstd * (g + g.mean(-1, keepdim=True) + normal * (g * normal).mean(-1, keepdim=True))
    return Yardstick(run(*wide), run(*tensors), {"y": normal * wide[2].abs() + wide[3].abs(), "dx": dx})


def model_bound(eager_error: float, scale: float, dtype: torch.dtype) -> float:
    """How far a whole model may be from the fp64 run of the same weights: twice eager's error in that dtype, and a rest.

    The rest is 32 roundoffs in fp32 and 2 in half precision of a value of size `scale`, the reference's largest: where eager
    happens to be lucky the bound must not shrink to nothing.
    """
    return 2 * eager_error + (2 if dtype in HALF else 32) * UNIT[dtype] * scale


def eager_limit(scale: float, dtype: torch.dtype) -> float:
    """Beyond this an eager run is no yardstick: 2^-13 of the scale in fp32, a quarter of it in half precision."""
    return scale * (0.25 if dtype in HALF else 2.0**-13)
