"""rotary and rotary_tables: every backend against the fp64 specification, and as a PyTorch operator."""

import numpy as np
import pytest
import torch
from backends import TRITON, device_of
from exported import assert_exported_trains
from guarded import assert_no_read_beyond_the_end
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import Packing
from fastattn.testing import assert_accurate
from fastattn.testing_elements import rotary_yardstick, run_rotary

BACKENDS = ["eager", "cpu", TRITON]
EAGER = ["eager", "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# heads of q, heads of k, tokens, features of a head, those that are turned
SHAPES = [(1, 1, 1, 2, 2), (4, 2, 37, 16, 16), (5, 1, 70, 20, 12), (3, 3, 33, 64, 64), (6, 2, 17, 80, 20), (2, 1, 9, 130, 96)]
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def tensors(shape, dtype, device="cpu", packed=False, batched=False):
    """q, k, cos, sin, and gradients of the results; angles of any size, whose tables are of dtype or, in turn, fp32."""
    H, Hkv, L, D, R = shape

    def heads(count):
        x = torch.randn(L, count, D) if packed else torch.randn(2, L, count, D).transpose(1, 2)
        return x.to(device, dtype)

    angles = torch.randn(*((2, L) if batched and not packed else (L,)), R // 2, dtype=torch.float64) * 10
    table = torch.float32 if (L + batched) % 2 else dtype
    cos, sin = (x.to(device, table) for x in (angles.cos(), angles.sin()))
    return heads(H), heads(Hkv), cos, sin, heads(H), heads(Hkv)


@pytest.mark.usefixtures("poisoned")
@PACKED
@INTERLEAVED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_specification(backend, dtype, interleaved, packed):
    for n, shape in enumerate(SHAPES):
        args = tensors(shape, dtype, device_of(backend), packed, batched=n % 2 == 0)
        result = run_rotary(*args, backend, interleaved)
        assert_accurate(result, rotary_yardstick(*args, interleaved))
        for name, x in (("q", args[0]), ("k", args[1]), ("dq", args[0]), ("dk", args[1])):
            made = result[name]
            assert made.dtype == dtype and made.shape == x.shape
            assert (made if packed else made.transpose(1, 2)).is_contiguous()
        rest = slice(2 * args[2].shape[-1], None)
        assert torch.equal(result["q"][..., rest], args[0][..., rest])  # what is not turned passes through, bit by bit
        assert torch.equal(result["dk"][..., rest], args[5][..., rest])


@INTERLEAVED
def test_specification_is_a_product_of_complex_numbers(interleaved):
    q, k, cos, sin, _, _ = tensors((3, 2, 11, 12, 8), torch.float64, batched=True)
    turned = fastattn.rotary(q, k, cos, sin, interleaved=interleaved, backend="eager")
    factor = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, None]
    for x, y in zip((q, k), turned, strict=True):
        a, b = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])
        product = torch.complex(a.contiguous(), b.contiguous()) * factor
        parts = torch.view_as_real(product)
        expected = parts.flatten(-2) if interleaved else torch.cat([product.real, product.imag], -1)
        torch.testing.assert_close(y[..., :8], expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(y[..., 8:], x[..., 8:])


@pytest.mark.parametrize("backend", EAGER)
def test_agrees_with_transformers(backend):
    """Its tables hold each column twice; cos and sin as its models pass them, without the second half."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    cos, sin = fastattn.rotary_tables(torch.arange(18).view(2, 9), 16)
    expected = llama.apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    for x, y in zip(fastattn.rotary(q, k, cos, sin, backend=backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    for x, y in zip((q, k), fastattn.rotary(q, k, cos, sin, interleaved=True, backend=backend), strict=True):
        expected = gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_distance_alone(backend):
    device = device_of(backend)
    q, k = torch.randn(1, 2, 1, 32, device=device), torch.randn(1, 2, 1, 32, device=device)
    scores = []
    for start in (0, 900):
        positions = torch.arange(start, start + 6, device=device)
        turned = fastattn.rotary(
            q.expand(1, 2, 6, 32), k.expand(1, 2, 6, 32), *fastattn.rotary_tables(positions, 32), backend=backend
        )
        scores.append(turned[0] @ turned[1].mT)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores[0][0, 0, 0, :-1], scores[0][0, 0, 1, 1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend):
    """Tables by `packing.positions`; and a plan of packed tokens serves any number of them."""
    device = device_of(backend)
    for lengths in ([9, 0, 4], [40, 31, 0], [0, 0, 0]):
        packing = Packing.from_lengths(torch.tensor(lengths, device=device), 40)
        q, k = torch.randn(3, 40, 4, 16, device=device), torch.randn(3, 40, 2, 16, device=device)
        tables = fastattn.rotary_tables(packing.positions, 16)
        packed = fastattn.rotary(packing.pack(q), packing.pack(k), *tables, backend=backend)
        whole = fastattn.rotary_tables(torch.arange(40, device=device), 16)
        padded = fastattn.rotary(q.transpose(1, 2), k.transpose(1, 2), *whole, backend=backend)
        for x, y in zip(packed, padded, strict=True):
            assert torch.equal(x, packing.pack(y.transpose(1, 2)))


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "side by side": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]],
    "wide rows": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]],
    "last stride 2": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "stride 0": lambda x: x[:1].expand(x.shape),
    "one head for all": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.usefixtures("poisoned")
@PACKED
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, kind, packed):
    layout = LAYOUTS[kind]
    for dtype in (torch.float32, torch.float16):
        q, k, cos, sin, dq, dk = tensors((4, 2, 18, 16, 16), dtype, device_of(backend), packed, batched=True)
        args = layout(q), layout(k), cos, sin, layout(dq), layout(dk)
        assert_accurate(run_rotary(*args, backend), rotary_yardstick(*args))
    tables = (cos.mT.contiguous().mT, LAYOUTS["last stride 2"](sin)), (LAYOUTS["odd address"](cos), LAYOUTS["wide rows"](sin))
    if not packed:
        tables = *tables, (cos[:1], sin[:1])
    for cos, sin in tables:
        args = q, k, cos, sin, dq, dk
        assert_accurate(run_rotary(*args, backend, True), rotary_yardstick(*args, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_call_leaves_behind_serves_no_other(backend):
    """Whatever differs between two calls, each gets its own result; the second round finds the plans of the first."""
    device = device_of(backend)
    given = []
    for shape in ((4, 2, 18, 16, 16), (2, 4, 18, 16, 16), (4, 2, 18, 16, 8), (4, 2, 30, 16, 16), (4, 2, 18, 20, 16)):
        given += [tensors(shape, dtype, device, packed) for dtype in DTYPES[:2] for packed in (False, True)]
    q, k, cos, sin, dq, dk = tensors((4, 2, 18, 16, 16), torch.float32, device, batched=True)
    given += [(q, k, cos[:n], sin[:n], dq, dk) for n in (2, 1)] + [(q, k, cos[0], sin[1], dq, dk)]
    for args in (*given, *given):
        for interleaved in (False, True):
            assert_accurate(run_rotary(*args, backend, interleaved), rotary_yardstick(*args, interleaved))


@pytest.mark.parametrize("backend", [TRITON])
def test_a_plan_is_for_the_addresses_that_it_was_made_for(backend):
    """Units of 16 bytes from 16-byte addresses on, single elements from others, whichever call came first."""
    from fastattn.kernels.triton.launch import GPU, recorded

    q, k, cos, sin, _, _ = tensors((4, 2, 18, 16, 16), torch.float16)
    odd = LAYOUTS["odd address"]
    with recorded(GPU(90)) as launches:
        for given in ((q, k, cos, sin), (odd(q), k, cos, sin), (q, k, cos, odd(sin)), (q, k, cos, sin)):
            fastattn.rotary(*given, backend=backend)
    assert [launch.arguments["VECTOR"] for launch in launches] == [8, 1, 1, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_gets_a_gradient(backend):
    q, k, cos, sin, dq, dk = tensors((3, 2, 5, 8, 8), torch.float32, device_of(backend))
    both = run_rotary(q, k, cos, sin, dq, dk, backend)
    for of_q, of_k in ((True, False), (False, True)):
        q, k = q.detach().requires_grad_(of_q), k.detach().requires_grad_(of_k)
        ((fastattn.rotary(q, k, cos, sin, backend=backend)[of_k]) * (dk if of_k else dq)).sum().backward()
        assert (q.grad is not None, k.grad is not None) == (of_q, of_k)
        assert torch.equal(k.grad if of_k else q.grad, both["dk" if of_k else "dq"])
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()  # of one result alone
    (fastattn.rotary(q, k, cos, sin, backend=backend)[0] * dq).sum().backward()
    assert torch.equal(q.grad, both["dq"]) and (k.grad is None or not k.grad.any())


@INTERLEAVED
@PACKED
@pytest.mark.parametrize("backend", EAGER)
def test_gradcheck(backend, packed, interleaved):
    q, k, cos, sin, _, _ = tensors((2, 1, 3, 6, 4), torch.float64, packed=packed)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda q, k: fastattn.rotary(q, k, cos, sin, interleaved=interleaved, backend=backend), leaves
    )


@pytest.mark.parametrize("shape", [(0, 1, 5, 8, 8), (2, 0, 5, 8, 8), (2, 1, 0, 8, 8), (0, 0, 5, 8, 8)])
@PACKED
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, packed, shape):
    layout = LAYOUTS["last stride 2"]
    for tokens in (shape[2], 3):  # the plan of an empty call serves another
        args = tensors((*shape[:2], tokens, *shape[3:]), torch.float32, device_of(backend), packed)
        for q, k, cos, sin, dq, dk in (args, [layout(x) for x in args]):
            given = q, k, cos, sin, dq, dk
            assert_accurate(run_rotary(*given, backend), rotary_yardstick(*given))


@pytest.mark.parametrize("backend", [TRITON])
def test_no_read_beyond_the_end(backend):
    assert_no_read_beyond_the_end("rotary")


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes 9 GB of addresses, of which a GPU would need all")
def test_offsets_beyond_2_to_31(backend):
    """Tokens 2^27 elements apart: the last ones lie beyond 2^31 elements. Memory that is not touched costs nothing."""
    pitch = 2**27
    q = torch.empty(33 * pitch, dtype=torch.float16).as_strided((1, 2, 33, 16), (0, 16, pitch, 1))
    q.copy_(torch.randn(1, 2, 33, 16))
    tables = fastattn.rotary_tables(33, 16)
    far, near = (fastattn.rotary(x, x[:, :1], *tables, backend=backend) for x in (q, q.contiguous()))
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


@pytest.mark.parametrize("requires_grad", [False, True])
@PACKED
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, packed, requires_grad):
    q, k, cos, sin, _, _ = tensors((3, 2, 5, 8, 6), torch.float32, device_of(backend), packed)
    k = k.mT.contiguous().mT.requires_grad_(requires_grad)
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.fastattn.rotary.default, (q, k, cos, sin, not inverse, inverse, backend))


class Layer(torch.nn.Module):
    """Projections, turned, and their scores."""

    def __init__(self, backend, interleaved=False):
        super().__init__()
        self.backend, self.interleaved, self.project = backend, interleaved, torch.nn.Linear(8, 48)
        self.to(device_of(backend))

    def forward(self, x):
        q, k = self.project(x).split([32, 16], -1)
        q, k = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k))
        positions = torch.arange(x.shape[1], device=x.device)
        tables = fastattn.rotary_tables(positions, 6)
        q, k = fastattn.rotary(q, k, *tables, interleaved=self.interleaved, backend=self.backend)
        return q @ k.repeat_interleave(2, 1).mT


@INTERLEAVED
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend, interleaved):
    layer = Layer(backend, interleaved)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(2, rows, 8, device=device_of(backend), requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
        grads = [torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (layer, compiled)]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_exported_for_inference_trains(backend):
    assert_exported_trains(Layer(backend), torch.randn(2, 4, 8, device=device_of(backend)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend, use_reentrant):
    layer, x = Layer(backend), torch.randn(2, 4, 8, device=device_of(backend), requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_nothing(backend):
    q, k, cos, sin, _, _ = tensors((3, 2, 5, 8, 8), torch.float32, device_of(backend))
    expected = fastattn.rotary(q, k, cos, sin, backend=backend)
    with torch.autocast(q.device.type, torch.bfloat16):
        turned = fastattn.rotary(q, k, cos, sin, backend=backend)
        half = fastattn.rotary(q.half(), k.half(), cos, sin, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(turned, expected, strict=True)) and half[0].dtype == torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_and_forward_mode_raise(backend):
    q, k, cos, sin, _, _ = tensors((3, 2, 5, 8, 8), torch.float32, device_of(backend))
    q.requires_grad_()
    (grad,) = torch.autograd.grad(fastattn.rotary(q, k, cos, sin, backend=backend)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        fastattn.rotary(torch.autograd.forward_ad.make_dual(k, k), k, cos, sin, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_right_or_raises(backend):
    q, k, cos, sin, _, _ = tensors((3, 2, 5, 8, 8), torch.float32, device_of(backend))
    many = torch.vmap(lambda q, k: fastattn.rotary(q, k, cos, sin, backend=backend))(*(x.transpose(1, 2) for x in (q, k)))
    for x, y, given in zip(many, fastattn.rotary(q, k, cos, sin, backend=backend), (q, k), strict=True):
        assert torch.equal(x, y.transpose(1, 2)) and x.shape == given.transpose(1, 2).shape


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_tables(dtype):
    """Far positions too: of fp32 angles nothing would be left there."""
    far = torch.tensor([[0, 1, 2], [511, 8191, 2**20 + 1]], dtype=torch.int32)
    exponents = torch.tensor([-2 * f / 12 for f in range(6)], dtype=torch.float64)
    for positions, tensor in ((7, torch.arange(7)), (np.int64(7), torch.arange(7)), (far, far), (0, torch.arange(0))):
        cos, sin = fastattn.rotary_tables(positions, 12, base=500.0, dtype=dtype)
        angles = tensor.double()[..., None] * 500.0**exponents
        assert cos.dtype == sin.dtype == dtype and cos.shape == (*tensor.shape, 6)
        for table, expected in ((cos, angles.cos()), (sin, angles.sin())):
            assert not table.numel() or (table.double() - expected).abs().max() <= torch.finfo(dtype).eps / 2 + 1e-9


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8)
COS, QT, WIDE = torch.zeros(5, 4), torch.zeros(5, 4, 8), torch.zeros(1, 1, 5, 1032)


def turn(q=Q, k=K, cos=COS, sin=COS, **options):
    return fastattn.rotary(q, k, cos, sin, **options)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "q must be a tensor, got NoneType", lambda: turn(None)),
        (TypeError, "k must be a tensor, got NoneType", lambda: turn(k=None)),
        (TypeError, "cos must be a tensor, got ndarray", lambda: turn(cos=COS.numpy())),
        (TypeError, "sin must be a tensor, got list", lambda: turn(sin=[0.0])),
        (ValueError, r"q must have shape \(B, H, L, D\), or packed", lambda: turn(Q[0, 0])),
        (TypeError, "q must be fp16.* got torch.int64", lambda: turn(Q.long(), K.long())),
        (ValueError, "k must have q's shape .* but for its heads", lambda: turn(k=K[:, :, :3])),
        (ValueError, "k must have q's shape .* but for its heads", lambda: turn(k=K[..., :4])),
        (ValueError, "k must have q's shape .* but for its heads", lambda: turn(k=K[0])),
        (TypeError, "k is torch.float16, but q is torch.float32", lambda: turn(k=K.half())),
        (ValueError, r"cos must have shape \(L = 5, R / 2\) or \(B = 2 or 1, L = 5", lambda: turn(cos=COS[:3], sin=COS[:3])),
        (ValueError, r"cos must have shape \(L = 5", lambda: turn(cos=COS.expand(3, 5, 4), sin=COS)),
        (ValueError, r"sin must have shape \(T = 5, R / 2\), got", lambda: turn(QT, QT, sin=COS[None])),
        (ValueError, r"cos has 8 columns.*: if .* pass cos\[..., :4\]", lambda: turn(cos=COS.repeat(1, 2), sin=COS.repeat(1, 2))),
        (ValueError, "cos has 0 columns, one for each pair", lambda: turn(cos=COS[:, :0], sin=COS[:, :0])),
        (ValueError, "sin must be of cos's shape and dtype", lambda: turn(sin=COS[:, :2])),
        (ValueError, "sin must be of cos's shape and dtype", lambda: turn(Q.half(), K.half(), cos=COS.half())),
        (TypeError, "cos must be torch.float32 or fp32, got torch.float16", lambda: turn(cos=COS.half())),
        (ValueError, "cos requires a gradient", lambda: turn(cos=COS.clone().requires_grad_())),
        (ValueError, "sin requires a gradient", lambda: turn(sin=COS.clone().requires_grad_())),
        (TypeError, "interleaved must be True or False", lambda: turn(interleaved=1)),
        (ValueError, "backend must be one of", lambda: turn(backend="cuda")),
        (NotImplementedError, "fp64 is served by", lambda: turn(Q.double(), K.double(), backend="triton")),
        (NotImplementedError, "head dimension 1032 is over 1024", lambda: turn(WIDE, WIDE, backend="triton")),
        (TypeError, "positions must be an integer, got 2.5", lambda: fastattn.rotary_tables(2.5, 8)),
        (TypeError, "positions must be an integer, got True", lambda: fastattn.rotary_tables(True, 8)),
        (TypeError, "positions must hold integers, got torch.float32", lambda: fastattn.rotary_tables(COS, 8)),
        (ValueError, "positions must not be negative", lambda: fastattn.rotary_tables(-1, 8)),
        (ValueError, "dim must be even and positive, got 7", lambda: fastattn.rotary_tables(4, 7)),
        (ValueError, "dim must be even and positive, got 0", lambda: fastattn.rotary_tables(4, 0)),
        (TypeError, "dim must be an integer", lambda: fastattn.rotary_tables(4, 8.0)),
        (ValueError, "base must be a positive number", lambda: fastattn.rotary_tables(4, 8, base=0)),
        (ValueError, "base must be a positive number", lambda: fastattn.rotary_tables(4, 8, base="1e4")),
        (TypeError, "dtype must be fp16", lambda: fastattn.rotary_tables(4, 8, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_tables_that_require_a_gradient_are_taken_without_gradients():
    with torch.no_grad():
        q, _ = turn(cos=COS.clone().requires_grad_())
    assert not q.any()
