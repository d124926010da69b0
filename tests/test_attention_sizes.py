"""Attention where integers are large: tensors that span more than 2^31 elements, more heads than 65,535."""

import mmap

import pytest
import torch
from backends import BACKENDS, CUDA, TRITON, device_of, dtype_of, head_dim_of

import fastattn
from fastattn import Packing, masks
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask, pack_bits, tile_lists, tile_status

FAR = 2**31 + 16  # elements between two sequences
MAP_NORESERVE = 0x4000  # Linux's, which the module mmap does not name: memory that is not written is not counted
PLACE = 4096  # bytes
ON_GPU = 4 * FAR + 2**20  # bytes
mappings = []
places = []


@pytest.fixture(autouse=True)
def unmapped():
    yield
    mappings.clear()
    places.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the tests of other processes


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x (2, ...) with its two halves FAR elements apart."""
    assert x[0].numel() * x.element_size() <= PLACE
    return memory(x, FAR + x[0].numel()).as_strided(x.shape, (FAR, *x[0].contiguous().stride())).copy_(x)


def memory(x: torch.Tensor, elements: int) -> torch.Tensor:
    """On x's device and in its dtype. Without a GPU only what is written takes space; a GPU has one buffer of 9 GB, in which each
    tensor begins at a place of its own: what is between its ends belongs to others."""
    size = elements * x.element_size()
    if x.device.type != "cuda":
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        mappings.append(mapping)
        return torch.frombuffer(mapping, dtype=torch.uint8).view(x.dtype)
    if not mappings:
        mappings.append(torch.empty(ON_GPU, dtype=torch.uint8, device=x.device))
    begin = PLACE * len(places)
    places.append(begin)
    assert begin + size <= ON_GPU
    return mappings[0][begin : begin + size].view(x.dtype)


@pytest.mark.parametrize("extras", ["bias and dropout", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_span_more_than_2_to_the_31_elements(backend, extras, monkeypatch):
    if extras is not None and backend == "cuda":
        pytest.skip("the CUDA C++ kernels take neither")
    device, D, dtype = device_of(backend), head_dim_of(backend), dtype_of(backend)
    q, k, v, dout = (torch.randn(2, L, 1, D).to(device, dtype) for L in (5, 7, 7, 5))
    keep = torch.rand(2, 1, 5, 7, device=device) < 0.7
    bits = pack_bits(keep)
    lists = [
        tile_lists(s) for s in (tile_status(LoweredMask(), 5, 7, device, keep), tile_status(LoweredMask(), 5, 7, device, keep).mT)
    ]
    ids, key_ids = (torch.zeros(2, L, dtype=torch.int32, device=device) for L in (5, 7))
    keys = torch.ones(2, 7, dtype=torch.bool, device=device)
    near = LoweredMask(keys=keys, ids=ids, key_ids=key_ids, bits=bits, key_tiles=lists[0], query_tiles=lists[1])
    far = LoweredMask(**{name: x if x is None else far_apart(x) for name, x in near._asdict().items()})
    near_extras = far_extras = NO_EXTRAS
    if extras is not None:
        bias = torch.randn(2, 1, 5, 7).to(device, dtype)
        near_extras = Extras(bias=bias, kept=pack_bits(torch.rand(2, 1, 5, 7, device=device) < 0.5), dropout=0.5)
        far_extras = near_extras._replace(bias=far_apart(bias))  # bits are made contiguous

    def run(mask, extras, *tensors):
        q, k, v, dout = (x.transpose(1, 2) for x in tensors)
        out, lse = torch.ops.fastattn.attention_forward(q, k, v, *mask, *extras, 0.2, backend, True)
        given = (dout, None, q, k, v, out, lse, *mask, *extras, 0.2, backend, extras is not NO_EXTRAS)
        return out, lse, *torch.ops.fastattn.attention_backward(*given)

    expected = run(near, near_extras, q, k, v, dout)
    honest = torch.Tensor.new_empty

    def far_new_empty(x, *size, **options):  # so that results span as much as the arguments
        made = honest(x, *size, **options)
        return far_apart(made) if made.dim() == 4 else made

    if backend in ("triton", "cuda"):
        monkeypatch.setattr(torch.Tensor, "new_empty", far_new_empty)
    for actual, wanted in zip(run(far, far_extras, *(far_apart(x) for x in (q, k, v, dout))), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("backend", [TRITON])
def test_packed_sequence_beyond_2_to_the_31_elements(backend, single, monkeypatch):
    """The step from row to row is less, that from the first sequence to the second more."""
    from fastattn.kernels.triton import attention

    rows, step, D, ends = 2050, 2**20 + 16, 32, [0, 1, -2, -1]
    near = [torch.randn(4, 1, D, device=device_of(backend), dtype=torch.float16) for _ in range(4)]
    if not single:
        monkeypatch.setattr(attention, "single_config", lambda *request: None)

    def far_rows(x: torch.Tensor) -> torch.Tensor:
        """(rows, 1, D), `step` elements from row to row."""
        return memory(x, (rows - 1) * step + D).as_strided((rows, 1, D), (step, D, 1))

    def run(cu, q, k, v, dout):
        packing = Packing.from_cu_seqlens(torch.tensor(cu, device=q.device), 2, validate=False, capacity=q.shape[0])
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = fastattn.varlen_attention(*leaves, packing, backend=backend)
        return [x[ends] for x in (out, *torch.autograd.grad(out, leaves, dout))]

    far = [far_rows(x) for x in near]
    for x, some in zip(far, near, strict=True):
        x[ends] = some
    expected = run([0, 2, 4], *near)
    honest = torch.Tensor.new_full

    def far_new_full(x, size, *value, **options):  # so that results span as much as the arguments
        return far_rows(x)[None] if len(size) == 4 else honest(x, size, *value, **options)

    monkeypatch.setattr(torch.Tensor, "new_full", far_new_full)
    for actual, wanted in zip(run([0, rows - 2, rows], *far), expected, strict=True):
        assert torch.equal(actual, wanted) and wanted.abs().max() > 0


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_more_heads_than_65535(backend):
    q, k, v = (torch.randn(70_000, 1, 1, 2, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, masks.causal(), backend=backend)
    out.sum().backward()
    assert torch.equal(out, v) and torch.equal(v.grad, torch.ones_like(v))


@pytest.mark.parametrize("backend", [TRITON, CUDA])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="70,000 blocks take minutes without a GPU; their grid has one axis")
def test_more_heads_than_65535_on_a_gpu(backend):
    q, k, v = (torch.randn(70_000, 1, 1, 32, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, masks.causal(), backend=backend)
    out.sum().backward()
    assert torch.equal(out, v) and torch.equal(v.grad, torch.ones_like(v))
