"""Run the Triton kernels on tensors that end at an unreadable page: a read beyond a tensor's end kills this process.

The interpreter reads past the end of a tensor without a word. Run as a program with TRITON_INTERPRET=1 and the name of an op;
`assert_no_read_beyond_the_end` does so for a test.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import quick_interpreter
import torch

import fastattn
from fastattn import Packing, masks

libc = ctypes.CDLL(None, use_errno=True)
mappings = []  # kept alive


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of x whose last element is the last one before a page without permissions."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    readable = -(-size // page) * page
    mapping = mmap.mmap(-1, readable + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if libc.mprotect(ctypes.c_void_p(address + readable), page, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    mappings.append(mapping)
    offset = readable - size
    copy = torch.frombuffer(mapping, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


def attention() -> None:
    for M, N, D, Dv, group, dtype in ((17, 33, 16, 16, 1, torch.float32), (65, 5, 40, 24, 2, torch.float16)):
        q, dout = (guarded(torch.randn(1, group, M, width).to(dtype)) for width in (D, Dv))
        k, v = (guarded(torch.randn(1, 1, N, width).to(dtype)) for width in (D, Dv))
        keep = guarded(torch.rand(1, N) < 0.7)
        pairs = guarded(torch.rand(1, group, M, N) < 0.7)
        lengths = guarded(torch.tensor([N - 2], dtype=torch.int32))
        ids, key_ids = (guarded(torch.arange(L, dtype=torch.int32)[None] // 9) for L in (M, N))
        listed = masks.documents(ids, key_ids), masks.dense(pairs)
        for mask in (None, masks.causal() & masks.padding(lengths), masks.prefix_lm(lengths), masks.key_padding(keep), *listed):
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            fastattn.attention(q, k, v, mask, backend="triton").backward(dout)


def packed() -> None:
    """Sequences whose last one ends where the tensors do, and offsets and lengths that reach far beyond."""
    for lengths, longest, D, Dv, group, dtype in (
        ([33, 0, 70], 70, 16, 16, 1, torch.float32),
        ([5, 66], 66, 40, 24, 2, torch.float16),
        ([20, 60], 60, 64, 64, 1, torch.float16),  # one backward kernel
        ([20, 2**30], 200, 16, 16, 2, torch.float32),  # tiles that are full by the offsets have no rows
        ([20, 90], 100, 64, 64, 1, torch.float16),
    ):
        cu = torch.tensor([0, *lengths]).cumsum(0)
        T = min(int(cu[-1]), 83)
        packing = Packing.from_cu_seqlens(cu, longest, validate=bool(cu[-1] == T))
        packing = replace(packing, cu_seqlens=guarded(packing.cu_seqlens))
        q, dout = (guarded(torch.randn(T, group, width).to(dtype)) for width in (D, Dv))
        k, v = (guarded(torch.randn(T, 1, width).to(dtype)) for width in (D, Dv))
        keep = guarded(torch.rand(len(lengths), longest) < 0.7)
        pairs = guarded(torch.rand(len(lengths), group, longest, longest) < 0.7)
        ids = guarded(torch.arange(T, dtype=torch.int32) // 9)
        whole = guarded(torch.ones(1, 1, longest, longest, dtype=torch.bool))
        listed = masks.documents(ids), masks.dense(pairs), masks.dense(whole)
        ends = guarded(torch.tensor([longest - 2] * len(lengths), dtype=torch.int32))
        for mask in (None, masks.causal() & masks.padding(ends), masks.prefix_lm(ends), masks.key_padding(keep), *listed):
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            fastattn.varlen_attention(q, k, v, packing, mask, backend="triton").backward(dout)


def ffn() -> None:
    for rows, inputs, hidden in ((17, 33, 65), (5, 64, 24)):
        sizes = ((rows, inputs), (hidden, inputs), (hidden,), (inputs, hidden), (inputs,))
        args = [guarded(torch.randn(size)).requires_grad_() for size in sizes]
        fastattn.ffn(*args, backend="triton").backward(guarded(torch.randn(rows, inputs)))
        residual = guarded(torch.randn(rows, hidden))
        y = fastattn.linear(*args[:3], activation="silu", residual=residual, backend="triton")
        y.backward(guarded(torch.randn(rows, hidden)))


def gated() -> None:
    from fastattn.kernels.triton import gated as kernels

    for rows, inputs, hidden in ((17, 33, 65), (5, 64, 24)):
        sizes = ((rows, inputs), (2 * hidden, inputs), (2 * hidden,), (inputs, hidden), (inputs,))
        x, w1, b1, w2, b2 = (guarded(torch.randn(size)) for size in sizes)
        seed, dy = guarded(torch.tensor([7])), guarded(torch.randn(rows, inputs))
        for drop in ((None, 0.0), (seed, 0.3)):
            args = x, w1, b1, w2, b2, "geglu", True, "triton", *drop
            _, hidden_layer, z = torch.ops.fastattn.ffn_forward(*args)
            given = dy, x, w1, b1, w2, b2, guarded(hidden_layer), guarded(z)
            torch.ops.fastattn.ffn_backward(*given, "geglu", [True] * 5, "triton", *drop)
            kernels.forward_plan(given[-1], "geglu", *drop)(given[-1], drop[0])


def norm() -> None:
    for rows, width in ((17, 33), (3, 64), (1, 129)):
        x, residual, dy, dsum = (guarded(torch.randn(rows, width)) for _ in range(4))
        weight, bias = guarded(torch.randn(width)), guarded(torch.randn(width))
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        outputs = fastattn.add_layer_norm(*leaves, return_sum=True, backend="triton")
        torch.autograd.grad(outputs, leaves, (dy, dsum))
        torch.autograd.grad(fastattn.add_rms_norm(*leaves[:3], backend="triton"), leaves[:3], dy)


def rotary() -> None:
    for shape, R in (((1, 3, 17, 20), 12), ((2, 1, 33, 16), 16), ((19, 2, 6), 4)):
        q, k, dq, dk = (guarded(torch.randn(shape)) for _ in range(4))
        tables = [guarded(torch.randn(shape[-2] if len(shape) == 4 else shape[0], R // 2)) for _ in range(2)]
        for interleaved in (False, True):
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            turned = fastattn.rotary(*leaves, *tables, interleaved=interleaved, backend="triton")
            torch.autograd.grad(turned, leaves, (dq, dk))


def assert_no_read_beyond_the_end(op: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("guard pages are a matter of CPU memory")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__, op], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert "no read beyond the end" in done.stdout


if __name__ == "__main__":
    torch.manual_seed(0)
    quick_interpreter.quicken()
    {"attention": attention, "packed": packed, "ffn": ffn, "gated": gated, "norm": norm, "rotary": rotary}[
        (sys.argv[1:] or ["attention"])[0]
    ]()
    print("no read beyond the end")
