"""`Packing`: there and back, its metadata, static capacities, wrong input; and packed attention as an operator."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastattn
from fastattn import Packing, masks
from fastattn.packing import INTEGERS, check_sizes

LENGTHS, L = (3, 0, 5, 1), 5
RIGHT = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
MASKS = {
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "holes": torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool(),
}


def all_of(kind, capacity=None):
    """The same packing from everything that can say it."""
    found = [Packing.from_mask(MASKS[kind], capacity)]
    if kind == "right":
        cu = torch.tensor([0, 3, 3, 8, 9])
        found += [
            Packing.from_lengths(LENGTHS, L, capacity),
            Packing.from_lengths(torch.tensor(LENGTHS, dtype=torch.int32), L, capacity),
            Packing.from_cu_seqlens(cu, L, capacity=capacity),
            Packing.from_cu_seqlens(cu.tolist(), L, capacity=capacity),
            Packing.from_cu_seqlens(cu, L, validate=False, capacity=capacity),
        ]
    return found


@pytest.mark.parametrize("capacity", [None, 9, 14])
@pytest.mark.parametrize("kind", MASKS)
def test_there_and_back(kind, capacity):
    mask = MASKS[kind]
    x = torch.randn(4, L, 2, 3).masked_fill(~mask[..., None, None], float("nan"))  # what stands at padding is not read
    for packing in all_of(kind, capacity):
        assert packing.lengths.tolist() == list(LENGTHS) and packing.lengths.dtype == torch.int32
        assert packing.cu_seqlens.tolist() == [0, 3, 3, 8, 9] and packing.cu_seqlens.dtype == torch.int32
        assert packing.total == 9 and packing.max_length == L and not packing.overflowed
        packed = packing.pack(x)
        assert packed.shape == (packing.capacity, 2, 3)
        assert torch.equal(packed[:9], x[mask]) and not packed[9:].any()
        assert torch.equal(packing.positions[:9], torch.arange(L).expand(4, L)[mask]) and not packing.positions[9:].any()
        packed[9:] = float("nan")
        assert torch.equal(packing.unpack(packed), x.nan_to_num(0.0))
        flags = packing.pack(mask)
        assert flags.dtype == torch.bool and flags.sum() == 9 and torch.equal(packing.unpack(flags), mask)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype_of_torch_and_numpy(dtype):
    lengths, cu = (torch.tensor(x).to(dtype) for x in (LENGTHS, (0, 3, 3, 8, 9)))
    for packing in (
        Packing.from_lengths(lengths, L),
        Packing.from_lengths(lengths.numpy(), np.int64(L)),
        Packing.from_lengths(lengths.numpy()[::-1][::-1], L, np.int16(9)),
        Packing.from_lengths(tuple(lengths.numpy()), L),
        Packing.from_cu_seqlens(cu, L),
        Packing.from_cu_seqlens(cu.numpy(), L, validate=False, capacity=9),
    ):
        assert packing.lengths.tolist() == list(LENGTHS) and packing.cu_seqlens.tolist() == [0, 3, 3, 8, 9]
        assert type(packing.max_length) is type(packing.capacity) is int
    assert Packing.from_lengths(lengths.to("meta"), L, 14).indices.shape == (14,)
    assert Packing.from_lengths(lengths.numpy()[:0], L).lengths.tolist() == []
    assert Packing.from_lengths(range(3), L).lengths.tolist() == [0, 1, 2]


@pytest.mark.parametrize("capacity", [None, 14, 6])
@pytest.mark.parametrize("kind", MASKS)
def test_gradients(kind, capacity):
    packing = Packing.from_mask(MASKS[kind], capacity)
    x = torch.randn(4, L, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(packing.capacity, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, x) and torch.autograd.gradcheck(packing.unpack, y)
    assert torch.autograd.gradgradcheck(packing.pack, x) and torch.autograd.gradgradcheck(packing.unpack, y)


@pytest.mark.parametrize("capacity", [None, 14])
@pytest.mark.parametrize("inside", [False, True], ids=["of its tensors", "made in it"])
def test_a_packing_of_inference_mode_serves_training(inside, capacity):
    with torch.inference_mode():
        lengths, mask, cu = torch.tensor(LENGTHS), RIGHT.clone(), torch.tensor([0, 3, 3, 8, 9])
    with torch.inference_mode(inside):
        packings = [
            Packing.from_lengths(lengths, L, capacity),
            Packing.from_mask(mask, capacity),
            Packing.from_cu_seqlens(cu, L, capacity=capacity),
            Packing.from_cu_seqlens(cu.int(), L, validate=False, capacity=9),
        ]
    x = torch.randn(4, L, 2, requires_grad=True)
    for packing in packings:
        grad = torch.autograd.grad(packing.unpack(packing.pack(x)).square().sum(), x)[0]
        torch.testing.assert_close(grad, 2 * x.detach().masked_fill(~RIGHT[..., None], 0))
        rows = packing.pack(x)
        assert torch.autograd.grad(fastattn.varlen_attention(rows[:, None], *[rows[:, None]] * 2, packing).sum(), x)[0].any()


@pytest.mark.parametrize("kind", MASKS)
def test_overflow_drops_the_last_tokens_and_says_so(kind):
    for packing in all_of(kind, 6):
        assert packing.overflowed and packing.overflowed.dtype == torch.bool and packing.overflowed.shape == ()
        assert packing.capacity == packing.total == 6
        assert packing.lengths.tolist() == [3, 0, 3, 0] and packing.cu_seqlens.tolist() == [0, 3, 3, 6, 6]
        x = torch.randn(4, L)
        kept = MASKS[kind] & (MASKS[kind].flatten().cumsum(0) <= 6).view(4, L)
        assert torch.equal(packing.unpack(packing.pack(x)), x.masked_fill(~kept, 0))


@pytest.mark.parametrize("capacity", [None, 3])
def test_nothing_in_it(capacity):
    for packing in (Packing.from_lengths([], 4, capacity), Packing.from_cu_seqlens([0], 4, capacity=capacity)):
        assert packing.total == 0 and packing.unpack(packing.pack(torch.randn(0, 4, 2))).shape == (0, 4, 2)
    for packing in (Packing.from_lengths([0, 0], 4, capacity), Packing.from_mask(torch.zeros(2, 4).bool(), capacity)):
        rows = packing.pack(torch.randn(2, 4, 2))
        assert rows.shape == (capacity or 0, 2) and not rows.any()
        assert torch.equal(packing.unpack(rows), torch.zeros(2, 4, 2))
        q = torch.randn(packing.capacity, 2, 16, requires_grad=True)
        out, lse = fastattn.varlen_attention(q, q, q, packing, return_lse=True)
        assert not out.any() and (lse == -float("inf")).all()
        assert not torch.autograd.grad(out.sum(), q)[0].any()
    assert Packing.from_mask(torch.zeros(2, 0).bool()).pack(torch.zeros(2, 0, 3)).shape == (0, 3)


@pytest.mark.parametrize("cu", [[0, 3, 2, 9], [2, 4, 9, 9], [-4, 0, 5, 7], [0, 100, 200, 300], [9, 0, 0, 0], [0, 2**40, 1, 5]])
def test_unvalidated_offsets_become_such_that_are_right(cu):
    packing = Packing.from_cu_seqlens(torch.tensor(cu), 4, validate=False, capacity=9)
    assert (packing.cu_seqlens.diff() >= 0).all() and packing.cu_seqlens.min() >= 0 and packing.cu_seqlens.max() <= 9
    assert (packing.lengths <= 4).all() and packing.indices.min() >= 0 and packing.indices.max() <= 12
    x = torch.arange(1.0, 13).view(3, 4)
    again = packing.unpack(packing.pack(x))
    assert torch.equal(again, x.masked_fill(torch.arange(4) >= packing.lengths[:, None], 0))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "lengths must be in 0..max_length = 5", lambda: Packing.from_lengths([3, 6], 5)),
        (ValueError, "lengths must be in 0..max_length = 5", lambda: Packing.from_lengths([3, -1], 5, 8)),
        (TypeError, "lengths must hold integers", lambda: Packing.from_lengths([3.0], 5)),
        (ValueError, "lengths must have shape", lambda: Packing.from_lengths(torch.ones(2, 2, dtype=torch.int32), 5)),
        (TypeError, "lengths must hold integers, got an array of float64", lambda: Packing.from_lengths(np.ones(2), 5)),
        (TypeError, "lengths must hold integers, got an array of bool", lambda: Packing.from_lengths(np.ones(2, bool), 5)),
        (TypeError, r"lengths must hold integers, got \[1\]", lambda: Packing.from_lengths([[1], [2]], 5)),
        (TypeError, "lengths must hold integers, got True", lambda: Packing.from_lengths([1, True], 5)),
        (TypeError, "lengths must be a tensor, an array or a list", lambda: Packing.from_lengths(None, 5)),
        (ValueError, r"lengths must have shape \(B,\), got \(1, 2\)", lambda: Packing.from_lengths(np.ones((1, 2), int), 5)),
        (ValueError, r"lengths must be below 2\^63", lambda: Packing.from_lengths(np.array([2**63], np.uint64), 5)),
        (ValueError, r"cu_seqlens must be from -2\^63", lambda: Packing.from_cu_seqlens([0, np.uint64(2**63)], 5)),
        (TypeError, "cu_seqlens must hold integers", lambda: Packing.from_cu_seqlens(np.zeros(2), 5)),
        (TypeError, r"pass torch.from_numpy\(mask\)", lambda: Packing.from_mask(np.ones((2, 3), bool))),
        (TypeError, "max_length must be an integer, got None", lambda: Packing.from_lengths([1], None)),
        (TypeError, "max_length must be an integer, got 5.0", lambda: Packing.from_lengths([1], 5.0)),
        (TypeError, "max_length must be an integer, got '5'", lambda: Packing.from_cu_seqlens([0, 1], "5", False)),
        (TypeError, "capacity must be an integer, got True", lambda: Packing.from_lengths([1], 2, True)),
        (TypeError, "capacity must be an integer, got 9.0", lambda: Packing.from_mask(RIGHT, 9.0)),
        (ValueError, "capacity must not be negative", lambda: Packing.from_cu_seqlens([0, 1], 2, capacity=np.int8(-1))),
        (TypeError, "rows must be an integer, got '8'", lambda: check_sizes(capacity=None, rows="8")),
        (ValueError, "max_length must not be negative", lambda: Packing.from_lengths([], -1)),
        (ValueError, "capacity must not be negative", lambda: Packing.from_lengths([1], 2, -1)),
        (TypeError, r"attention_mask.bool\(\)", lambda: Packing.from_mask(torch.ones(2, 3))),
        (ValueError, "mask must have shape", lambda: Packing.from_mask(torch.ones(3).bool())),
        (ValueError, "must begin with 0, got 1", lambda: Packing.from_cu_seqlens([1, 2], 5)),
        (ValueError, "cu_seqlens: lengths must be in", lambda: Packing.from_cu_seqlens([0, 3, 2], 5)),
        (ValueError, "cu_seqlens: lengths must be in", lambda: Packing.from_cu_seqlens([0, 6], 5)),
        (ValueError, "at least a 0", lambda: Packing.from_cu_seqlens([], 5)),
        (ValueError, r"x must begin with .* = \(4, 5\)", lambda: Packing.from_lengths(LENGTHS, L).pack(torch.zeros(4, 6))),
        (ValueError, "capacity = 9 rows", lambda: Packing.from_lengths(LENGTHS, L).unpack(torch.zeros(8, 2))),
        (ValueError, "x is on meta", lambda: Packing.from_lengths(LENGTHS, L).pack(torch.zeros(4, 5, device="meta"))),
    ],
)
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()


def attend(rows=9, packing=None, mask=None, q=None, **options):
    packing = Packing.from_lengths(LENGTHS, L) if packing is None else packing
    q = torch.zeros(rows, 2, 16) if q is None else q
    return fastattn.varlen_attention(q, torch.zeros(rows, 2, 16), torch.zeros(rows, 2, 16), packing, mask, **options)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "packing must be a fastattn.Packing", lambda: attend(packing=torch.tensor([0, 9]))),
        (TypeError, "key_packing must be a fastattn.Packing, got list", lambda: attend(key_packing=[0, 9])),
        (TypeError, "q must be a tensor, got ndarray", lambda: attend(q=np.zeros((9, 2, 16)))),
        (ValueError, "q has 8 rows, but its packing 9", lambda: attend(rows=8)),
        (ValueError, "q must have 3 dimensions", lambda: attend(q=torch.zeros(1, 9, 2, 16))),
        (TypeError, "q must be a tensor", lambda: attend(q="tokens")),
        (ValueError, "k has 9 rows, but its packing 3", lambda: attend(key_packing=Packing.from_lengths([1, 2], 2))),
        (ValueError, "key_packing has 2 sequences", lambda: attend(key_packing=Packing.from_lengths([4, 5], 5))),
        (ValueError, "backend must be one of", lambda: attend(backend="gpu")),
        (
            ValueError,
            r"ids of packed sequences must have shape \(9,\)",
            lambda: attend(mask=masks.documents(torch.zeros(4, L).int())),
        ),
        (
            ValueError,
            "need key_ids",
            lambda: attend(mask=masks.documents(torch.zeros(9).int()), key_packing=Packing.from_lengths(LENGTHS, L)),
        ),
        (ValueError, "key_end has shape", lambda: attend(mask=masks.padding([1, 2]))),
        (ValueError, "does not broadcast", lambda: attend(mask=torch.ones(9, 9).bool())),
        (ValueError, "dropout must be a probability", lambda: attend(dropout=2.0)),
        (ValueError, "bias has shape .* does not broadcast", lambda: attend(bias=torch.zeros(L + 1, L))),
        (ValueError, "scale must be a finite number", lambda: attend(scale=float("nan"))),
    ],
)
def test_bad_requests_raise_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()


# The operator


def request(mask=None, capacity=None, requires_grad=True, dtype=torch.float64):
    packing = Packing.from_lengths(LENGTHS, L, capacity)
    q, k, v = (torch.randn(packing.capacity, 1, 4, dtype=dtype).requires_grad_(requires_grad) for _ in range(3))
    return q, k, v, packing, mask


@pytest.mark.parametrize("capacity", [None, 14])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.conv(1, 4, 3, prefix=1)])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck(backend, mask, capacity):
    q, k, v, packing, mask = request(mask, capacity)

    def function(q, k, v):
        out, lse = fastattn.varlen_attention(q, k, v, packing, mask, return_lse=True, backend=backend)
        return out, torch.where(lse == -float("inf"), 0, lse)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_opcheck():
    from fastattn.lowering import NO_EXTRAS, LoweredMask
    from fastattn.masks import packed_fields

    for capacity in (None, 14):
        q, k, v, packing, _ = request(capacity=capacity, dtype=torch.float32)
        lowered = LoweredMask(**packed_fields(packing, packing))
        heads = (x.detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
        args = (*heads, *lowered, *NO_EXTRAS, 0.5, "auto", True)
        torch.library.opcheck(torch.ops.fastattn.attention_forward.default, args)


@pytest.mark.parametrize("mask", [None, "causal", "documents"])
def test_compile_fullgraph_dynamic(mask):
    """The packing is made inside, from a device's lengths and with a static capacity."""

    def function(q, k, v, lengths):
        packing = Packing.from_lengths(lengths, L, 14)
        made = None
        if mask is not None:
            made = masks.causal() if mask == "causal" else masks.documents(torch.zeros(14, dtype=torch.int32))
        out = fastattn.varlen_attention(packing.pack(q), packing.pack(k), packing.pack(v), packing, made)
        return packing.unpack(out), packing.overflowed

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((3, 0, 5, 1), (5, 5, 0, 2), (5, 5, 5, 5)):
        q, k, v = (torch.randn(4, L, 2, 16, requires_grad=True) for _ in range(3))
        results = []
        for run in (compiled, function):
            out, overflowed = run(q, k, v, torch.tensor(lengths))
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
            assert bool(overflowed) == (sum(lengths) > 14)
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)


