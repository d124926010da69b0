"""ffn with gated activations: every backend against the fp64 specification, and as a PyTorch operator."""

import pytest
import torch
import torch.nn.functional as F
from backends import CUDA, TRITON, device_of
from exported import assert_exported_trains
from guarded import assert_no_read_beyond_the_end
from layouts import LAYOUTS
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.activations import ACTIVATIONS, GATED
from fastattn.dropout import FFN_HIDDEN, kept_elements
from fastattn.reference import Drop
from fastattn.testing import assert_accurate, run_ffn
from fastattn.testing_elements import gated_ffn_yardstick

BACKENDS = ["eager", "cpu", TRITON]
EAGER = ["eager", "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 16, 24), (9, 33, 17), (20, 24, 136), (17, 40, 129)]  # rows of each of two batches, inputs, hidden


def tensors(rows, inputs, hidden, dtype, device="cpu", bias=True):
    """x, w1, b1, w2, b2 and dy."""
    x, dy = torch.randn(2, rows, inputs), torch.randn(2, rows, inputs)
    w1, w2 = torch.randn(2 * hidden, inputs) / max(inputs, 1) ** 0.5, torch.randn(inputs, hidden) / max(hidden, 1) ** 0.5
    b1, b2 = (torch.randn(2 * hidden), torch.randn(inputs)) if bias else (None, None)
    return [None if t is None else t.to(device, dtype) for t in (x, w1, b1, w2, b2, dy)]


def drop_of(x, hidden, seed, p):
    """The specification's form of what is kept, for the rows of x."""
    return Drop(kept_elements(torch.tensor([seed], device=x.device), x.shape[:-1].numel(), hidden, p, FFN_HIDDEN), p)


def leaves_and_call(backend, dtype=torch.float32, sizes=(4, 8, 40), **options):
    """Tensors that require a gradient, and ffn as a function of them."""
    options = {"activation": "geglu", "backend": backend, **options}
    leaves = [t.requires_grad_() for t in tensors(*sizes, dtype, device_of(backend))[:5]]
    return leaves, lambda *leaves: fastattn.ffn(*leaves, **options)


def gradients(call, leaves):
    y = call(*leaves)
    return y, *torch.autograd.grad(y.square().sum(), leaves)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_specification(backend, dtype, activation, dropout):
    turn = list(GATED).index(activation) + DTYPES.index(dtype)
    for n, shape in enumerate(SHAPES):
        if backend not in EAGER and (n + turn) % 2:
            continue  # two shapes of each, in turn
        args, seed = tensors(*shape, dtype, device_of(backend), bias=(n + turn) % 3 > 0), 11 - 40 * n
        yardstick = gated_ffn_yardstick(*args, activation, drop_of(args[0], shape[2], seed, dropout) if dropout else None)
        options = {"dropout": dropout, "seed": seed if dropout else None}
        assert_accurate(run_ffn(*args, activation, backend, **options), yardstick)
        with torch.no_grad():
            y = fastattn.ffn(*args[:5], activation=activation, backend=backend, **options)
        assert_accurate({"y": y}, yardstick)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_half_is_activated_by_the_named_function(backend, name):
    """By products with matrices of one element: no flavour of GELU, and no other order of the halves, passes for another."""
    a, b = torch.linspace(-6, 6, 201), torch.linspace(3, -2, 201)
    x, device = torch.stack([a, b], -1), device_of(backend)
    w1, w2 = torch.eye(2, device=device), torch.ones(1, 1, device=device)
    y = fastattn.ffn(x.to(device), w1, None, w2, None, activation=name, backend=backend)[:, 0]
    a, b = a.double(), b.double()
    expected = (
        b
        * {
            "geglu": a * 0.5 * (1 + torch.erf(a / 2**0.5)),
            "geglu_tanh": 0.5 * a * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))),
            "swiglu": a / (1 + torch.exp(-a)),
        }[name]
    )
    assert (y.double().cpu() - expected).abs().max() < 32 * 2.0**-24 * 18


