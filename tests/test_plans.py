"""What `explain(verbose=True)` and the table of plans say of kernels."""

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.lowering import LoweredMask
from fastattn.ops.attention_plans import AttentionProblem
from fastattn.plans import KernelPlan, least_bytes, work

PROBLEM = AttentionProblem("cpu", torch.float16, B=2, H=4, M=128, N=192, D=64, Hkv=2, Dv=32)
KERNEL = KernelPlan("kernel", "4 warps", 64, 64, (1, 1), 1000)


def test_tiles_and_flops_are_counted_under_the_mask():
    mask = masks.causal("top_left").lower(128, 192)
    found = work([KERNEL], mask, PROBLEM, backward=False)
    assert (found.visited, found.full, found.tiles) == ([3 * 8], [1 * 8], [6 * 8])
    assert found.flops == 3 * 8 * 64 * 64 * 2 * (64 + 32)
    assert found.useful_flops == 8 * (128 * 129 // 2) * 2 * (64 + 32)
    assert found.moved == 1000


def test_least_bytes_are_each_tensor_once():
    q, out, k, v = 2 * 4 * 128 * 64, 2 * 4 * 128 * 32, 2 * 2 * 192 * 64, 2 * 2 * 192 * 32
    lse = 2 * 4 * 128 * 4
    assert least_bytes(PROBLEM, False) == 2 * (q + out + k + v) + lse
    assert least_bytes(PROBLEM, True) == 2 * (2 * q + 2 * out + 2 * k + 2 * v) + lse


def test_backward_is_five_products():
    found = work([KERNEL], LoweredMask(), PROBLEM, backward=True)
    assert found.useful_flops == 8 * 128 * 192 * 2 * (3 * 64 + 2 * 32)


def test_listed_tiles_are_counted_by_64():
    mask = masks.rows(8, 16).lower(128, 128)
    problem = AttentionProblem("cpu", torch.float16, B=2, H=4, M=128, N=128, D=64, Hkv=4, Dv=64)
    found = work([KERNEL._replace(rows=16, keys=32)], mask, problem, backward=False)
    assert (found.visited, found.tiles) == ([2 * 8], [4 * 8])


def test_floor_is_the_longer_of_two_times():
    memory = work([KERNEL], LoweredMask(), PROBLEM, backward=False)
    assert memory.floor == pytest.approx(memory.least_bytes / 3.02e12)
    long = AttentionProblem("cpu", torch.float16, B=1, H=1, M=4096, N=4096, D=64, Hkv=1, Dv=64)
    products = work([KERNEL], LoweredMask(), long, backward=False)
    assert products.floor == pytest.approx(products.useful_flops / 797e12)


def test_explain_says_what_has_no_plan():
    q = torch.zeros(1, 1, 4, 16)
    assert fastattn.explain(q, q, q, backend="eager", verbose=True).details == ["computed by PyTorch: no tiles to count"]
    assert fastattn.explain(q, q, q, backend="eager").details == []
