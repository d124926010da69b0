"""linear, ffn and the packed weights behind them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.activations import ACTIVATIONS
from fastattn.kernels.cpu import ffn as cpu_ffn
from fastattn.testing import assert_accurate, linear_yardstick, run_linear

BACKENDS = ["eager", "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(rows, inputs, outputs, dtype, bias=True, residual=True):
    x, dy = torch.randn(2, rows, inputs), torch.randn(2, rows, outputs)
    weight, b, r = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs), torch.randn(2, rows, outputs)
    made = (x, weight, b if bias else None, r if residual else None, dy)
    return tuple(None if t is None else t.to(dtype) for t in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_specification(backend, activation, dtype):
    for (rows, inputs, outputs), bias in itertools.product([(1, 16, 24), (33, 65, 17), (64, 96, 128)], [True, False]):
        x, weight, b, residual, dy = tensors(rows, inputs, outputs, dtype, bias, residual=bias)
        yardstick = linear_yardstick(x, weight, b, residual, dy, activation)
        assert_accurate(run_linear(x, weight, b, residual, dy, activation, backend), yardstick)
        with torch.no_grad():  # inference takes another path: packed weights, the activation fused
            y = fastattn.linear(x, weight, b, activation=activation, residual=residual, backend=backend)
        assert_accurate({"y": y}, yardstick)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, activation):
    x, weight, bias, residual, _ = (t.double().requires_grad_() for t in tensors(3, 5, 7, torch.float64))

    def function(x, weight, bias, residual):
        return fastattn.linear(x, weight, bias, activation=activation, residual=residual, backend=backend)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_named_one(name):
    """In fp64, so that no flavour of GELU passes for another."""
    z = torch.linspace(-6, 6, 201, dtype=torch.float64)
    expected = {
        "gelu": z * 0.5 * (1 + torch.erf(z / 2**0.5)),
        "gelu_tanh": 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "quick_gelu": z / (1 + torch.exp(-1.702 * z)),
        "relu": z.clamp_min(0),
        "silu": z / (1 + torch.exp(-z)),
    }[name]
    torch.testing.assert_close(ACTIVATIONS[name][0](z), expected, rtol=1e-12, atol=1e-12)
    one = torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(fastattn.linear(z[:, None], one, activation=name)[:, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ffn_is_two_linears(backend):
    x, w1, b1, _, _ = tensors(9, 16, 64, torch.float32)
    _, w2, b2, _, _ = tensors(9, 64, 24, torch.float32)
    expected = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    torch.testing.assert_close(fastattn.ffn(x, w1, b1, w2, b2, backend=backend), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, requires_grad):
    x, weight, bias, residual, dy = tensors(3, 8, 12, torch.float32)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
    weight = weight.T.contiguous().T
    args = (x, weight, bias, residual, "gelu", requires_grad, backend)
    torch.library.opcheck(torch.ops.fastattn.linear_forward.default, args)
    z = F.linear(x.detach(), weight, bias)
    args = (dy, x.detach(), weight, bias, z, "gelu", True, True, True, backend)
    torch.library.opcheck(torch.ops.fastattn.linear_backward.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend):
    layer = torch.nn.Linear(16, 24)

    def function(x):
        return fastattn.linear(x, layer.weight, layer.bias, activation="quick_gelu", backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x = torch.randn(rows, 16, requires_grad=True)
        torch.testing.assert_close(compiled(x), function(x))
        grads = [torch.autograd.grad(f(x).square().sum(), [x, layer.weight, layer.bias]) for f in (function, compiled)]
        torch.testing.assert_close(grads[1], grads[0])


def test_module_exported_for_inference_trains():
    class Layer(torch.nn.Linear):
        def forward(self, x):
            return fastattn.linear(x, self.weight, self.bias, activation="gelu")

    layer, x = Layer(16, 8), torch.randn(4, 16)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
    grads = []
    for m in (layer, exported):
        m.zero_grad()
        m(x).square().sum().backward()
        grads.append((m.weight.grad.clone(), m.bias.grad.clone()))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    layer, x = torch.nn.Linear(16, 8), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = fastattn.linear(x, layer.weight, layer.bias, activation="gelu", backend=backend)
        expected = F.gelu(layer(x))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_second_derivative_raises():
    x, weight, bias, _, _ = tensors(3, 8, 12, torch.float32)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fastattn.linear(x, weight, bias, activation="gelu").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()


# Packed weights


@pytest.fixture
def packed(monkeypatch):
    monkeypatch.delenv("FASTATTN_PREPACK", raising=False)
    fastattn.clear_packed()
    yield cpu_ffn._packed_weights
    fastattn.clear_packed()


def infer(layer, x):
    with torch.no_grad():
        return fastattn.linear(x, layer.weight, layer.bias, activation="gelu", backend="cpu")


def truth(layer, x):
    with torch.no_grad():
        return F.gelu(layer(x))


def test_packed_copy_follows_the_weight(packed):
    layer, x = torch.nn.Linear(32, 24), torch.randn(8, 32)
    torch.testing.assert_close(infer(layer, x), truth(layer, x))
    assert len(packed) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(infer(layer, x), truth(layer, x))
    torch.optim.SGD(layer.parameters(), 0.5).zero_grad()
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.5).step()
    torch.testing.assert_close(infer(layer, x), truth(layer, x))
    layer.load_state_dict(torch.nn.Linear(32, 24).state_dict())
    torch.testing.assert_close(infer(layer, x), truth(layer, x))
    layer.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(infer(layer, x), truth(layer, x))
    assert len(packed) == 1
    del layer
    assert len(packed) == 0


def test_what_is_never_kept(packed, monkeypatch):
    layer, x = torch.nn.Linear(32, 24), torch.randn(8, 32)
    fastattn.linear(x, layer.weight, layer.bias)  # with grad
    with torch.inference_mode():
        fastattn.linear(x, torch.randn(24, 32))  # an inference tensor has no version counter
    with torch.no_grad():
        fastattn.linear(x, (layer.weight.detach().requires_grad_() * 1).requires_grad_())
    assert all(w.is_leaf and not w.is_inference() for w in packed)
    before = len(packed)
    monkeypatch.setenv("FASTATTN_PREPACK", "0")
    infer(layer, x)
    assert len(packed) == before


def test_clear_packed_sees_writes_that_have_no_counter(packed):
    layer, x = torch.nn.Linear(32, 24), torch.randn(8, 32)
    infer(layer, x)
    layer.weight.detach().numpy()[:] = 0
    fastattn.clear_packed()
    torch.testing.assert_close(infer(layer, x), truth(layer, x))


X, W = torch.zeros(2, 3, 8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "activation must be", lambda: fastattn.linear(X, W, activation="gelu_new")),
        (ValueError, r"weight must have shape \(F, 8\)", lambda: fastattn.linear(X, W.T)),
        (ValueError, r"bias must have shape \(5,\)", lambda: fastattn.linear(X, W, torch.zeros(8))),
        (ValueError, "residual must have shape", lambda: fastattn.linear(X, W, residual=torch.zeros(5))),
        (ValueError, "backend must be", lambda: fastattn.linear(X, W, backend="triton")),
        (TypeError, "weight is torch.float64", lambda: fastattn.linear(X, W.double())),
        (TypeError, "bias must be", lambda: fastattn.linear(X, W, torch.zeros(5, dtype=torch.float64))),
        (TypeError, "x must be fp16", lambda: fastattn.linear(X.int(), W.int())),
        (NotImplementedError, "dropout", lambda: fastattn.ffn(X, W, None, W.T, None, dropout=0.1)),
        (NotImplementedError, "recompute", lambda: fastattn.ffn(X, W, None, W.T, None, recompute=True)),
        (ValueError, "activation must be", lambda: fastattn.ffn(X, W, None, W.T, None, activation=None)),
    ],
)  # fmt: skip
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    x = torch.zeros(0, 8, requires_grad=True)
    y = fastattn.linear(x, W, torch.ones(5), activation="relu", backend=backend)
    assert y.shape == (0, 5)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 8)
