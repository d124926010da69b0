"""Dropout inside ffn and the norms: every backend against the fp64 specification on the same bits, and as PyTorch operators."""

import pytest
import torch
import torch.nn.functional as F
from backends import CUDA, TRITON, device_of, dtype_of
from exported import assert_exported_trains
from layouts import LAYOUTS
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.activations import ACTIVATIONS
from fastattn.dropout import FFN_HIDDEN, LAYER_NORM, RMS_NORM, kept_elements
from fastattn.reference import Drop
from fastattn.testing import assert_accurate, ffn_yardstick, norm_yardstick, run_ffn, run_norm

BACKENDS = ["eager", "cpu", TRITON]
EAGER = ["eager", "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
OPS = pytest.mark.parametrize("op", ["ffn", "add_layer_norm", "add_rms_norm"])
GIVEN = ["all", "no residual", "no parameters", "fp32 residual", "fp32 x", "no gradient of the sum"]
SHAPES = [(1, 1), (7, 33), (5, 129), (9, 65), (1, 768)]  # rows of each of two batches, width
FFN_SHAPES = [(1, 16, 24), (33, 65, 17), (17, 40, 129), (40, 64, 96)]  # rows of each of two batches, inputs, hidden


def drop_of(x, columns, seed, p, tag):
    """The specification's form of what is kept, for the rows of x."""
    seed = torch.tensor([seed], device=x.device)
    return Drop(kept_elements(seed, x.shape[:-1].numel(), columns, p, tag), p)


def norm_tensors(given, rows, width, dtype, device, rms):
    """x, residual, weight, bias, dy and dsum."""
    x, residual, dy, dsum = (torch.randn(2, rows, width).to(device, dtype) for _ in range(4))
    weight, bias = torch.randn(width).to(device, dtype), None if rms else torch.randn(width).to(device, dtype)
    if given == "no residual":
        residual = None
    if given == "no parameters":
        weight = bias = None
    if given == "fp32 residual":
        residual, dsum = residual.float(), dsum.float()
    if given == "fp32 x":
        x, dy, dsum = x.float(), dy.float(), dsum.float()
        weight, bias = weight.float(), None if rms else bias.float()
    return x, residual, weight, bias, dy, None if given == "no gradient of the sum" else dsum


def ffn_tensors(rows, inputs, hidden, dtype, device, bias=True):
    """x, w1, b1, w2, b2 and dy."""
    x, dy = torch.randn(2, rows, inputs), torch.randn(2, rows, inputs)
    w1, w2 = torch.randn(hidden, inputs) / inputs**0.5, torch.randn(inputs, hidden) / hidden**0.5
    b1, b2 = (torch.randn(hidden), torch.randn(inputs)) if bias else (None, None)
    return [None if t is None else t.to(device, dtype) for t in (x, w1, b1, w2, b2, dy)]


def leaves_and_call(op, backend, dtype=torch.float32, sizes=(4, 8, 40), **options):
    """Tensors that require a gradient, and the op as a function of them."""
    rows, inputs, columns = sizes
    device = device_of(backend)
    options = {"dropout": 0.3, "backend": backend, **options}
    if op == "ffn":
        leaves = ffn_tensors(rows, inputs, columns, dtype, device)[:5]
        return [t.requires_grad_() for t in leaves], lambda *leaves: fastattn.ffn(*leaves, **options)
    leaves = norm_tensors("all", rows, columns, dtype, device, False)[: 4 if op == "add_layer_norm" else 3]
    return [t.requires_grad_() for t in leaves], lambda *leaves: getattr(fastattn, op)(*leaves, **options)


def gradients(call, leaves):
    y = call(*leaves)
    return y, *torch.autograd.grad(y.square().sum(), leaves)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@OPS
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_too_small_for_16_bits_keeps_everything(backend, op):
    leaves, call = leaves_and_call(op, backend, dropout=1e-6, seed=4)
    plain = leaves_and_call(op, backend, dropout=0.0)[1]
    for found, expected in zip(gradients(call, leaves), gradients(plain, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poisoned")
@RMS
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_matches_specification(backend, given, rms):
    turn = GIVEN.index(given) + rms
    for i, dtype in enumerate(DTYPES):
        for j, shape in enumerate(SHAPES):
            if (i + j + turn) % 5 > 2 if backend in EAGER else (i + j + turn) % 7 > 0:
                continue
            args, p, seed = norm_tensors(given, *shape, dtype, device_of(backend), rms), (0.1, 0.5)[(i + j) % 2], 17 - 100 * j
            drop = drop_of(args[0], shape[1], seed, p, RMS_NORM if rms else LAYER_NORM)
            result = run_norm(*args, 1e-5, backend, rms=rms, dropout=p, seed=seed)
            assert_accurate(result, norm_yardstick(*args, 1e-5, rms=rms, drop=drop))
            kept = drop.kept.view(args[0].shape)
            assert not (result["dx"] * ~kept).any()  # exactly zero, and nowhere else
            assert (result["dx"] != 0)[kept].float().mean() > 0.99 or shape[1] == 1
            if args[1] is None:
                assert torch.equal(result["sum"] != 0, kept)
            with torch.no_grad():
                parameters = args[:3] if rms else args[:4]
                norm = fastattn.add_rms_norm if rms else fastattn.add_layer_norm
                assert torch.equal(norm(*parameters, eps=1e-5, dropout=p, seed=seed, backend=backend), result["y"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ffn_matches_specification(backend, activation):
    turn = list(ACTIVATIONS).index(activation)
    for i, dtype in enumerate(DTYPES):
        for j, shape in enumerate(FFN_SHAPES):
            if (i + j + turn) % 4 > (1 if backend in EAGER else 0):
                continue
            args, p, seed = ffn_tensors(*shape, dtype, device_of(backend), (i + j) % 3 > 0), (0.1, 0.5)[(i + j) % 2], 2**63 - j
            drop = drop_of(args[0], shape[2], seed - 2**64 if seed >= 2**63 else seed, p, FFN_HIDDEN)
            yardstick = ffn_yardstick(*args, activation, drop)
            result = run_ffn(*args, activation, backend, dropout=p, seed=seed)
            assert_accurate(result, yardstick)
            with torch.no_grad():
                y = fastattn.ffn(*args[:5], activation=activation, dropout=p, seed=seed, backend=backend)
            assert_accurate({"y": y}, yardstick)


@pytest.mark.parametrize("columns", [24, 72, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_elements_are_the_contract_s(backend, columns):
    """By identities in the place of the weights the hidden layer and its gradient come out as they are."""
    device, p = device_of(backend), 0.4
    x = torch.rand(3, 7, columns, device=device) + 1
    one = torch.eye(columns, device=device)
    kept = drop_of(x, columns, 5, p, FFN_HIDDEN).kept.view(x.shape)
    result = run_ffn(x, one, None, one, None, x, "relu", backend, dropout=p, seed=5)
    expected = torch.where(kept, x / (1 - p), 0)
    torch.testing.assert_close(result["y"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(result["dx"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [TRITON])
def test_many_tiles(backend, monkeypatch):
    """Rows and columns of several tiles each, and programs of the norm's backward that walk several tiles of rows."""
    from fastattn.kernels.triton import norm

    monkeypatch.setattr(norm, "PARTS", 3)
    device = device_of(backend)
    args = norm_tensors("all", 55, 40, torch.float32, device, False)
    result = run_norm(*args, 1e-5, backend, dropout=0.2, seed=3)
    assert_accurate(result, norm_yardstick(*args, 1e-5, drop=drop_of(args[0], 40, 3, 0.2, LAYER_NORM)))
    args = ffn_tensors(70, 16, 150, torch.float32, device)
    result = run_ffn(*args, "gelu", backend, dropout=0.2, seed=3)
    assert_accurate(result, ffn_yardstick(*args, "gelu", drop_of(args[0], 150, 3, 0.2, FFN_HIDDEN)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, kind):
    layout, device = LAYOUTS[kind], device_of(backend)
    x, residual, weight, bias, dy, dsum = norm_tensors("all", 5, 64, torch.float32, device, False)
    args = layout(x), layout(residual), weight, bias, layout(dy), layout(dsum)
    result = run_norm(*args, 1e-5, backend, dropout=0.3, seed=1)
    assert_accurate(result, norm_yardstick(*args, 1e-5, drop=drop_of(x, 64, 1, 0.3, LAYER_NORM)))
    x, w1, b1, w2, b2, dy = ffn_tensors(5, 64, 40, torch.float32, device)
    args = layout(x), layout(w1), b1, layout(w2), b2, layout(dy)
    result = run_ffn(*args, "gelu", backend, dropout=0.3, seed=1)
    assert_accurate(result, ffn_yardstick(*args, "gelu", drop_of(x, 40, 1, 0.3, FFN_HIDDEN)))


@pytest.mark.parametrize("backend", EAGER)
def test_gradcheck(backend):
    for op in ("add_layer_norm", "add_rms_norm"):
        leaves, call = leaves_and_call(op, backend, torch.float64, (2, 2, 5), seed=11, return_sum=True)
        assert torch.autograd.gradcheck(call, leaves)
    leaves = [leaves[0], *leaves[2:]]
    assert torch.autograd.gradcheck(lambda x, *more: call(x, None, *more), leaves)
    for activation in ACTIVATIONS:
        leaves, call = leaves_and_call("ffn", backend, torch.float64, (2, 2, 5), seed=11, activation=activation)
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_of_p_1(backend):
    device = device_of(backend)
    x, residual, weight, bias, dy, dsum = norm_tensors("all", 5, 33, torch.float32, device, False)
    result = run_norm(x, residual, weight, bias, dy, dsum, 1e-5, backend, dropout=1, seed=0)
    expected = run_norm(residual, None, weight, bias, dy, dsum, 1e-5, backend)
    assert torch.equal(result["sum"], residual) and not result["dx"].any()
    torch.testing.assert_close(result["y"], expected["y"])
    torch.testing.assert_close(result["dresidual"], expected["dx"])
    x, w1, b1, w2, b2, dy = ffn_tensors(5, 16, 40, torch.float32, device)
    result = run_ffn(x, w1, b1, w2, b2, dy, "gelu", backend, dropout=1.0, seed=0)
    assert torch.equal(result["y"], b2.expand_as(result["y"]))
    assert not any(result[name].any() for name in ("dx", "dw1", "db1", "dw2"))


@OPS
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_draws_nothing(backend, op):
    leaves, call = leaves_and_call(op, backend, dropout=0.0, seed=3)
    _, plain = leaves_and_call(op, backend, dropout=0)
    before = torch.get_rng_state()
    assert equal(gradients(call, leaves), gradients(plain, leaves))
    assert torch.equal(torch.get_rng_state(), before)


@OPS
@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds(backend, op):
    """Each call draws its own; manual_seed repeats them; an int and a tensor are the same, in any order of calls."""
    leaves, call = leaves_and_call(op, backend)
    torch.manual_seed(1)
    first, second = gradients(call, leaves), gradients(call, leaves)
    torch.manual_seed(1)
    again = gradients(call, leaves)
    assert equal(first, again) and not torch.equal(first[0], second[0])
    results = []
    for seed in (7, torch.tensor(7), torch.tensor([1, 7, 3])[1:2], -1, 2**64 - 1, 7):
        seed = seed.to(leaves[0].device) if isinstance(seed, torch.Tensor) else seed
        results.append(gradients(leaves_and_call(op, backend, seed=seed)[1], leaves))
    assert all(equal(results[0], results[i]) for i in (1, 2, 5)) and equal(results[3], results[4])
    assert not torch.equal(results[0][0], results[3][0])
    other = gradients(leaves_and_call(op, backend, seed=7, dropout=0.6)[1], leaves)
    assert not torch.equal(other[0], results[0][0])
    flat = [leaf.detach().flatten(0, -2).requires_grad_() if leaf.dim() == 3 else leaf for leaf in leaves]
    y, *grads = gradients(leaves_and_call(op, backend, seed=7)[1], flat)
    assert torch.equal(y.view_as(results[0][0]), results[0][0])
    assert torch.equal(grads[0].view_as(leaves[0]), results[0][1])


@pytest.mark.parametrize("use_reentrant", [False, True])
@OPS
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_draws_the_same_again(backend, op, use_reentrant):
    leaves, call = leaves_and_call(op, backend)
    torch.manual_seed(5)
    expected = gradients(call, leaves)
    torch.manual_seed(5)
    y = checkpoint(call, *leaves, use_reentrant=use_reentrant)
    torch.rand(3)  # what draws in between moves the generator
    y.square().sum().backward()
    assert equal((y, *(leaf.grad for leaf in leaves)), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", [*BACKENDS, CUDA])
def test_recompute_saves_nothing_of_the_hidden_layer(backend, dropout):
    if backend == "cuda" and dropout:
        pytest.skip("its kernels have no dropout")
    saved, results = {False: [], True: []}, {}
    leaves, _ = leaves_and_call("ffn", backend, dtype_of(backend))
    for recompute in (False, True):
        _, call = leaves_and_call("ffn", backend, seed=9, dropout=dropout, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved[recompute]: to.append(t.shape) or t, lambda t: t):
            y = call(*leaves)
        results[recompute] = y, *torch.autograd.grad(y.square().sum(), leaves)
    assert saved[False].count((2, 4, 40)) == 2 and (2, 4, 40) not in saved[True]
    assert equal(results[False], results[True])


@pytest.mark.parametrize("op", ["ffn", "add_layer_norm"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend, compiler, op):
    for options in ({"seed": 4}, {"recompute": True} if op == "ffn" and compiler == "aot_eager" else {}):
        leaves, call = leaves_and_call(op, backend, **options)
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
        for _ in range(2):
            torch.manual_seed(2)
            expected = gradients(call, leaves)
            torch.manual_seed(2)
            torch.testing.assert_close(gradients(compiled, leaves), expected)
            leaves = [torch.cat([leaf, leaf]).detach().requires_grad_() if leaf.dim() == 3 else leaf for leaf in leaves]


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend, self.norm = backend, torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
        self.to(device_of(backend))

    def forward(self, x):
        up, down, norm = self.up, self.down, self.norm
        y = fastattn.ffn(x, up.weight, up.bias, down.weight, down.bias, dropout=0.2, backend=self.backend)
        return fastattn.add_layer_norm(y, x, norm.weight, norm.bias, dropout=0.2, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_exported_for_inference_trains(backend):
    assert_exported_trains(Layer(backend), torch.randn(2, 4, 8, device=device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """ffn is computed in autocast's dtype, norms in their own; what is kept does not depend on it."""
    leaves, call = leaves_and_call("ffn", backend, seed=2)
    x, w1, b1, w2, b2 = (t.detach() for t in leaves)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = call(*leaves)
        norm = fastattn.add_layer_norm(x, x, None, None, dropout=0.3, seed=2, backend=backend)
    args = [t.bfloat16() for t in (x, w1, b1, w2, b2)]
    assert y.dtype == torch.bfloat16
    yardstick = ffn_yardstick(*args, torch.zeros_like(y), "gelu", drop_of(x, 40, 2, 0.3, FFN_HIDDEN))
    assert (y.double() - yardstick.exact["y"]).abs().max() < 0.1
    (y.square().sum()).backward()
    assert all(leaf.grad.dtype == leaf.dtype and leaf.grad.any() for leaf in leaves)
    assert torch.equal(norm, fastattn.add_layer_norm(x, x, None, None, dropout=0.3, seed=2, backend=backend))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, requires_grad):
    ops, device = torch.ops.fastattn, device_of(backend)
    seed = torch.tensor([3], device=device)
    for residual in (True, False):
        x, r, weight, bias, dy, dtotal = norm_tensors("fp32 residual", 3, 16, torch.float16, device, False)
        x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
        r = r if residual else None
        torch.library.opcheck(ops.add_norm_forward.default, (x, r, weight, bias, 1e-5, False, residual, backend, seed, 0.3))
        y, total, mean, rstd = ops.add_norm_forward(x.detach(), r, weight, bias, 1e-5, False, True, backend, seed, 0.3)
        args = (dy, dtotal.to(total.dtype), total, mean, rstd, weight, False, True, True, backend, seed, 0.3)
        torch.library.opcheck(ops.add_norm_backward.default, args)
    x, w1, b1, w2, b2, dy = ffn_tensors(3, 8, 12, torch.float32, device)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
    args = (x, w1, b1, w2, b2, "gelu", True, backend, seed, 0.3, not requires_grad)
    torch.library.opcheck(ops.ffn_forward.default, args)
    _, hidden, z = ops.ffn_forward(x.detach(), *args[1:])
    given = dy, x.detach(), w1, b1, w2, b2, hidden, z
    torch.library.opcheck(ops.ffn_backward.default, (*given, "gelu", [True] * 5, backend, seed, 0.3))


@pytest.mark.parametrize("sizes", [(0, 8, 5), (3, 0, 5), (3, 8, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, sizes):
    args = ffn_tensors(*(max(size, 1) for size in sizes), torch.float32, device_of(backend))
    x, w1, b1, w2, b2, dy = args
    rows, inputs, hidden = sizes
    x, dy = x[:, :rows, :inputs], dy[:, :rows, :inputs]
    w1, b1, w2, b2 = w1[:hidden, :inputs], b1[:hidden], w2[:inputs, :hidden], b2[:inputs]
    for recompute in (False, True):
        result = run_ffn(x, w1, b1, w2, b2, dy, "gelu", backend, dropout=0.5, seed=1, recompute=recompute)
        drop = drop_of(x, hidden, 1, 0.5, FFN_HIDDEN)
        assert_accurate(result, ffn_yardstick(x, w1, b1, w2, b2, dy, "gelu", drop))
    if rows == 0:
        result = run_norm(x, x, None, None, dy, None, 1e-5, backend, dropout=0.5, seed=1)
        assert result["y"].shape == result["dx"].shape == x.shape


@OPS
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_raise(backend, op):
    leaves, call = leaves_and_call(op, backend, seed=1)
    (grad,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", [CUDA])
def test_cuda_refuses_dropout_in_a_sentence(backend):
    leaves, call = leaves_and_call("ffn", backend, torch.float16, seed=1)
    with pytest.raises(NotImplementedError, match="cuda: .*dropout is not in its kernels"):
        call(*leaves)


X, W = torch.zeros(2, 3, 8), torch.zeros(16, 8)
CALLS = {
    "ffn": lambda **options: fastattn.ffn(X, W, None, W.T, None, **options),
    "add_layer_norm": lambda **options: fastattn.add_layer_norm(X, X, None, None, **options),
    "add_rms_norm": lambda **options: fastattn.add_rms_norm(X, X, None, **options),
}


@OPS
@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "dropout must be a probability", {"dropout": 1.5}),
        (ValueError, "dropout must be a probability", {"dropout": -0.1}),
        (ValueError, "dropout must be a probability", {"dropout": float("nan")}),
        (ValueError, "dropout must be a probability", {"dropout": "0.1"}),
        (ValueError, "dropout must be a probability", {"dropout": None}),
        (TypeError, "seed must be None, an int", {"dropout": 0.1, "seed": 1.5}),
        (TypeError, "seed must be None, an int", {"seed": "nothing is drawn, and yet"}),
        (ValueError, "seed must fit 64 bits", {"dropout": 0.1, "seed": 2**64}),
        (ValueError, "seed must be an int or a one-element int64 tensor", {"dropout": 0.1, "seed": torch.zeros(2).long()}),
        (ValueError, "seed must be an int or a one-element int64 tensor", {"dropout": 0.1, "seed": torch.zeros(1)}),
    ],
)
def test_bad_input_raises_a_sentence(op, error, words, options):
    with pytest.raises(error, match=words):
        CALLS[op](**options)


def test_more_bad_input():
    with pytest.raises(TypeError, match="recompute must be True or False"):
        fastattn.ffn(X, W, None, W.T, None, recompute="always")
    with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
        fastattn.add_layer_norm(None, X, None, None, dropout=0.1)
    with pytest.raises(ValueError, match="residual must have x's shape"):
        fastattn.add_layer_norm(X, X[0], None, None, dropout=0.1)


def test_the_rate_is_p():
    """Of 2^20 elements the share that is dropped is within four standard deviations."""
    x = torch.ones(1024, 1024)
    for p in (0.1, 0.5):
        total = fastattn.add_layer_norm(x, None, None, None, dropout=p, seed=0, return_sum=True)[1]
        dropped = (total == 0).float().mean().item()
        assert abs(dropped - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5
        torch.testing.assert_close(total[total != 0], torch.full_like(total[total != 0], 1 / (1 - p)))
        assert F.cosine_similarity((total[0] == 0).float() - p, (total[1] == 0).float() - p, dim=0).abs() < 0.15
