"""The forward kernel of `linear`: one tile of y = act(x W^T + b) + residual per program, everything after the sum in fp32.

What is fused is what a library's product leaves to be done: z is read by nobody, or written once for the backward. Where there
is a seed, act(z) goes through dropout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.activations import activate
from fastattn.kernels.triton.philox import kept_tile
from fastattn.kernels.triton.primitives import load_tile, store_tile
from fastattn.kernels.triton.product import product_transposed, tile_of

RUNTIME = ["x_m", "weight_m", "residual_m", "y_m", "z_m", "threshold", "factor", "M", "N", "K"]


@triton.jit(do_not_specialize=RUNTIME)
def _linear_forward_kernel(
    x, weight, bias, residual, y, z, seed, M,
    x_m, weight_m, residual_m, y_m, z_m, threshold, factor, N, K,
    ACTIVATION: tl.constexpr, TAG: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (M, K), weight (N, K), bias (N,) or None, residual (M, N) or None; y and z (M, N), z or None."""
    N, K = N * VECTOR, K * VECTOR
    row, column = tile_of(M, N, BLOCK_M, BLOCK_N)
    m, n = row * BLOCK_M, column * BLOCK_N
    acc = product_transposed(
        x, weight, m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), x_m * VECTOR, weight_m * VECTOR, M, N, K,
        WHOLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        i = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + i, mask=i < N, other=0.0).to(tl.float32)[None, :]
    if z is not None:
        store_tile(z, m, n, z_m * VECTOR, M, N, acc, BLOCK_M, BLOCK_N)
    acc = activate(acc, ACTIVATION)
    if seed is not None:
        acc = tl.where(kept_tile(seed, m, n, threshold, TAG, BLOCK_M, BLOCK_N), acc * factor, 0.0)
    if residual is not None:
        acc += load_tile(residual, m, n, residual_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    store_tile(y, m, n, y_m * VECTOR, M, N, acc, BLOCK_M, BLOCK_N)
