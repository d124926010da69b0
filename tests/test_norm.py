"""add_layer_norm against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

import fastattn

BACKENDS = ["eager", "cpu"]


def reference(x, residual, weight, bias, eps):
    total = x if residual is None else residual + x
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", ["all", "no residual", "no bias", "no weight", "fp32 parameters", "fp32 residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_fp64(backend, given, dtype):
    x, residual, dy, dtotal = (torch.randn(2, 7, 33).to(dtype) for _ in range(4))
    weight, bias = torch.randn(33).to(dtype), torch.randn(33).to(dtype)
    if given == "no residual":
        residual = None
    if given == "no bias":
        bias = None
    if given == "no weight":
        weight = None
    if given == "fp32 parameters":
        weight, bias = weight.float(), bias.float()
    if given == "fp32 residual":
        residual = residual.float()
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual, weight, bias)]
    y, total = fastattn.add_layer_norm(*leaves, eps=1e-5, return_sum=True, backend=backend)
    expected_y, expected_total = reference(*wide, 1e-5)
    assert y.dtype == dtype and total.dtype == (dtype if residual is None else torch.promote_types(dtype, residual.dtype))
    pairs = [(y, expected_y), (total, expected_total)]
    given_leaves = [t for t in leaves if t is not None]
    grads = torch.autograd.grad([y, total], given_leaves, [dy, dtotal.to(total.dtype)])
    wides = [t for t in wide if t is not None]
    expected = torch.autograd.grad([expected_y, expected_total], wides, [dy.double(), dtotal.double()])
    for leaf, grad in zip(given_leaves, grads, strict=True):
        assert grad.dtype == leaf.dtype
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for actual, exact in [*pairs, *zip(grads, expected, strict=True)]:
        assert (actual.double() - exact).norm() <= 4 * unit * exact.norm() + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(lambda *a: fastattn.add_layer_norm(*a, return_sum=True, backend=backend), tensors)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, residual, requires_grad):
    x = torch.randn(3, 2, 16).transpose(0, 1).requires_grad_(requires_grad)
    args = (x, torch.randn(2, 3, 16) if residual else None, torch.randn(16), torch.randn(16), 1e-5, backend)
    torch.library.opcheck(torch.ops.fastattn.add_layer_norm_forward.default, args)


def test_compile_fullgraph_dynamic():
    norm = torch.nn.LayerNorm(16)

    def function(x, residual):
        return fastattn.add_layer_norm(x, residual, norm.weight, norm.bias, eps=1e-5, return_sum=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x, residual = torch.randn(2, rows, 16, requires_grad=True)
        torch.testing.assert_close(compiled(x, residual), function(x, residual))


def test_second_derivative_raises():
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(fastattn.add_layer_norm(x, None, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()


X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (NotImplementedError, "dropout", lambda: fastattn.add_layer_norm(X, X, None, None, dropout=0.1)),
        (ValueError, "eps must be positive", lambda: fastattn.add_layer_norm(X, X, None, None, eps=0)),
        (ValueError, "residual must have x's shape", lambda: fastattn.add_layer_norm(X, X[0], None, None)),
        (ValueError, r"weight must have shape \(8,\)", lambda: fastattn.add_layer_norm(X, X, torch.ones(3), None)),
        (TypeError, "bias must be", lambda: fastattn.add_layer_norm(X, X, None, torch.ones(8, dtype=torch.float64))),
        (TypeError, "x must be fp16", lambda: fastattn.add_layer_norm(X.int(), None, None, None)),
        (ValueError, "backend must be", lambda: fastattn.add_layer_norm(X, X, None, None, backend="triton")),
    ],
)
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
