"""linear, ffn and the packed weights behind them: every backend against the fp64 specification, and as PyTorch operators."""

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, CUDA, TRITON, device_of, dtype_of
from graphs import assert_replay_follows
from guarded import assert_no_read_beyond_the_end
from layouts import LAYOUTS

import fastattn
from fastattn.activations import ACTIVATIONS
from fastattn.kernels.cpu import ffn as cpu_ffn
from fastattn.testing import COLD, assert_accurate, ffn_yardstick, linear_yardstick, run_ffn, run_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 16, 24), (33, 65, 17), (64, 96, 128), (17, 129, 33), (65, 64, 129)]  # rows of each of two batches, inputs, outputs
EAGER = ["eager", "cpu"]


def normal(*size, dtype=torch.float32, device="cpu"):
    return torch.randn(size).to(device, dtype)


def tensors(rows, inputs, outputs, dtype, device="cpu", bias=True, residual=True):
    """x, weight, bias, residual and dy of `linear`."""
    x, dy = normal(2, rows, inputs, dtype=dtype, device=device), normal(2, rows, outputs, dtype=dtype, device=device)
    weight = (torch.randn(outputs, inputs) / max(inputs, 1) ** 0.5).to(device, dtype)
    b = normal(outputs, dtype=dtype, device=device) if bias else None
    return x, weight, b, normal(2, rows, outputs, dtype=dtype, device=device) if residual else None, dy


def ffn_tensors(rows, inputs, hidden, dtype, device="cpu", bias=True):
    """x, w1, b1, w2, b2 and dy of `ffn`."""
    x, w1, b1, _, _ = tensors(rows, inputs, hidden, dtype, device, bias, residual=False)
    _, w2, b2, _, dy = tensors(rows, hidden, inputs, dtype, device, bias, residual=False)
    return x, w1, b1, w2, b2, dy


def cases(backend, activation):
    """(dtype, shape, is there a bias): all of them, or for kernels that are interpreted or emulated two shapes per dtype."""
    turn = [None, *ACTIVATIONS].index(activation)
    for i, dtype in enumerate(DTYPES):
        if backend == "cuda" and dtype == torch.float32:
            continue
        for j, shape in enumerate(SHAPES):
            if backend in EAGER or (j - i - turn) % 5 < 2:
                yield dtype, shape, (i + j) % 3 > 0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_matches_specification(backend, activation):
    for dtype, shape, bias in cases(backend, activation):
        x, weight, b, residual, dy = tensors(*shape, dtype, device_of(backend), bias, residual=bias)
        yardstick = linear_yardstick(x, weight, b, residual, dy, activation)
        assert_accurate(run_linear(x, weight, b, residual, dy, activation, backend), yardstick)
        with torch.no_grad():  # inference takes another path: packed weights, the activation fused, no z
            y = fastattn.linear(x, weight, b, activation=activation, residual=residual, backend=backend)
        assert_accurate({"y": y}, yardstick)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ffn_matches_specification(backend, activation):
    for dtype, shape, bias in cases(backend, activation):
        x, w1, b1, w2, b2, dy = ffn_tensors(*shape, dtype, device_of(backend), bias)
        yardstick = ffn_yardstick(x, w1, b1, w2, b2, dy, activation)
        assert_accurate(run_ffn(x, w1, b1, w2, b2, dy, activation, backend), yardstick)
        with torch.no_grad():
            y = fastattn.ffn(x, w1, b1, w2, b2, activation=activation, backend=backend)
        assert_accurate({"y": y}, yardstick)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bf16_by_products_of_either_dtype(activation, slow, monkeypatch):
    """A CPU multiplies bf16 in fp32 where that is faster; both ways are within the rule on every machine."""
    monkeypatch.setattr(cpu_ffn, "bf16_is_slow", lambda: slow)
    x, weight, b, residual, dy = tensors(33, 65, 96, torch.bfloat16)
    yardstick = linear_yardstick(x, weight, b, residual, dy, activation)
    assert_accurate(run_linear(x, weight, b, residual, dy, activation, "cpu"), yardstick)
    with torch.no_grad():
        y = fastattn.linear(x, weight, b, activation=activation, residual=residual, backend="cpu")
    assert_accurate({"y": y}, yardstick)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_wider_bias_and_residual(backend):
    """fp32 parameters and an fp32 stream of residuals beside half precision: y is fp32."""
    for dtype in (torch.float16, torch.bfloat16):
        x, weight, bias, residual, dy = tensors(17, 64, 40, dtype, device_of(backend))
        bias, residual, dy = torch.randn_like(bias.float()), torch.randn_like(residual.float()), torch.randn_like(dy.float())
        result = run_linear(x, weight, bias, residual, dy, "silu", backend)
        assert result["y"].dtype == result["dresidual"].dtype == result["db"].dtype == torch.float32
        assert_accurate(result, linear_yardstick(x, weight, bias, residual, dy, "silu"))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("backend", EAGER)
