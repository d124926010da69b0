"""add_layer_norm and add_rms_norm: every backend against the fp64 specification, and as PyTorch operators."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from backends import TRITON, device_of
from guarded import assert_no_read_beyond_the_end
from layouts import LAYOUTS

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate, norm_yardstick, run_norm

BACKENDS = ["eager", "cpu", TRITON]
EAGER = ["eager", "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (17, 33), (1, 64), (33, 65), (5, 129), (65, 17), (2, 768)]  # rows of each of two batches, width
GIVEN = ["all", "no residual", "no bias", "no weight", "fp32 parameters", "fp32 residual", "no gradient of the sum"]
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])


def tensors(given, rows, width, dtype, device="cpu", rms=False):
    """x, residual, weight, bias, dy and dsum."""
    x, residual, dy, dsum = (torch.randn(2, rows, width).to(device, dtype) for _ in range(4))
    weight, bias = torch.randn(width).to(device, dtype), torch.randn(width).to(device, dtype)
    if given == "no residual":
        residual = dsum = None
    if given == "no bias" or rms:
        bias = None
    if given == "no weight":
        weight = None
    if given == "fp32 parameters":
        weight, bias = weight.float(), None if rms else bias.float()
    if given == "fp32 residual":
        residual, dsum = residual.float(), dsum.float()
    return x, residual, weight, bias, dy, None if given == "no gradient of the sum" else dsum


@pytest.mark.usefixtures("poisoned")
@RMS
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_specification(backend, given, rms):
    turn = GIVEN.index(given)
    for i, dtype in enumerate(DTYPES):
        for j, shape in enumerate(SHAPES):
            if backend not in EAGER and (i + j + turn + rms) % 7 > 1:
                continue  # two shapes of each dtype, in turn
            args = tensors(given, *shape, dtype, device_of(backend), rms)
            result = run_norm(*args, 1e-5, backend, rms=rms)
            assert_accurate(result, norm_yardstick(*args, 1e-5, rms=rms))
            dtypes = [t.dtype for t in args if t is not None]
            assert result["y"].dtype == dtype and result["sum"].dtype == (torch.float32 if torch.float32 in dtypes[:2] else dtype)
            with torch.no_grad():  # inference writes no sum, unless it is asked for
                parameters = args[:3] if rms else args[:4]
                norm = fastattn.add_rms_norm if rms else fastattn.add_layer_norm
                assert torch.equal(norm(*parameters, eps=1e-5, backend=backend), result["y"])


def test_specification_is_pytorch_s_norm():
    x, residual, weight, bias, _, _ = tensors("all", 7, 33, torch.float64)
    total = x + residual
    expected = F.layer_norm(total, (33,), weight, bias, 1e-3)
    torch.testing.assert_close(reference.norm(x, residual, weight, bias, 1e-3, False)[0], expected, rtol=1e-12, atol=1e-12)
    expected = F.rms_norm(total, (33,), weight, 1e-3)
    torch.testing.assert_close(reference.norm(x, residual, weight, None, 1e-3, True)[0], expected, rtol=1e-12, atol=1e-12)


@RMS
@pytest.mark.parametrize("backend", EAGER)
def test_gradcheck(backend, rms):
    shapes = ((2, 3, 5), (2, 3, 5), (5,), (5,))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes[: 3 if rms else 4]]
    norm = fastattn.add_rms_norm if rms else fastattn.add_layer_norm
    assert torch.autograd.gradcheck(lambda *a: norm(*a, return_sum=True, backend=backend), leaves)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_far_from_zero(backend):
    """A variance taken as a difference of means of squares would be lost here."""
    x, residual, weight, bias, dy, dsum = tensors("all", 9, 129, torch.float32, device_of(backend))
    args = (x + 3000, residual, weight, bias, dy, dsum)
    result = run_norm(*args, 1e-5, backend)
    assert_accurate(result, norm_yardstick(*args, 1e-5))
    expected = F.layer_norm((args[0] + residual).double(), (129,), weight.double(), bias.double(), 1e-5)
    assert (result["y"] - expected).abs().max() < 2.0**-24 * 3000 * 32


@pytest.mark.usefixtures("poisoned")
@RMS
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, kind, rms):
    layout = LAYOUTS[kind]
    x, residual, weight, bias, dy, dsum = tensors("all", 17, 64, torch.float32, device_of(backend), rms)
    args = (layout(x), layout(residual), weight, bias, layout(dy), layout(dsum))
    assert_accurate(run_norm(*args, 1e-5, backend, rms=rms), norm_yardstick(*args, 1e-5, rms=rms))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", [TRITON])
def test_many_rows_make_many_sums(backend, monkeypatch):
    """Programs that walk several tiles of rows, the last one not full; sums of small integers have no rounding."""
    from fastattn.kernels.triton import norm

    monkeypatch.setattr(norm, "PARTS", 3)
    rows, device = 150, device_of(backend)
    x = (torch.randint(0, 2, (rows, 256)) * 2.0 - 1).to(device)
    x[:, 128:] = -x[:, :128]  # mean 0 and variance 1, so that x is its own normal form
    dy = torch.randint(-2, 3, (rows, 256)).float().to(device)
    weight, bias = torch.ones(256, device=device, requires_grad=True), torch.zeros(256, device=device, requires_grad=True)
    y = fastattn.add_layer_norm(x, None, weight, bias, eps=2.0**-30, backend=backend)
    dweight, dbias = torch.autograd.grad(y, [weight, bias], dy)
    assert torch.equal(y, x) and torch.equal(dbias, dy.sum(0)) and torch.equal(dweight, (dy * x).sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeat_runs_are_bit_equal(backend):
    args = tensors("all", 70, 48, torch.float32, device_of(backend))
    first, second = run_norm(*args, 1e-5, backend), run_norm(*args, 1e-5, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_stay_finite(backend, rms):
    """Variance 0, and for an RMSNorm all zeros: rstd is 1 / sqrt(eps)."""
    x = torch.full((3, 16), 0.0 if rms else 7.0, device=device_of(backend))
    result = run_norm(x, None, torch.ones_like(x[0]), None, x + 1, None, 1e-6, backend, rms=rms)
    assert (result["y"] == 0).all() and all(torch.isfinite(t).all() for t in result.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    args = tensors("all", 0, 16, torch.float32, device_of(backend))
    result = run_norm(*args, 1e-5, backend)
    assert result["y"].shape == result["dx"].shape == (2, 0, 16)
    assert (result["dweight"] == 0).all() and (result["dbias"] == 0).all()


@pytest.mark.parametrize("backend", [TRITON])
def test_widest_row(backend):
    from fastattn.kernels.triton import norm

    args = tensors("all", 1, norm.WIDEST, torch.float32, device_of(backend))
    assert_accurate(run_norm(*args, 1e-5, backend), norm_yardstick(*args, 1e-5))
    for width, words in ((norm.WIDEST + 1, "is not in"), (norm.WIDEST - 1, "is no multiple of 8")):
        x = torch.zeros(1, width, device=device_of(backend))
        with pytest.raises(NotImplementedError, match=f"width {width}.* {words}"):
            fastattn.add_layer_norm(x, None, None, None, backend=backend)


@pytest.mark.parametrize("backend", [TRITON])
def test_no_read_beyond_the_end(backend):
    assert_no_read_beyond_the_end("norm")


@RMS
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, residual, requires_grad, rms):
    x, r, weight, bias, dy, dtotal = tensors("all", 3, 16, torch.float32, device_of(backend), rms)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
    ops = torch.ops.fastattn
    for keep in (False, True):
        args = (x, r if residual else None, weight, bias, 1e-5, rms, keep, backend)
        torch.library.opcheck(ops.add_norm_forward.default, args)
    _, total, mean, rstd = ops.add_norm_forward(x.detach(), r, weight, bias, 1e-5, rms, True, backend)
    args = (dy, dtotal if residual else None, total, mean, rstd, weight, rms, True, not rms, backend)
    torch.library.opcheck(ops.add_norm_backward.default, args)


class Layer(torch.nn.Module):
    """Both norms, and the sum."""

    def __init__(self, backend):
        super().__init__()
        self.backend, self.norm = backend, torch.nn.LayerNorm(16)
        self.to(device_of(backend))

    def forward(self, x, residual):
        weight, bias = self.norm.weight, self.norm.bias
        y, total = fastattn.add_layer_norm(x, residual, weight, bias, eps=1e-5, return_sum=True, backend=self.backend)
        return total + fastattn.add_rms_norm(y, total, weight, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend):
    layer = Layer(backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x, residual = torch.randn(2, rows, 16, device=device_of(backend), requires_grad=True)
        torch.testing.assert_close(compiled(x, residual), layer(x, residual))
        leaves = [x, residual, *layer.parameters()]
        grads = [torch.autograd.grad(f(x, residual).square().sum(), leaves) for f in (layer, compiled)]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_exported_for_inference_trains(backend):
    layer, (x, residual) = Layer(backend), torch.randn(2, 4, 16, device=device_of(backend))
    with torch.no_grad():
        exported = torch.export.export(layer, (x, residual)).module()
    grads = []
    for module in (layer, exported):
        module.zero_grad()
        module(x, residual).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(grad.abs().max() > 0 for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_nothing(backend):
    x, residual, weight, bias, _, _ = tensors("all", 3, 16, torch.float32, device_of(backend))
    expected = fastattn.add_layer_norm(x, residual, weight, bias, backend=backend)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = fastattn.add_layer_norm(x, residual, weight, bias, backend=backend)
    assert torch.equal(y, expected)


@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_and_forward_mode_raise(backend, rms):
    x = torch.randn(3, 8, device=device_of(backend), requires_grad=True)

    def norm(x):
        if rms:
            return fastattn.add_rms_norm(x, None, None, backend=backend)
        return fastattn.add_layer_norm(x, None, None, None, backend=backend)

    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        norm(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


X, NORM = torch.zeros(2, 3, 8), torch.nn.LayerNorm(8)


def test_defaults_of_eps_are_told_apart_from_pytorch_s():
    """They are BERT's and T5's; the documentation names the one that users of PyTorch expect."""
    text = inspect.getdoc(fastattn.add_layer_norm)
    ours = inspect.signature(fastattn.add_layer_norm).parameters["eps"].default
    assert ours != NORM.eps and f"nn.LayerNorm's {NORM.eps:g}".replace("e-0", "e-") in text and f"{ours:g}" in text


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (NotImplementedError, "fp64 is served", lambda: fastattn.add_rms_norm(X, X.double(), None, backend="triton")),
        (ValueError, "eps must be positive", lambda: fastattn.add_layer_norm(X, X, None, None, eps=0)),
        (ValueError, "residual must have x's shape", lambda: fastattn.add_layer_norm(X, X[0], None, None)),
        (ValueError, r"weight must have shape \(8,\)", lambda: fastattn.add_layer_norm(X, X, torch.ones(3), None)),
        (ValueError, r"weight must have shape \(8,\)", lambda: fastattn.add_rms_norm(X, X, torch.ones(3))),
        (TypeError, "bias must be", lambda: fastattn.add_layer_norm(X, X, None, torch.ones(8, dtype=torch.float64))),
        (TypeError, "x must be fp16", lambda: fastattn.add_layer_norm(X.int(), None, None, None)),
        (TypeError, "x must be fp16.* got torch.float8", lambda: fastattn.add_rms_norm(X.to(torch.float8_e4m3fn), None, None)),
        (TypeError, "x must be fp16.* got torch.complex64", lambda: fastattn.add_layer_norm(X.cfloat(), None, None, None)),
        (TypeError, "residual must be fp16", lambda: fastattn.add_layer_norm(X, X.cfloat(), None, None)),
        (TypeError, "residual must be fp16", lambda: fastattn.add_rms_norm(X, X.to(torch.float8_e5m2), None)),
        (TypeError, "residual must be fp16", lambda: fastattn.add_layer_norm(X, X.long(), None, None)),
        (TypeError, "weight must be torch.float32", lambda: fastattn.add_rms_norm(X, X, torch.ones(8).cfloat())),
        (TypeError, "x must be a tensor, got NoneType", lambda: fastattn.add_layer_norm(None, X, None, None)),
        (TypeError, "x must be a tensor, got ndarray", lambda: fastattn.add_rms_norm(X.numpy(), None, None)),
        (TypeError, "residual must be a tensor, got ndarray", lambda: fastattn.add_rms_norm(X, X.numpy(), None)),
        (TypeError, "weight must be a tensor, got list", lambda: fastattn.add_layer_norm(X, X, [1.0] * 8, None)),
        (TypeError, "weight must be a tensor, got LayerNorm: pass its", lambda: fastattn.add_layer_norm(X, X, NORM, None)),
        (TypeError, "bias must be a tensor, got float", lambda: fastattn.add_layer_norm(X, X, None, 0.0)),
        (ValueError, "backend must be", lambda: fastattn.add_layer_norm(X, X, None, None, backend="cuda")),
    ],
)
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
