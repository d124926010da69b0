"""The activations on the device, in fp32: act(z), and act'(z), by their names in `fastattn.activations`.

gelu_tanh is z sigmoid(2 u), which equals 0.5 z (1 + tanh(u)) and needs no tanh: far out exp is 0 or Inf, and both are right.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAMES = (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")  # what `activate` and `derivative` have a branch for

# A constant stands right of a tensor: the interpreter takes `constant * tensor` for a constant.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)  # 2 u = this times (z + 0.044715 z^3)
CUBIC = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)


@triton.jit
def activate(z, NAME: tl.constexpr):
    if NAME == "gelu":
        return z * (0.5 + 0.5 * tl.math.erf(z * SQRT_HALF))
    elif NAME == "gelu_tanh":
        return z * _sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
    elif NAME == "quick_gelu":
        return z * _sigmoid(z * QUICK)
    elif NAME == "relu":
        return tl.where(z < 0.0, 0.0, z)  # NaN stays NaN
    elif NAME == "silu":
        return z * _sigmoid(z)
    else:
        tl.static_assert(NAME is None, "an activation without a device function")
        return z


@triton.jit
def derivative(z, NAME: tl.constexpr):
    if NAME == "gelu":
        return 0.5 + 0.5 * tl.math.erf(z * SQRT_HALF) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif NAME == "gelu_tanh":
        s = _sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
        return s + z * s * (1.0 - s) * (1.0 + z * z * (3.0 * CUBIC)) * TWO_SQRT_2_OVER_PI
    elif NAME == "quick_gelu":
        s = _sigmoid(z * QUICK)
        return s + z * QUICK * s * (1.0 - s)
    elif NAME == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "silu", "an activation without a device function")
        s = _sigmoid(z)
        return s + z * s * (1.0 - s)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
