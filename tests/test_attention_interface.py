"""attention as a PyTorch operator: opcheck, compile, export, autocast, checkpointing, refusals, explain."""

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, CUDA, TRITON, device_of, dtype_of, head_dim_of
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import masks
from fastattn.lowering import NO_EXTRAS, LoweredMask


def inputs(backend, requires_grad=True, L=19, dtype=None):
    options = {"device": device_of(backend), "dtype": dtype or dtype_of(backend)}
    D = head_dim_of(backend)
    return [torch.randn(2, L, 2, D, **options).transpose(1, 2).requires_grad_(requires_grad) for _ in range(3)]


def causal_padding(device, lengths=(11, 19)):
    return masks.causal() & masks.padding(torch.tensor(lengths, device=device))


def everything(device, lengths=(11, 19)):
    """A mask with every field that a kernel can receive."""
    lengths = torch.tensor(lengths, device=device)
    j = torch.arange(19, device=device)
    keep, ids = (j != 4).expand(2, 19), (j // 8).expand(2, 19)
    mask = masks.window(9, 5) & masks.prefix_lm(lengths // 2) & masks.padding(lengths, lengths) & masks.key_padding(keep)
    return mask & masks.documents(ids) & (masks.rows(4, 4, 3) | masks.causal())


MASKS = {"causal_padding": causal_padding, "everything": everything}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, requires_grad, mask):
    q, k, v = inputs(backend, requires_grad)
    mask = MASKS[mask](q.device).lower(19, 19, q.device)
    args = (q, k, v, *mask, *NO_EXTRAS, 0.25, backend, True)
    torch.library.opcheck(torch.ops.fastattn.attention_forward.default, args)
    out, lse = (x.detach() for x in torch.ops.fastattn.attention_forward(*args))
    q, k, v = inputs(backend, False)
    args = (torch.randn_like(out), None, q, k, v, out, lse, *mask, *NO_EXTRAS, 0.25, backend, False)
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, args)


# A graph holds one op, in which the backend is chosen: each compiler meets each kind of backend.
COMPILED = [
    ("eager", "aot_eager"),
    ("cpu", "inductor"),
    *(pytest.param(*b.values, compiler, marks=b.marks) for b in (TRITON, CUDA) for compiler in ("aot_eager", "inductor")),
]


