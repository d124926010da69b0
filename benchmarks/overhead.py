"""Host time of `fastattn.attention` over the kernel it calls: `python -m benchmarks.overhead`.

The cpu backend's kernel is replaced by one that returns ready tensors, so that what is left is Python, checks and PyTorch's
dispatcher. Microseconds per call, the least of several rounds, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch

import fastattn
from fastattn.kernels.cpu import attention as cpu

ROUNDS, CALLS = 9, 2000


def main() -> None:
    torch.set_num_threads(1)
    q, k, v = torch.randn(3, 1, 8, 4, 16).transpose(2, 3).unbind()
    ready = torch.empty(1, 8, 4, 16).transpose(1, 2), torch.empty(1, 4, 8)
    padding = fastattn.masks.padding(torch.tensor([8]))
    trained = q.clone().requires_grad_()
    with mock.patch.object(cpu, "forward", return_value=ready):
        with torch.no_grad():
            print(f"no grad, no mask   {microseconds(lambda: fastattn.attention(q, k, v)):5.1f} us")
            print(f"no grad, padding   {microseconds(lambda: fastattn.attention(q, k, v, padding)):5.1f} us")
        print(f"grad, no mask      {microseconds(lambda: fastattn.attention(trained, k, v)):5.1f} us")
        print(f"grad, padding      {microseconds(lambda: fastattn.attention(trained, k, v, padding)):5.1f} us")


def microseconds(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best * 1e6


if __name__ == "__main__":
    main()
