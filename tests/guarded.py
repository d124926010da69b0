"""Run the Triton kernels on tensors that end at an unreadable page: a read beyond a tensor's end kills this process.

The interpreter reads past the end of a tensor without a word. Run as a program with TRITON_INTERPRET=1.
"""

import ctypes
import mmap

import torch

import fastattn
from fastattn import masks

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


def main() -> None:
    torch.manual_seed(0)
    for M, N, D in ((17, 33, 16), (65, 5, 40)):
        q, k, v = (guarded(torch.randn(1, 1, L, D)) for L in (M, N, N))
        dout = guarded(torch.randn(1, 1, M, D))
        keep = guarded(torch.rand(1, N) < 0.7)
        pairs = guarded(torch.rand(1, 1, M, N) < 0.7)
        lengths = guarded(torch.tensor([N - 2], dtype=torch.int32))
        for mask in (None, masks.causal() & masks.padding(lengths), masks.key_padding(keep), masks.dense(pairs)):
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            fastattn.attention(q, k, v, mask, backend="triton").backward(dout)
    print("no read beyond the end")


if __name__ == "__main__":
    main()