@pytest.mark.parametrize("backend", EAGER)
def test_agrees_with_transformers(backend):
    """T5 1.1's feed-forward layer, of two matrices, and ModernBERT's, of one."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    x = torch.randn(2, 5, 16)
    config = t5.T5Config(d_model=16, d_ff=24, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    layer = t5.T5DenseGatedActDense(config)
    w1 = torch.cat([layer.wi_0.weight, layer.wi_1.weight])
    y = fastattn.ffn(x, w1, None, layer.wo.weight, None, activation="geglu_tanh", backend=backend)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
    layer = modernbert.ModernBertMLP(modernbert.ModernBertConfig(hidden_size=16, intermediate_size=24, mlp_dropout=0.0))
    y = fastattn.ffn(x, layer.Wi.weight, layer.Wi.bias, layer.Wo.weight, layer.Wo.bias, activation="geglu", backend=backend)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped(backend):
    """What is kept is the public draw of the hidden layer, bit by bit, forward, backward and recomputed."""
    hidden, p, seed, device = 70, 0.4, 5, device_of(backend)
    x, one = torch.ones(3, 7, 1, device=device), torch.ones(hidden, 1, device=device)
    w1, w2 = torch.cat([one * 20, one]).requires_grad_(), torch.eye(hidden, device=device)
    kept = kept_elements(torch.tensor([seed]), 21, hidden, p, FFN_HIDDEN).view(3, 7, hidden).to(device)
    for recompute in (False, True):
        y = fastattn.ffn(x, w1, None, w2, None, activation="swiglu", dropout=p, seed=seed, recompute=recompute, backend=backend)
        torch.testing.assert_close(y, torch.where(kept, 20 / (1 - p), 0), rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(y.sum(), w1)  # of the factor 20 / (1 - p) for each row in which it is kept
        torch.testing.assert_close(grad[hidden:, 0], kept.sum((0, 1)) * (20 / (1 - p)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("backend", EAGER)
def test_gradcheck(backend, activation):
    for options in ({}, {"dropout": 0.3, "seed": 11}, {"dropout": 0.3, "seed": 11, "recompute": True}):
        leaves, call = leaves_and_call(backend, torch.float64, (2, 3, 5), activation=activation, **options)
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, kind):
    layout = LAYOUTS[kind]
    x, w1, b1, w2, b2, dy = tensors(5, 64, 40, torch.float32, device_of(backend))
    args = layout(x), layout(w1), b1, layout(w2), b2, layout(dy)
    result = run_ffn(*args, "geglu", backend, dropout=0.3, seed=1)
    assert_accurate(result, gated_ffn_yardstick(*args, "geglu", drop_of(x, 40, 1, 0.3)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_saves_nothing_of_the_hidden_layer(backend, dropout):
    saved, results = {False: [], True: []}, {}
    leaves, _ = leaves_and_call(backend)
    for recompute in (False, True):
        _, call = leaves_and_call(backend, seed=9, dropout=dropout, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved[recompute]: to.append(t.shape) or t, lambda t: t):
            y = call(*leaves)
        results[recompute] = y, *torch.autograd.grad(y.square().sum(), leaves)
    assert {(2, 4, 40), (2, 4, 80)} <= set(saved[False]) and not {(2, 4, 40), (2, 4, 80)} & set(saved[True])
    assert equal(results[False], results[True])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_gets_a_gradient(backend):
    for wanted in range(5):
        args = tensors(3, 8, 12, torch.float32, device_of(backend))[:5]
        args[wanted].requires_grad_()
        fastattn.ffn(*args, activation="swiglu", backend=backend).sum().backward()
        assert [t.grad is not None for t in args] == [i == wanted for i in range(5)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_call_leaves_behind_serves_no_other(backend):
    """Other activations, rows, widths and dtypes between two rounds of the same calls, the second of which finds plans."""
    device, given = device_of(backend), []
    for name in (*GATED, "gelu"):
        for dtype, shape in ((torch.float32, (4, 8, 12)), (torch.float32, (3, 8, 12)), (torch.float16, (4, 8, 24))):
            x, w1, b1, w2, b2, dy = tensors(*shape, dtype, device)
            half = shape[2]
            given.append((x, w1[:half], b1[:half], w2, b2, dy, name) if name == "gelu" else (x, w1, b1, w2, b2, dy, name))
    first = [run_ffn(*args, backend) for args in given]
    for args, before in zip(given, first, strict=True):
        again = run_ffn(*args, backend)
        assert all(torch.equal(again[name], before[name]) for name in before)
        if args[-1] != "gelu":
            assert_accurate(again, gated_ffn_yardstick(*args))


@pytest.mark.parametrize("sizes", [(0, 8, 5), (3, 0, 5), (3, 8, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, sizes):
    args = tensors(*sizes, torch.float32, device_of(backend))
    for options in ({}, {"dropout": 0.5, "seed": 1}, {"recompute": True}):
        drop = drop_of(args[0], sizes[2], 1, 0.5) if "dropout" in options else None
        assert_accurate(run_ffn(*args, "swiglu", backend, **options), gated_ffn_yardstick(*args, "swiglu", drop))


@pytest.mark.parametrize("backend", [TRITON])
def test_no_read_beyond_the_end(backend):
    assert_no_read_beyond_the_end("gated")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, requires_grad):
    ops, device = torch.ops.fastattn, device_of(backend)
    x, w1, b1, w2, b2, dy = tensors(3, 8, 12, torch.float32, device)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(requires_grad)
    w2 = w2.T.contiguous().T
    for drop in ((None, 0.0), (torch.tensor([3], device=device), 0.3)):
        args = (x, w1, b1, w2, b2, "geglu_tanh", True, backend, *drop)
        for recompute in (False, True):
            torch.library.opcheck(ops.ffn_forward.default, (*args, recompute))
        _, hidden, z = ops.ffn_forward(x.detach(), *args[1:])
        given = dy, x.detach(), w1, b1, w2, b2, hidden, z
        for needs in ([True] * 5, [False, True, False, False, True]):
            torch.library.opcheck(ops.ffn_backward.default, (*given, "geglu_tanh", needs, backend, *drop))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend, compiler):
    for options in ({}, {"dropout": 0.3, "seed": 4}, {"recompute": True, "dropout": 0.3} if compiler == "aot_eager" else {}):
        leaves, call = leaves_and_call(backend, **options)
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
        for _ in range(2):
            torch.manual_seed(2)
            expected = gradients(call, leaves)
            torch.manual_seed(2)
            torch.testing.assert_close(gradients(compiled, leaves), expected)
            leaves = [torch.cat([leaves[0]] * 2).detach().requires_grad_(), *leaves[1:]]


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend, self.up, self.down = backend, torch.nn.Linear(8, 48), torch.nn.Linear(24, 8)
        self.to(device_of(backend))

    def forward(self, x):
        up, down = self.up, self.down
        given = x, up.weight, up.bias, down.weight, down.bias
        return fastattn.ffn(*given, activation="geglu", dropout=0.2, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_exported_for_inference_trains(backend):
    assert_exported_trains(Layer(backend), torch.randn(2, 4, 8, device=device_of(backend)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_draws_the_same_again(backend, use_reentrant):
    leaves, call = leaves_and_call(backend, dropout=0.3)
    torch.manual_seed(5)
    expected = gradients(call, leaves)
    torch.manual_seed(5)
    y = checkpoint(call, *leaves, use_reentrant=use_reentrant)
    torch.rand(3)  # what draws in between moves the generator
    y.square().sum().backward()
    assert equal((y, *(leaf.grad for leaf in leaves)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    leaves, call = leaves_and_call(backend, dropout=0.3, seed=2)
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        y = call(*leaves)
    half = [t.detach().bfloat16() for t in leaves]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, fastattn.ffn(*half, activation="geglu", dropout=0.3, seed=2, backend=backend))
    y.square().sum().backward()
    assert all(leaf.grad.dtype == leaf.dtype and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_and_forward_mode_raise(backend, recompute):
    leaves, call = leaves_and_call(backend, recompute=recompute)
    (grad,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
    x, *rest = (leaf.detach() for leaf in leaves)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        call(torch.autograd.forward_ad.make_dual(x, x), *rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeat_runs_are_bit_equal(backend):
    args = tensors(70, 24, 40, torch.float32, device_of(backend))
    first, second = run_ffn(*args, "geglu", backend), run_ffn(*args, "geglu", backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", [CUDA])
def test_cuda_refuses_in_a_sentence(backend):
    x, w1, b1, w2, b2, _ = tensors(3, 32, 64, torch.float16, device_of(backend))
    with pytest.raises(NotImplementedError, match="cuda: activation 'swiglu' is not in its kernels"):
        fastattn.ffn(x, w1, b1, w2, b2, activation="swiglu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_of_one_row_is_served_by_plain_pytorch(backend, monkeypatch):
    """A function and its derivative, and a name of the gate, are all that eager and cpu need; kernels refuse by name."""
    monkeypatch.setitem(ACTIVATIONS, "mish", (F.mish, torch.ops.aten.mish_backward))
    monkeypatch.setitem(GATED, "mishglu", "mish")
    args = tensors(9, 16, 24, torch.float32, device_of(backend))
    if backend in EAGER:
        assert_accurate(run_ffn(*args, "mishglu", backend), gated_ffn_yardstick(*args, "mishglu"))
    else:
        with pytest.raises(NotImplementedError, match="activation 'mishglu' is not in its kernels"):
            run_ffn(*args, "mishglu", backend)


X, W, V = torch.zeros(2, 3, 8), torch.zeros(10, 8), torch.zeros(8, 5)


def gate(w1=W, b1=None, w2=V, b2=None, dtype=torch.float32, **options):
    return fastattn.ffn(X.to(dtype), w1, b1, w2, b2, **{"activation": "geglu", **options})


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "activation 'geglu' multiplies .* only ffn .* one of", lambda: fastattn.linear(X, W, activation="geglu")),
        (ValueError, "activation 'swiglu' multiplies", lambda: fastattn.explain_linear(X, W, activation="swiglu")),
        (ValueError, "activation must be .* silu, geglu", lambda: gate(activation="glu")),
        (ValueError, "activation must be a name", lambda: gate(activation=None)),
        (ValueError, "w1 must have an even number of rows.* 9", lambda: gate(W[:9])),
        (ValueError, "w2 must have half as many columns as w1 has rows, 4", lambda: gate(W[:8])),
        (ValueError, r"w2 must have shape \(F, 5\)", lambda: gate(w2=V[0])),
        (ValueError, r"w2 must have shape \(F, 10\)", lambda: gate(activation="gelu")),
        (ValueError, r"b1 must have shape \(10,\)", lambda: gate(b1=W[:5, 0])),
        (ValueError, r"b2 must have shape \(8,\)", lambda: gate(b2=W[:5, 0])),
        (TypeError, "w2 must be a tensor, got NoneType", lambda: gate(w2=None)),
        (TypeError, "w1 must be a tensor, got NoneType", lambda: gate(None)),
        (NotImplementedError, "triton: .*fp64", lambda: gate(W.double(), w2=V.double(), dtype=torch.float64, backend="triton")),
        (ValueError, "dropout must be a probability", lambda: gate(dropout=2)),
        (TypeError, "recompute must be True or False", lambda: gate(recompute=1)),
    ],
)  # fmt: skip
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
