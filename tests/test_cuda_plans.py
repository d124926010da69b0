"""Plans of the CUDA backend: made from one call's tensors, right for others, and little work in each call."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import test_varlen
import torch
from backends import CUDA, device_of, run_backward, run_forward
from torch import Tensor

from fastattn import Packing, masks
from fastattn.kernels.cuda import attention, ffn, library
from fastattn.lowering import LoweredMask, Prepared
from fastattn.testing import MASKS, attention_inputs

DEVICE = device_of("cuda")
on_cuda = pytest.mark.parametrize("backend", [CUDA])  # an argument for its marks; the module's functions are called directly


def dense(mask, seed, M=70, N=125, B=2, dlse=True):
    """The tensors of a backward without out and lse, and the mask."""
    x = attention_inputs(B, 2, M, N, 32, torch.float16, DEVICE, Hkv=1, mask=mask, seed=seed, dlse=dlse)
    return x.dout, x.dlse, x.q, x.k, x.v, x.lowered()


def packed(mask, lengths, key_lengths, seed, extra=None):
    """The same of packed sequences, of which the longest has 66 queries and as many keys."""
    B, L, g = len(lengths), 66, torch.Generator().manual_seed(seed)

    def packing(some):
        return Packing.from_lengths(torch.tensor(some, device=DEVICE), L, None if extra is None else sum(some) + extra)

    def normal(rows, heads):
        return torch.randn(1, rows, heads, 32, generator=g).to(DEVICE, torch.float16).transpose(1, 2)

    queries, keys = packing(lengths), packing(key_lengths)
    mask = test_varlen.packed_ids(MASKS[mask](B, 2, L, L, g, DEVICE), queries, keys) or masks.full()
    q, k, v, dout = normal(queries.capacity, 2), normal(keys.capacity, 1), normal(keys.capacity, 1), normal(queries.capacity, 2)
    return dout, torch.randn(1, 2, queries.capacity, generator=g).to(DEVICE), q, k, v, mask.lower_packed(queries, keys, 2)


class Plans:
    """A forward and a backward plan of one request, and what they and fresh ones give for others."""

    def __init__(self, dout, dlse, q, k, v, mask, scale=0.2):
        self.scale = scale
        prepared = Prepared(mask)
        self.forward = attention.forward_plan(q, k, v, prepared, scale, True, True)
        out, lse = self.forward(q, k, v, prepared)
        self.backward = attention.backward_plan(dout, dlse, q, k, v, out, lse, prepared, scale)

    def agree(self, dout, dlse, q, k, v, mask):
        prepared = Prepared(mask)
        out, lse = self.forward(q, k, v, prepared)
        planned = out, lse, *self.backward(dout, dlse, q, k, v, out, lse, prepared)
        out, lse = run_forward(attention, q, k, v, mask, self.scale)
        fresh = out, lse, *run_backward(attention, dout, dlse, q, k, v, out, lse, mask, self.scale)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(planned, fresh, strict=True))
        return planned


def metadata(fields):
    return [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in fields]


@pytest.mark.usefixtures("poisoned", "alone")
@on_cuda
@pytest.mark.parametrize("kernels", ["one", "two"])
@pytest.mark.parametrize("mask", MASKS)
def test_other_tensors(backend, monkeypatch, mask, kernels):
    monkeypatch.setattr(attention, "one_kernel", lambda *sizes: kernels == "one")
    first, second = dense(mask, seed=1), dense(mask, seed=2)
    assert metadata(first[5]) == metadata(second[5])
    plans = Plans(*first)
    before, _, after = plans.agree(*first), plans.agree(*second), plans.agree(*first)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.usefixtures("poisoned", "alone")
@on_cuda
@pytest.mark.parametrize("kernels", ["one", "two"])
@pytest.mark.parametrize("extra", [None, 3])
@pytest.mark.parametrize("mask", ["none", "causal", "padding_queries", "documents_causal", "dense"])
def test_other_numbers_of_packed_rows(backend, monkeypatch, mask, extra, kernels):
    """None at all among them, where no row is extra, on one side or both."""
    monkeypatch.setattr(attention, "one_kernel", lambda *sizes: kernels == "one")
    cross = mask in ("none", "padding_queries")  # the others' bounds are of equal lengths
    lengths = [(5, 0, 66), (40, 3, 1), (0, 0, 0), (66, 66, 66)]
    key_lengths = [(66, 9, 0), (0, 0, 0), (7, 0, 0), (1, 2, 3)] if cross else lengths
    requests = [packed(mask, m, n, seed, extra) for seed, (m, n) in enumerate(zip(lengths, key_lengths, strict=True))]
    for first in requests[:3]:
        plans = Plans(*first)
        for request in requests:
            plans.agree(*request)


@pytest.mark.usefixtures("poisoned", "alone")
@on_cuda
def test_layouts_that_the_kernels_do_not_read(backend):
    """Gradients of lse of any strides, and vectors of a mask with gaps."""
    dout, dlse, q, k, v, mask = dense("padding", seed=1)
    spaced = mask._replace(key_end=torch.stack([mask.key_end, mask.key_end], 1)[:, 0])
    plans = Plans(dout, dlse, q, k, v, spaced)
    first, second = plans.agree(dout, dlse, q, k, v, spaced), plans.agree(dout, dlse.mT.contiguous().mT, q, k, v, spaced)
    assert not spaced.key_end.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_cuda
def test_nothing_of_a_call_is_kept(backend):
    """A plan outlives the tensors that it was made from, and those of its calls."""
    dout, dlse, q, k, v, mask = dense("documents", seed=1)
    x, weight, bias = q[0, 0], k[0, 0], torch.zeros(125, device=DEVICE)
    plans = Plans(dout, dlse, q, k, v, mask)
    plan = ffn.forward_plan(x, weight, bias, None, "gelu", True)
    plan(x, weight, bias, None)
    kept = [weakref.ref(t) for t in (dout, dlse, q, k, v, x, weight, bias, *mask) if isinstance(t, Tensor)]
    del dout, dlse, q, k, v, mask, x, weight, bias
    gc.collect()
    assert len(kept) > 8 and not [ref for ref in kept if ref() is not None] and plans.forward and plan


def normal(*sizes, dtype=torch.float16):
    return torch.randn(sizes).to(DEVICE, dtype)


ROWS = {
    "matrix": lambda rows, K: normal(rows, K),
    "matrix in a wider one": lambda rows, K: normal(rows, K + 8)[:, 8:],
    "batch": lambda rows, K: normal(rows, 2, K) if rows > 1 else normal(1, 1, K + 8)[:, :, 8:],  # one row is contiguous in any
}


@pytest.mark.usefixtures("poisoned")
@on_cuda
@pytest.mark.parametrize(("K", "F"), [(64, 40), (33, 20)])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("residual", [None, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ROWS)
def test_linear_of_other_rows(backend, K, F, activation, residual, layout):
    requests = []
    for rows in (1, 70, 0, 3):
        x = ROWS[layout](rows, K)
        added = None if residual is None else normal(*x.shape[:-1], F, dtype=residual)
        requests.append((x, normal(F, K), normal(F, dtype=torch.float32), added))
    assert_linear_agrees(requests, activation)


@pytest.mark.usefixtures("poisoned")
@on_cuda
@pytest.mark.parametrize("what", range(4))
def test_linear_of_what_is_copied(backend, what):
    """x, weight, bias or residual in a layout or a dtype that the kernel does not read."""

    def request():
        x, weight, bias, residual = normal(3, 5, 40), normal(24, 40), normal(24), normal(3, 5, 24)
        copied = normal(5, 3, 40).transpose(0, 1), weight.float(), normal(48)[::2], normal(3, 24, 5).mT
        return [copied[i] if i == what else t for i, t in enumerate((x, weight, bias, residual))]

    assert_linear_agrees([request(), request()], "gelu")


def assert_linear_agrees(requests, activation):
    for first in requests:
        plan = ffn.forward_plan(*first, activation, True)
        for args in requests:
            dense = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in args]
            for a, b in zip(plan(*args), ffn.forward_plan(*dense, activation, True)(*dense), strict=True):
                assert (a is b is None) or torch.equal(a, b)


@pytest.fixture
def stub(monkeypatch):
    """In place of the compiled module and a GPU: launches do nothing. The integers that they get."""
    launches, kernel = [], library.Kernel

    def request(*args, **kwargs):
        return SimpleNamespace(launch=lambda *integers: launches.append(integers))

    def kernel_on_a_gpu(name, request, device, *rest):
        return kernel(name, request, torch.device("cuda", 1), *rest)

    module = SimpleNamespace(AttentionForward=request, AttentionBackward=request, Linear=request)
    monkeypatch.setattr(library, "compiled", lambda device: module)
    monkeypatch.setattr(attention, "shared_memory", lambda device: attention.EMULATED_SHARED)
    monkeypatch.setattr(library, "Kernel", kernel_on_a_gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    return launches


def functions_entered(function, *args):
    """How many functions, of Python and of C, a call enters, itself among them."""
    entered = []
    sys.setprofile(lambda frame, event, arg: entered.append(event) if event in ("call", "c_call") else None)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return len(entered) - 1  # the last one is setprofile


def test_a_call_does_little(stub):
    dout, _, q, k, v, mask = dense("none", seed=0)
    plans, none = Plans(dout, None, q, k, v, mask), Prepared(mask)
    (out, lse), padding = plans.forward(q, k, v, none), dense("causal_padding", seed=0)
    padded = Plans(*padding)
    x, weight, bias = q[0, 0], k[0, 0], torch.zeros(125, device=DEVICE)
    linear = ffn.forward_plan(x, weight, bias, None, "gelu", False)
    assert functions_entered(plans.forward, q, k, v, none) <= 20
    assert functions_entered(padded.forward, *padding[2:5], Prepared(padding[5])) <= 23
    assert functions_entered(plans.backward, dout, None, q, k, v, out, lse, none) <= 32
    assert functions_entered(linear, x, weight, bias, None) <= 15
    functions_entered(plans.forward, q, k, v, none)
    assert stub[-1][:3] == tuple(x.data_ptr() for x in (q, k, v)) and stub[-1][5:] == (71,)


def test_a_launch_takes_addresses_in_the_order_of_the_names(stub, monkeypatch):
    """Of packed sequences then the rows, then the stream."""
    named, launch = [], library.launch

    def recorded(kernel, tensors, *numbers):
        named.append(dict(zip(kernel.tensors, tensors, strict=True)))
        return launch(kernel, tensors, *numbers)

    monkeypatch.setattr(library, "launch", recorded)
    monkeypatch.setattr(attention, "one_kernel", lambda *sizes: False)
    dout, dlse, q, k, v, mask = packed("documents_causal", (5, 0, 66), (5, 0, 66), seed=0)
    out, lse = run_forward(attention, q, k, v, mask, 0.2)
    dq, dk, dv = run_backward(attention, dout, dlse, q, k, v, out, lse, mask, 0.2)
    fields = {name: x for name, x in mask._asdict().items() if isinstance(x, Tensor)}
    backward = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
    expected = {"q": q, "k": k, "v": v, "out": out, "lse": lse} | fields, backward | {"delta": named[1]["delta"]} | fields
    for integers, found, tensors in zip(stub, named, expected, strict=True):
        assert list(found) == list(tensors) and integers == (*(x.data_ptr() for x in tensors.values()), 71, 71, 71)


def test_nothing_is_launched_for_nothing(stub):
    for B, M, N, launched in ((0, 3, 4, 0), (2, 0, 4, 0), (2, 3, 0, 1)):
        dout, dlse, q, k, v, _ = dense("none", 0, M, N, B)
        out, lse = run_forward(attention, q, k, v, LoweredMask(), 0.2)
        gradients = run_backward(attention, dout, dlse, q, k, v, out, lse, LoweredMask(), 0.2)
        assert len(stub) == launched and all((t == 0).all() for t in gradients)
        stub.clear()