def test_no_host_sync():
    """A fake tensor has no value to read: with a capacity nothing is read, and without, nothing after the packing is made."""
    with FakeTensorMode():
        lengths, keep = torch.empty(4, dtype=torch.int64), torch.empty(4, L, dtype=torch.bool)
        packings = [
            Packing.from_lengths(lengths, L, 14),
            Packing.from_mask(keep, 14),
            Packing.from_cu_seqlens(torch.empty(5, dtype=torch.int64), L, validate=False),
        ]
        for packing in packings:
            for mask in (None, masks.causal(), masks.rows(1, 4, prefix=1), masks.padding(lengths)):
                rows = packing.pack(torch.empty(4, L, 2, 16, requires_grad=True))
                out = fastattn.varlen_attention(rows, rows, rows, packing, mask)
                packing.unpack(out).sum().backward()
            assert packing.known_total is None and packing.positions.shape == (packing.capacity,)
        with pytest.raises(DataDependentOutputException):
            Packing.from_lengths(lengths, L)


def test_exported_module_trains():
    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x, lengths):
            packing = Packing.from_lengths(lengths, L, 14)
            rows = packing.pack(x * self.weight)
            return packing.unpack(fastattn.varlen_attention(rows, rows, rows, packing))

    module, x, lengths = Attend(), torch.randn(4, L, 2, 16), torch.tensor(LENGTHS)
    exported = torch.export.export(module, (x, lengths)).module()
    exported(x, lengths).square().sum().backward()
    module(x, lengths).square().sum().backward()
    torch.testing.assert_close(exported.weight.grad, module.weight.grad)


def test_second_derivatives_raise():
    q, k, v, packing, _ = request()
    (grad,) = torch.autograd.grad(fastattn.varlen_attention(q, k, v, packing).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_a_mask_is_lowered_once_for_a_packing():
    q, k, v, packing, _ = request(requires_grad=False)
    mask = masks.causal() | masks.window(1, 1)
    first = mask.lower_packed(packing, packing, 2)
    assert mask.lower_packed(packing, packing, 2).bits is first.bits
    assert mask.lower_packed(Packing.from_lengths(LENGTHS, L), packing, 2).bits is not first.bits


def test_a_mask_that_is_kept_is_checked_for_each_number_of_heads():
    """Bits of two heads must not be read as those of four."""
    packing = Packing.from_lengths(LENGTHS, L)
    mask = masks.dense(torch.ones(1, 2, L, L, dtype=torch.bool))
    for heads, fits in ((2, True), (4, False), (2, True)):
        q = torch.randn(9, heads, 16)
        if fits:
            fastattn.varlen_attention(q, q, q, packing, mask)
        else:
            with pytest.raises(ValueError, match="does not broadcast"):
                fastattn.varlen_attention(q, q, q, packing, mask)