@pytest.mark.parametrize(("backend", "compiler"), COMPILED)
def test_compile_fullgraph_dynamic(backend, compiler):
    def function(q, k, v, lengths):
        return fastattn.attention(q * 2, k, v, masks.causal() & masks.padding(lengths), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for L in (19, 23):
        q, k, v = inputs(backend, L=L)
        lengths = torch.tensor([L - 5, L], device=q.device)
        expected, actual = function(q, k, v, lengths), compiled(q, k, v, lengths)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()
        grads = [torch.autograd.grad(out.square().sum(), [q, k, v]) for out in (expected, actual)]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", ["cpu", TRITON])  # what is compiled is the mask and one op, in which a backend is chosen
def test_a_mask_is_made_inside_a_compiled_function(backend):
    """Bits and tiles are then part of the graph, and nothing of them is kept."""

    def function(q, k, v, lengths, ids, left):
        mask = (masks.window(left, 1) | masks.padding(lengths)) & masks.documents(ids)
        return fastattn.attention(q, k[:, :1], v[:, :1], mask, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for L, left in ((19, 3), (23, 5)):
        q, k, v = inputs(backend, L=L)
        lengths, ids = torch.tensor([L // 2, 3], device=q.device), torch.arange(L, device=q.device).expand(2, L) // 9
        expected, actual = function(q, k, v, lengths, ids, left), compiled(q, k, v, lengths, ids, left)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(out.square().sum(), [q, k, v]) for out in (expected, actual)]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_right_or_raises(backend):
    q = torch.stack([inputs(backend, False)[0] for _ in range(2)])
    lengths = torch.tensor([[11, 19], [3, 7]], device=q.device)

    def function(q, lengths):
        return fastattn.attention(q, q, q, masks.causal() & masks.padding(lengths), backend=backend)

    expected = torch.stack([function(x, n) for x, n in zip(q, lengths, strict=True)])
    assert torch.equal(torch.vmap(function)(q, lengths), expected)
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="torch.vmap"):
        torch.vmap(function)(q, lengths)
    with torch.no_grad():
        assert torch.equal(torch.vmap(function)(q, lengths), expected)


class Projected(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.projection = torch.nn.Linear(head_dim_of(backend), head_dim_of(backend), dtype=dtype_of(backend))

    def forward(self, q, k, v, lengths):
        return fastattn.attention(self.projection(q), k, v, masks.padding(lengths), backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_module_trains(backend, strict):
    device = device_of(backend)
    module = Projected(backend).to(device)
    args = (*inputs(backend, False), torch.tensor([11, 19], device=device))
    exported = torch.export.export(module, args, strict=strict).module()
    grads = []
    for m in (module, exported):
        m.zero_grad()
        m(*args).square().sum().backward()
        grads.append(m.projection.weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_and_forward_mode_raise(backend):
    q, k, v = inputs(backend)
    (grad,) = torch.autograd.grad(fastattn.attention(q, k, v, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
    q, k, v = inputs(backend, False)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        fastattn.attention(torch.autograd.forward_ad.make_dual(q, q), k, v, backend=backend)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend, use_reentrant, mask):
    q, k, v = inputs(backend)
    mask = MASKS[mask](q.device)

    def function(q, k, v):
        return fastattn.attention(q, k, v, mask, backend=backend)

    expected = torch.autograd.grad(function(q, k, v).sum(), [q, k, v])
    for x in (q, k, v):
        x.grad = None
    checkpoint(function, q, k, v, use_reentrant=use_reentrant).sum().backward()
    for x, grad in zip((q, k, v), expected, strict=True):
        assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    q, k, v = inputs(backend, dtype=torch.float32)
    with torch.autocast(q.device.type, torch.bfloat16):
        out = fastattn.attention(q, k, v, backend=backend)
    expected = fastattn.attention(*(x.bfloat16() for x in (q, k, v)), backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_sdpa_signature_equals_torch(dims):
    q, k, v = (torch.randn(*(2, 3, 2)[: dims - 2], length, 16) for length in (7, 9, 9))
    keep = torch.rand(7, 9) < 0.7
    keep[:, 0] = True
    for kwargs in ({}, {"is_causal": True}, {"scale": 0.5}, {"attn_mask": keep}):
        expected = F.scaled_dot_product_attention(q, k, v, **kwargs)
        torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, **kwargs), expected)


def test_sdpa_grouped_heads_equal_torch():
    q, k, v = torch.randn(2, 6, 7, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        fastattn.scaled_dot_product_attention(q, k, v)


def test_sdpa_mask_per_sequence_with_leading_dimensions():
    q = torch.randn(2, 3, 2, 7, 16)
    keep = torch.rand(2, 3, 1, 1, 7) < 0.7
    keep[..., 0] = True
    torch.testing.assert_close(
        fastattn.scaled_dot_product_attention(q, q, q, keep), F.scaled_dot_product_attention(q, q, q, keep)
    )


Q = torch.zeros(2, 4, 6, 16)
ANY = torch.ones(6, 6, dtype=torch.bool)
SIX_IDS = torch.zeros(2, 6, dtype=torch.int32)
LINEAR = torch.nn.Linear(16, 16)
ELSEWHERE = torch.zeros(2, dtype=torch.int32, device="meta")


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, r"bias has shape \(2, 4, 6, 16\), which does not broadcast", lambda: fastattn.attention(Q, Q, Q, bias=Q)),
        (ValueError, "dropout must be a probability", lambda: fastattn.attention(Q, Q, Q, dropout=-0.1)),
        (ValueError, "q has 4 heads, which is no multiple of k's 3", lambda: fastattn.attention(Q, Q[:, :3], Q[:, :3])),
        (ValueError, "need key_ids", lambda: fastattn.attention(Q, Q[:, :, :5], Q[:, :, :5], masks.documents(SIX_IDS))),
        (ValueError, "6 keys, but a prefix of 1 and an image", lambda: fastattn.attention(Q, Q, Q, masks.rows(2, 2, 1))),
        (TypeError, "attn_mask must be bool or", lambda: fastattn.scaled_dot_product_attention(Q, Q, Q, torch.ones(6, 6).int())),
        (NotImplementedError, "triton", lambda: fastattn.attention(Q.double(), Q.double(), Q.double(), backend="triton")),
        (ValueError, "attn_mask and is_causal", lambda: fastattn.scaled_dot_product_attention(Q, Q, Q, ANY, is_causal=True)),
        (NotImplementedError, "torch.float32 is not served", lambda: fastattn.attention(Q, Q, Q, backend="cuda")),
        (ValueError, "backend must be", lambda: fastattn.attention(Q, Q, Q, backend="cudnn")),
        (ValueError, "scale must be", lambda: fastattn.attention(Q, Q, Q, scale=float("nan"))),
        (ValueError, "q must have 4 dimensions", lambda: fastattn.attention(Q[0], Q, Q)),
        (ValueError, "k has batch size 1", lambda: fastattn.attention(Q, Q[:1], Q)),
        (ValueError, "k has head dimension", lambda: fastattn.attention(Q, Q[..., :8], Q)),
        (ValueError, "k has 4 heads of length 6", lambda: fastattn.attention(Q, Q, Q[:, :, :3])),
        (ValueError, r"key_end has shape \(3,\)", lambda: fastattn.attention(Q, Q, Q, masks.padding([1, 2, 3]))),
        (ValueError, r"keys has shape \(2, 5\)", lambda: fastattn.attention(Q, Q, Q, masks.key_padding(ANY[:2, :5]))),
        (ValueError, "does not broadcast", lambda: fastattn.attention(Q, Q, Q, torch.ones(5, 6) > 0)),
        (ValueError, r"masks.key_padding\(mask\), or mask\[:, None, None, :\]", lambda: fastattn.attention(Q, Q, Q, ANY[:2])),
        (ValueError, r"masks.key_padding\(mask\)", lambda: fastattn.scaled_dot_product_attention(Q, Q, Q, ANY[:2])),
        (ValueError, r"shape \(1, 1, 3, 6\) does not broadcast to \(2, 4, 6, 6\)$", lambda: fastattn.attention(Q, Q, Q, ANY[:3])),
        (ValueError, "mask is on meta", lambda: fastattn.attention(Q, Q, Q, masks.padding(ELSEWHERE))),
        (TypeError, "mask must be", lambda: fastattn.attention(Q, Q, Q, torch.ones(6, 6))),
        (TypeError, "mask must be", lambda: fastattn.attention(Q, Q, Q, "causal")),
        (TypeError, "k is torch.float64", lambda: fastattn.attention(Q, Q.double(), Q)),
        (TypeError, "q must be fp16", lambda: fastattn.attention(Q.int(), Q.int(), Q.int())),
        (TypeError, "q must be a tensor", lambda: fastattn.attention([1], Q, Q)),
        (TypeError, "k must be a tensor, got Linear: pass its .weight and .bias", lambda: fastattn.attention(Q, LINEAR, Q)),
    ],
)  # fmt: skip
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("backend", [TRITON, CUDA])
def test_verbose_explanation_counts_tiles(backend):
    q, k, v = inputs(backend, False, L=130)
    lines = fastattn.explain(q, k, v, masks.causal(), backend=backend, verbose=True).details
    text = "\n".join(lines)
    assert text.count("visits") >= 2 and "forward:" in text and "backward:" in text and "floor on an H100" in text


def test_explain_names_the_backend_and_the_reasons():
    q = torch.randn(1, 1, 4, 32)[..., ::2]
    explanation = fastattn.explain(q, Q[:1, :1], Q[:1, :1], masks.causal())
    assert explanation.backend == "cpu" and "triton" in explanation.rejected
    assert "q has a last stride of 2 and is copied" in str(explanation)
    assert fastattn.explain(Q, Q, Q, backend="eager").backend == "eager"
    assert fastattn.explain(Q, Q, Q, backend="eager").rejected["cpu"] == ["backend='eager' was asked for"]
    double = Q.double()
    assert fastattn.explain(double, double, double, backend="triton").backend == "none"


def test_inference_mode():
    with torch.inference_mode():
        q, k, v = inputs("cpu", False)
        out = fastattn.attention(q, k, v, causal_padding("cpu"))
        expected = fastattn.attention(q, k, v, causal_padding("cpu"), backend="eager")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("setting", "expected"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")])
@pytest.mark.parametrize("backend", [TRITON])
def test_fp32_follows_pytorch_s_tf32_switch(backend, setting, expected, matmul_precision):
    from fastattn.kernels.triton import attention
    from fastattn.kernels.triton.launch import GPU

    matmul_precision.fp32_precision = setting
    single, half = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 16, dtype=torch.float16)
    assert attention.forward_launch(*[single] * 5, LoweredMask(), 1.0, GPU(90)).arguments["PRECISION"] == expected
    assert attention.forward_launch(*[half] * 4, single, LoweredMask(), 1.0, GPU(90)).arguments["PRECISION"] == "ieee"