def test_gradcheck(backend, activation):
    leaves = [t.requires_grad_() for t in tensors(3, 5, 7, torch.float64)[:4]]

    def function(x, weight, bias, residual):
        return fastattn.linear(x, weight, bias, activation=activation, residual=residual, backend=backend)

    assert torch.autograd.gradcheck(function, leaves)
    if activation is not None:
        leaves = [t.requires_grad_() for t in ffn_tensors(3, 5, 7, torch.float64)[:5]]
        assert torch.autograd.gradcheck(lambda *a: fastattn.ffn(*a, activation=activation, backend=backend), leaves)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", EAGER)
def test_an_activation_of_one_row_is_served_by_plain_pytorch(backend, dtype, monkeypatch):
    """A function and its derivative are all that eager and cpu need: what oneDNN does not fuse comes after the product."""
    monkeypatch.setitem(ACTIVATIONS, "unknown", (F.mish, torch.ops.aten.mish_backward))
    x, weight, b, residual, dy = tensors(33, 65, 96, dtype)
    yardstick = linear_yardstick(x, weight, b, residual, dy, "unknown")
    assert_accurate(run_linear(x, weight, b, residual, dy, "unknown", backend), yardstick)
    with torch.no_grad():
        y = fastattn.linear(x, weight, b, activation="unknown", residual=residual, backend=backend)
    assert_accurate({"y": y}, yardstick)
    explained = fastattn.explain_linear(x, weight, activation="unknown")
    assert explained.backend == "cpu" and "the activation after it" in str(explained)


@pytest.mark.parametrize("backend", [TRITON, CUDA])
def test_a_kernel_refuses_an_activation_that_it_lacks(backend, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "unknown", (F.mish, torch.ops.aten.mish_backward))
    x, w1, b1, w2, b2, _ = ffn_tensors(3, 8, 16, dtype_of(backend), device_of(backend))
    calls = [
        lambda: fastattn.linear(x, w1, activation="unknown", backend=backend),
        lambda: fastattn.ffn(x, w1, b1, w2, b2, activation="unknown", backend=backend),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=f"{backend}: activation 'unknown' is not in its kernels"):
            call()
    rejected = fastattn.explain_linear(x, w1, activation="unknown", backend=backend).rejected[backend]
    assert rejected == ["activation 'unknown' is not in its kernels"]


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


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", [TRITON, CUDA])
def test_activation_of_half_precision_is_the_named_one(backend, name):
    """To the precision of fp32, which rounding to fp16 would hide: y with an fp32 residual, act' as an fp32 bias gradient."""
    z = torch.linspace(-6, 6, 201).half().to(device_of(backend))
    one, nothing = torch.ones(1, 1, dtype=z.dtype, device=z.device), torch.zeros(201, device=z.device)
    y = fastattn.linear(z[:, None], one, residual=nothing[:, None], activation=name, backend=backend)
    bias = nothing.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fastattn.linear(one, z[:, None], bias, activation=name, backend=backend).sum(), bias)
    wide = z.double().requires_grad_()
    expected = ACTIVATIONS[name][0](wide)
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    bound = COLD * 2.0**-24 * 1.2 * 6
    assert y.dtype == slope.dtype == torch.float32
    assert (y[:, 0].double() - expected).abs().max() <= bound and (slope.double() - expected_slope).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_ffn_is_two_linears(backend):
    x, w1, b1, w2, b2, _ = ffn_tensors(9, 16, 64, dtype_of(backend), device_of(backend))
    hidden = fastattn.linear(x, w1, b1, activation="gelu", backend=backend)
    expected = fastattn.linear(hidden, w2, b2, backend=backend)
    assert torch.equal(fastattn.ffn(x, w1, b1, w2, b2, backend=backend), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [TRITON])
