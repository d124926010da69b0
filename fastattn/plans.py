"""What the kernels of a request compute and move, beside what is needed: from their tiles and the mask, without running them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastattn.lowering import EMPTY, FULL, TILE, LoweredMask, tile_status

# Of an H100, measured on one (`ceilings` of benchmarks/results/h100/ops.json): bytes a second from memory, FLOPs of bf16 products
BANDWIDTH, PEAK = 3.02e12, 797e12


class KernelPlan(NamedTuple):
    """One kernel as it is launched for a request."""

    name: str
    config: str  # in words
    rows: int  # queries of a tile
    keys: int  # keys of a tile
    products: tuple[int, int]  # matrix products of a tile with q's and with v's head dimension, each 2 rows keys D FLOPs
    moved: int  # bytes between memory, or its cache, and the multiprocessors, where no tile is skipped


class Work(NamedTuple):
    """A forward or a backward pass: what its kernels do with a mask, and the least that any could."""

    kernels: list[KernelPlan]
    visited: list[int]  # tiles, for each kernel, over all sequences and heads
    full: list[int]  # of these, tiles computed without a mask
    tiles: list[int]  # tiles that there are
    flops: int  # in visited tiles
    useful_flops: int  # of visible pairs
    moved: int
    least_bytes: int  # each tensor once

    @property
    def floor(self) -> float:
        """Seconds on an H100 in bf16 or fp16: useful FLOPs or least bytes, whichever takes longer."""
        return max(self.useful_flops / PEAK, self.least_bytes / BANDWIDTH)

    def lines(self) -> list[str]:
        result = []
        for kernel, visited, full, tiles in zip(self.kernels, self.visited, self.full, self.tiles, strict=True):
            result.append(f"{kernel.name}: {kernel.config}; tiles of {kernel.rows} x {kernel.keys}")
            result.append(f"  visits {visited:,} of {tiles:,} tiles, {full:,} of them without a mask")
        result.append(f"  {self.flops:.3g} FLOPs for {self.useful_flops:.3g} useful ones; ")
        result[-1] += f"{self.moved:.3g} bytes moved, {self.least_bytes:.3g} at least"
        result.append(f"  floor on an H100, in half precision: {self.floor * 1e6:.1f} us")
        return result


def work(kernels: list[KernelPlan], mask: LoweredMask, problem, backward: bool) -> Work:
    """Count tiles and FLOPs of the kernels that serve a pass of an attention problem."""
    B, H, M, N = problem.B, problem.H, problem.M, problem.N
    device = next((x.device for x in mask if isinstance(x, torch.Tensor)), None)
    pairs = None if mask.bits is None else LoweredMask(bits=mask.bits).visible(B, H, M, N, device)
    counts, flops = [], 0
    for kernel in kernels:
        listed = mask.key_tiles is not None  # then what is skipped is skipped by TILE
        rows, keys = (max(kernel.rows, TILE), max(kernel.keys, TILE)) if listed else (kernel.rows, kernel.keys)
        status = tile_status(mask, M, N, device, pairs, rows, keys)
        status = status.expand(B, H, *status.shape[2:])
        visited = int((status != EMPTY).sum())
        counts.append((visited, int((status == FULL).sum()), status.numel()))
        flops += _flops(visited * rows * keys, kernel.products, problem)
    useful = _flops(int(mask.visible(B, H, M, N, device).sum()), (3, 2) if backward else (1, 1), problem)
    visited_tiles, full, tiles = ([count[n] for count in counts] for n in range(3))
    moved = sum(kernel.moved for kernel in kernels)
    return Work(kernels, visited_tiles, full, tiles, flops, useful, moved, least_bytes(problem, backward))


def _flops(pairs: int, products: tuple[int, int], problem) -> int:
    return 2 * pairs * (products[0] * problem.D + products[1] * problem.Dv)


class Bytes(NamedTuple):
    """Of the tensors of an attention problem."""

    q: int
    out: int
    keys: int  # k and v together
    lse: int


def tensor_bytes(problem) -> Bytes:
    size = problem.dtype.itemsize
    queries, keys = problem.B * problem.H * problem.M, problem.B * problem.Hkv * problem.N
    return Bytes(queries * problem.D * size, queries * problem.Dv * size, keys * (problem.D + problem.Dv) * size, queries * 4)


def least_bytes(problem, backward: bool) -> int:
    """q, k, v, out and the log-sum-exp once; backward reads these and dout, and writes the three gradients."""
    q, out, keys, lse = tensor_bytes(problem)
    return 2 * (q + out + keys) + lse if backward else q + out + keys + lse