def test_many_tiles_of_small_integers_are_exact(backend, dtype, monkeypatch):
    """The largest tiles, several columns of them and more than one group of rows; sums of small integers have no rounding."""
    from fastattn.kernels.triton import ffn
    from fastattn.kernels.triton.launch import GPU

    tile = ffn._config(2**20, 1024, 1024, dtype, GPU(90), "linear_dgrad")
    monkeypatch.setattr(ffn, "_config", lambda *request, **fields: tile)
    M, hidden = 8 * tile.BLOCK_M + 40, 2 * tile.BLOCK_N + 8

    def integers(*size, share=1.0):
        return (torch.randint(-2, 3, size) * (torch.rand(size) < share)).to(device_of(backend), dtype)

    x, dy, w1, w2 = integers(M, 16), integers(M, 8), integers(hidden, 16, share=0.2), integers(8, hidden, share=0.2)
    args = (x, w1, integers(hidden), w2, integers(8), dy, "relu")
    result, exact = run_ffn(*args, backend), ffn_yardstick(*args).exact
    for name in ("y", "dx") if dtype == torch.float16 else exact:  # the others are beyond fp16's integers
        assert 0 < exact[name].abs().max() < 1 / torch.finfo(dtype).eps, name
        assert torch.equal(result[name].double(), exact[name]), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, kind):
    layout = LAYOUTS[kind]
    x, weight, bias, residual, dy = tensors(17, 64, 40, dtype_of(backend), device_of(backend))
    x, weight, residual, dy = layout(x), layout(weight), layout(residual), layout(dy)
    yardstick = linear_yardstick(x, weight, bias, residual, dy, "gelu")
    assert_accurate(run_linear(x, weight, bias, residual, dy, "gelu", backend), yardstick)
    x, w1, b1, w2, b2, dy = ffn_tensors(17, 64, 40, dtype_of(backend), device_of(backend))
    x, w1, w2, dy = layout(x), layout(w1), layout(w2), layout(dy)
    assert_accurate(run_ffn(x, w1, b1, w2, b2, dy, "gelu", backend), ffn_yardstick(x, w1, b1, w2, b2, dy, "gelu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeat_runs_are_bit_equal(backend):
    args = ffn_tensors(70, 24, 40, dtype_of(backend), device_of(backend))
    first, second = run_ffn(*args, "gelu", backend), run_ffn(*args, "gelu", backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes 5 GB of addresses, of which a GPU would need all")
def test_offsets_beyond_2_to_31(backend):
    """Rows 2^22 elements apart: the last ones lie beyond 2^31 elements. Memory that is not touched costs nothing."""
    rows, pitch = 520, 2**22
    x = torch.empty(rows * pitch, dtype=torch.float16).as_strided((rows, 16), (pitch, 1))
    x.copy_(torch.randn(rows, 16))
    weight, residual = normal(24, 16, dtype=torch.float16), normal(rows, 24, dtype=torch.float16)
    with torch.no_grad():
        far = fastattn.linear(x, weight, activation="relu", residual=residual, backend=backend)
        near = fastattn.linear(x.contiguous(), weight, activation="relu", residual=residual, backend=backend)
    assert torch.equal(far, near)


@pytest.mark.parametrize("backend", [TRITON])
def test_no_read_beyond_the_end(backend):
    assert_no_read_beyond_the_end("ffn")


@pytest.mark.parametrize("sizes", [(0, 8, 5), (3, 0, 5), (3, 8, 0), (0, 0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, sizes):
    x, weight, bias, residual, dy = tensors(*sizes, dtype_of(backend), device_of(backend))
    for activation in (None, "relu"):
        result = run_linear(x, weight, bias, residual, dy, activation, backend)
        assert_accurate(result, linear_yardstick(x, weight, bias, residual, dy, activation))
    args = ffn_tensors(*sizes, dtype_of(backend), device_of(backend))
    assert_accurate(run_ffn(*args, "gelu", backend), ffn_yardstick(*args, "gelu"))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, requires_grad):
    dtype, device = dtype_of(backend), device_of(backend)
    ops = torch.ops.fastattn
    x, weight, bias, residual, dy = tensors(3, 8, 12, dtype, device)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
    weight = weight.T.contiguous().T
    torch.library.opcheck(ops.linear_forward.default, (x, weight, bias, residual, "gelu", requires_grad, backend))
    z = F.linear(x.detach(), weight, bias)
    args = (dy, x.detach(), weight, bias, z, "gelu", True, True, True, backend)
    torch.library.opcheck(ops.linear_backward.default, args)

    x, w1, b1, w2, b2, dy = ffn_tensors(3, 8, 12, dtype, device)
    x, w2 = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad), w2.T.contiguous().T
    torch.library.opcheck(ops.ffn_forward.default, (x, w1, b1, w2, b2, "gelu", requires_grad, backend))
    x = x.detach()
    _, hidden, z = ops.ffn_forward(x, w1, b1, w2, b2, "gelu", True, backend)
    for needs in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(ops.ffn_backward.default, (dy, x, w1, b1, w2, b2, hidden, z, "gelu", needs, backend))


class Layer(torch.nn.Module):
    """A linear with an activation, and an ffn."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.up, self.down, self.first = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16), torch.nn.Linear(16, 16)
        self.to(device_of(backend), dtype_of(backend))

    def forward(self, x):
        x = fastattn.linear(x, self.first.weight, self.first.bias, activation="quick_gelu", residual=x, backend=self.backend)
        return fastattn.ffn(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, backend=self.backend)

    def gradients(self, function, x):
        return torch.autograd.grad(function(x).square().sum(), [x, *self.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend):
    for compiler in ["aot_eager", "inductor"] if backend == "cpu" else ["aot_eager"]:
        check_compiled(backend, compiler)


def check_compiled(backend, compiler):
    layer = Layer(backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (5, 9):
        x = normal(rows, 16, dtype=dtype_of(backend), device=device_of(backend)).requires_grad_()
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(layer.gradients(compiled, x), layer.gradients(layer, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_exported_for_inference_trains(backend):
    layer, x = Layer(backend), normal(4, 16, dtype=dtype_of(backend), device=device_of(backend))
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
    grads = []
    for module in (layer, exported):
        module.zero_grad()
        module(x).square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
    assert all(grad.abs().max() > 0 for grad in grads[0].values())
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    layer, x = Layer(backend).float(), normal(4, 16, device=device_of(backend))
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
    up, down, first = layer.up, layer.down, layer.first
    half = [t.to(torch.bfloat16) for t in (x, first.weight, up.weight, down.weight)]
    hidden = fastattn.linear(half[0], half[1], first.bias, activation="quick_gelu", residual=x, backend=backend)
    expected = fastattn.ffn(hidden.bfloat16(), half[2], up.bias, half[3], down.bias, backend=backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_and_forward_mode_raise(backend):
    layer, x = Layer(backend), normal(3, 16, dtype=dtype_of(backend), device=device_of(backend)).requires_grad_()
    one = fastattn.linear(x, layer.up.weight, layer.up.bias, activation="gelu", backend=backend)
    for y in (one, layer(x)):
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.square().sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        layer(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_gets_a_gradient(backend):
    for wanted in range(5):
        args = list(ffn_tensors(3, 8, 12, dtype_of(backend), device_of(backend))[:5])
        args[wanted].requires_grad_()
        fastattn.ffn(*args, backend=backend).sum().backward()
        assert [t.grad is not None for t in args] == [i == wanted for i in range(5)]


def test_explain_linear():
    half = W.half()
    explanation = fastattn.explain_linear(X, W, activation="gelu")
    assert explanation.backend == "cpu" and {"triton", "cuda", "eager"} & set(explanation.rejected) >= {"triton", "cuda"}
    assert "linear(rows=6 K=8 F=5, float32, cpu, activation: gelu)" in str(explanation)
    assert fastattn.explain_linear(X.half(), half, backend="eager").backend == "eager"
    assert fastattn.explain_linear(X.double(), W.double(), backend="triton").backend == "none"
    with pytest.raises(ValueError, match="activation"):
        fastattn.explain_linear(X, W, activation="tanh")


@pytest.mark.parametrize("backend", [TRITON])
def test_explain_says_what_is_left_to_the_library(backend):
    x, weight = X.to(device_of(backend)), W.to(device_of(backend))
    plain = fastattn.explain_linear(x, weight, backend=backend).notes
    fused = fastattn.explain_linear(x, weight, activation="gelu", backend=backend).notes
    assert "cuBLAS" in str(fused) and "nothing to fuse" in str(plain) and "nothing to fuse" not in str(fused)
    assert "tiles from" in str(fused) and "tiles from" not in str(plain)


@pytest.mark.parametrize(("setting", "expected"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")])
@pytest.mark.parametrize("backend", [TRITON])
def test_fp32_follows_pytorch_s_tf32_switch(backend, setting, expected, matmul_precision):
    from fastattn.kernels.triton import ffn
    from fastattn.kernels.triton.launch import GPU

    matmul_precision.fp32_precision = setting
    x, half = torch.zeros(4, 16), torch.zeros(4, 16, dtype=torch.float16)
    assert ffn.forward_launch(x, x, None, None, x, None, "gelu", GPU(90)).arguments["PRECISION"] == expected
    assert ffn.forward_launch(half, half, None, None, half, None, "gelu", GPU(90)).arguments["PRECISION"] == "ieee"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", [TRITON, CUDA])
def test_cuda_graph_captures_forward_and_backward(backend):
    args = [t.requires_grad_() for t in ffn_tensors(70, 64, 256, torch.float16, "cuda")[:5]]

    def step():
        y = fastattn.ffn(*args, backend=backend)
        return y, *torch.autograd.grad(y.sum(), args)

    assert_replay_follows(step, args[0])


X, W = torch.zeros(2, 3, 8), torch.zeros(5, 8)
LINEAR = torch.nn.Linear(8, 5)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "activation must be", lambda: fastattn.linear(X, W, activation="gelu_new")),
        (ValueError, r"weight must have shape \(F, 8\)", lambda: fastattn.linear(X, W.T)),
        (ValueError, r"bias must have shape \(5,\)", lambda: fastattn.linear(X, W, torch.zeros(8))),
        (ValueError, "residual must have shape", lambda: fastattn.linear(X, W, residual=torch.zeros(5))),
        (ValueError, "backend must be", lambda: fastattn.linear(X, W, backend="cublas")),
        (NotImplementedError, "cuda: torch.float32 is not served", lambda: fastattn.linear(X, W, backend="cuda")),
        (NotImplementedError, "triton: .*fp64", lambda: fastattn.linear(X.double(), W.double(), backend="triton")),
        (ValueError, r"w2 must have shape \(F, 5\)", lambda: fastattn.ffn(X, W, None, W, None)),
        (ValueError, r"b2 must have shape \(8,\)", lambda: fastattn.ffn(X, W, None, W.T, torch.zeros(5))),
        (TypeError, "w1 is torch.float64", lambda: fastattn.ffn(X, W.double(), None, W.T, None)),
        (TypeError, "weight is torch.float64", lambda: fastattn.linear(X, W.double())),
        (TypeError, "bias must be", lambda: fastattn.linear(X, W, torch.zeros(5, dtype=torch.float64))),
        (TypeError, "x must be fp16", lambda: fastattn.linear(X.int(), W.int())),
        (TypeError, "x must be fp16.* got torch.complex64", lambda: fastattn.linear(X.cfloat(), W.cfloat())),
        (TypeError, "x must be fp16.* got torch.float8", lambda: fastattn.ffn(X.to(torch.float8_e5m2), W, None, W.T, None)),
        (TypeError, "weight must be fp16", lambda: fastattn.linear(X, W.cfloat())),
        (TypeError, "residual must be fp16.* got torch.complex64", lambda: fastattn.linear(X, W, residual=(X @ W.T).cfloat())),
        (TypeError, "residual must be fp16.* got torch.int64", lambda: fastattn.linear(X, W, residual=(X @ W.T).long())),
        (TypeError, "x must be a tensor, got NoneType", lambda: fastattn.linear(None, W)),
        (TypeError, "x must be a tensor, got ndarray", lambda: fastattn.ffn(X.numpy(), W, None, W.T, None)),
        (TypeError, "weight must be a tensor, got Linear: pass its .weight and .bias", lambda: fastattn.linear(X, LINEAR)),
        (TypeError, "w2 must be a tensor, got Linear: pass", lambda: fastattn.ffn(X, W, None, LINEAR, None)),
        (TypeError, "weight must be a tensor, got NoneType", lambda: fastattn.linear(X, None)),
        (TypeError, "bias must be a tensor, got list", lambda: fastattn.linear(X, W, [0.0] * 5)),
        (TypeError, "residual must be a tensor, got float", lambda: fastattn.linear(X, W, residual=0.0)),
        (TypeError, "w2 must be a tensor, got ndarray", lambda: fastattn.ffn(X, W, None, W.T.numpy(), None)),
        (TypeError, "b1 must be a tensor, got list", lambda: fastattn.ffn(X, W, [0.0] * 5, W.T, None)),
        (ValueError, "activation must be", lambda: fastattn.ffn(X, W, None, W.T, None, activation=None)),
    ],
)  # fmt: skip
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
