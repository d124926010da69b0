"""Calls without PyTorch's dispatcher: they give what the ops give, and whatever watches still sees the ops."""

import contextlib

import pytest
import torch
from backends import CUDA, TRITON, device_of, dtype_of, head_dim_of
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import Packing, masks, planned
from fastattn.ops import attention, ffn, linear, norm

OPS = (attention, linear, ffn, norm)
NORM_BACKENDS = ["eager", "cpu", TRITON]  # there is no CUDA kernel of a norm


class Watching(TorchFunctionMode):
    """Sees every function of PyTorch's and changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def crossings(monkeypatch):
    """The names of the ops that are called through the dispatcher."""
    names = []

    def counted(op):
        def call(*args):
            names.append(op.name().split("::")[1])
            return op(*args)

        return call

    for module in OPS:
        for name in ("_FORWARD", "_BACKWARD"):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return names


def normal(*sizes, backend="cpu", dtype=None):
    return torch.randn(*sizes).to(device_of(backend), dtype or dtype_of(backend))


def heads(backend, H=2, L=19, B=2):
    return normal(B, L, H, head_dim_of(backend), backend=backend).transpose(1, 2)


LENGTHS = (11, 19)
MASKS = ("none", "padding", "causal", "keys", "documents", "dense", "all")


def mask_of(name, device):
    lengths, j = torch.tensor(LENGTHS, device=device), torch.arange(19, device=device)
    return {
        "none": lambda: None,
        "padding": lambda: masks.padding(lengths, lengths),
        "causal": masks.causal,
        "keys": lambda: masks.key_padding((j % 5 != 2).expand(2, 19)),
        "documents": lambda: masks.documents((j // 7 - 1).expand(2, 19)),
        "dense": lambda: (j[:, None] * 7 + j) % 3 != 0,
        "all": lambda: masks.window(9, 5) & masks.prefix_lm(lengths // 2) & masks.padding(lengths) & masks.rows(4, 4, 3),
    }[name]()


def attention_request(backend, mask="none", Hkv=2, **options):
    tensors = heads(backend), heads(backend, Hkv), heads(backend, Hkv)
    mask = mask_of(mask, tensors[0].device)
    return lambda q, k, v: fastattn.attention(q, k, v, mask, backend=backend, **options), tensors


def varlen_request(backend, mask=None, cross=False, capacity=None, **options):
    """Self-attention, or with keys of other lengths; with a capacity some rows are of no sequence."""
    device = device_of(backend)
    packing = Packing.from_lengths(torch.tensor(LENGTHS, device=device), 19, capacity)
    keys = Packing.from_lengths(torch.tensor([3, 16], device=device), 16) if cross else packing
    rows = [normal(p.capacity, 2, head_dim_of(backend), backend=backend) for p in (packing, keys, keys)]

    def call(q, k, v):
        key_packing = keys if cross else None
        return fastattn.varlen_attention(q, k, v, packing, mask, key_packing=key_packing, backend=backend, **options)

    return call, rows


def linear_request(backend, activation=None, bias=True, residual=False, K=24):
    tensors = [normal(2, 3, K, backend=backend), normal(32, K, backend=backend)]
    tensors += [normal(32, backend=backend)] * bias + [normal(2, 3, 32, backend=backend)] * residual

    def call(x, weight, *rest):
        given = dict(zip([name for name, there in (("bias", bias), ("residual", residual)) if there], rest, strict=True))
        return fastattn.linear(
            x, weight, given.get("bias"), activation=activation, residual=given.get("residual"), backend=backend
        )

    return call, tensors


def ffn_request(backend, bias=True):
    x, w1, w2 = normal(2, 3, 24, backend=backend), normal(32, 24, backend=backend), normal(24, 32, backend=backend)
    biases = [normal(32, backend=backend), normal(24, backend=backend)] * bias

    def call(x, w1, w2, b1=None, b2=None):
        return fastattn.ffn(x, w1, b1, w2, b2, backend=backend)

    return call, [x, w1, w2, *biases]


def norm_request(backend, rms=False, residual=True, **options):
    tensors = [normal(2, 3, 24, backend=backend), normal(24, backend=backend)]
    tensors += [normal(2, 3, 24, backend=backend)] * residual

    def call(x, weight, residual=None):
        if rms:
            return fastattn.add_rms_norm(x, residual, weight, backend=backend, **options)
        return fastattn.add_layer_norm(x, residual, weight, weight, backend=backend, **options)

    return call, tensors


REQUESTS = {
    **{f"attention, {name}": (attention_request, {"mask": name}) for name in MASKS},
    "attention, grouped heads": (attention_request, {"Hkv": 1}),
    "attention, lse": (attention_request, {"mask": "padding", "return_lse": True}),
    "attention, scale of 1": (attention_request, {"scale": 1}),
    "varlen": (varlen_request, {}),
    "varlen, causal": (varlen_request, {"mask": masks.causal()}),
    "varlen, lse": (varlen_request, {"return_lse": True}),
    "varlen, cross": (varlen_request, {"cross": True}),
    "varlen, rows of no sequence": (varlen_request, {"capacity": 37}),
    "linear": (linear_request, {}),
    "linear without bias": (linear_request, {"bias": False, "activation": "silu"}),
    "linear, gelu": (linear_request, {"activation": "gelu"}),
    "linear, residual": (linear_request, {"activation": "gelu", "residual": True}),
    "linear, residual alone": (linear_request, {"residual": True, "bias": False}),
    "linear, odd": (linear_request, {"activation": "relu", "K": 23}),
    "ffn": (ffn_request, {}),
    "ffn without biases": (ffn_request, {"bias": False}),
}  # fmt: skip
NORMS = {
    "layer norm": (norm_request, {}),
    "layer norm, sum": (norm_request, {"return_sum": True}),
    "layer norm, no residual": (norm_request, {"residual": False, "return_sum": True}),
    "rms norm": (norm_request, {"rms": True}),
    "rms norm, sum": (norm_request, {"rms": True, "return_sum": True}),
}


def outputs_of(found):
    return list(found) if isinstance(found, tuple) else [found]


def forward(call, tensors):
    """Without a gradient, and with one: the results of both and all gradients."""
    with torch.no_grad():
        found = outputs_of(call(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    recorded = outputs_of(call(*leaves))
    torch.manual_seed(1)
    outside = [torch.randn(x.shape).to(x) for x in recorded]
    return [*found, *recorded, *torch.autograd.grad(recorded, leaves, outside)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


CASES = [
    *(pytest.param(backend, *REQUESTS[name], id=f"{name}-{backend}") for name in REQUESTS for backend in ("eager", "cpu")),
    *(pytest.param(backend, *NORMS[name], id=f"{name}-{backend}") for name in NORMS for backend in ("eager", "cpu")),
    *(pytest.param("triton", *r[n], id=f"{n}-triton", marks=TRITON.marks) for r in (REQUESTS, NORMS) for n in r),
    *(pytest.param("cuda", *REQUESTS[name], id=f"{name}-cuda", marks=CUDA.marks) for name in REQUESTS),
]


@pytest.mark.parametrize(("backend", "make", "options"), CASES)
def test_both_ways_give_the_same_bits(crossings, backend, make, options):
    """Without the dispatcher, once the plan is made and when it is found; and by the ops."""
    call, tensors = make(backend, **options)
    first, second = forward(call, tensors), forward(call, tensors)
    assert not crossings
    with Watching():
        by_ops = forward(call, tensors)
    assert len(crossings) == 3  # two forwards and a backward
    assert_same(first, by_ops)
    assert_same(second, by_ops)
    assert_same(forward(call, tensors), by_ops)
    assert len(crossings) == 3


# What watches. Each op as a function of one tensor


def functions():
    torch.manual_seed(7)
    packing, w, g = Packing.from_lengths([3, 4], 4), torch.randn(16, 16), torch.randn(16)
    return {
        "attention": (lambda x: fastattn.attention(x, x, x, masks.causal()), torch.randn(1, 2, 5, 16)),
        "varlen": (lambda x: fastattn.varlen_attention(x, x, x, packing), torch.randn(7, 2, 16)),
        "linear": (lambda x: fastattn.linear(x, w, g, activation="gelu"), torch.randn(3, 16)),
        "ffn": (lambda x: fastattn.ffn(x, w, g, w, None), torch.randn(3, 16)),
        "add_norm": (lambda x: fastattn.add_layer_norm(x, x, g, g), torch.randn(3, 16)),
    }


ops = pytest.mark.parametrize("op", functions())


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def name_of(op):
    return f"fastattn::{'attention' if op == 'varlen' else op}_forward"


@contextlib.contextmanager
def profiled():
    with torch.profiler.profile() as profile:
        yield
    profile.names = {event.name for event in profile.events()}
    assert any(name.startswith("fastattn::") for name in profile.names)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "function mode": Watching,
    "dispatch mode": Names,
    "profiler": profiled,
    "profiler of every thread": lambda: torch.autograd.profiler.profile(use_kineto=True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": default_device,
    "device": lambda: torch.device("cpu"),
}


@ops
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_sees_the_op(crossings, op, mode):
    """And nothing of it is left: a call before, which makes a plan, and calls after it do without."""
    call, x = functions()[op]
    before = call(x)
    assert not crossings
    with MODES[mode]() as context:
        inside = call(x)
    assert [name for name in crossings if name == name_of(op).split("::")[1]]
    if mode == "dispatch mode":
        assert name_of(op) in context.names
    casts = mode == "autocast" and op != "add_norm"
    assert inside.dtype == (torch.bfloat16 if casts else torch.float32) and (casts or torch.equal(inside, before))
    crossings.clear()
    assert torch.equal(call(x), before) and not crossings


@ops
def test_a_profiler_records_the_op(op):
    call, x = functions()[op]
    call(x)
    with torch.profiler.profile() as profile:
        call(x)
    assert name_of(op) in {event.name for event in profile.events()}


def by_vmap(call, x):
    return torch.vmap(call)(x[None])[0]


def by_functionalize(call, x):
    return torch.func.functionalize(call)(x)


@ops
@pytest.mark.parametrize("transform", [by_vmap, by_functionalize])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_transform_reaches_the_op(crossings, op, transform):
    call, x = functions()[op]
    before = call(x)
    assert not crossings
    assert torch.equal(transform(call, x), before) and name_of(op).split("::")[1] in crossings
    crossings.clear()
    assert torch.equal(call(x), before) and not crossings


@ops
def test_what_has_no_rule_raises(op):
    """A derivative by torch.func would need one; without the dispatcher it would be lost."""
    call, x = functions()[op]
    before = call(x)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda y: call(y).sum())(x)
    with pytest.raises(NotImplementedError, match="torch.vmap"):
        torch.vmap(call)(x[None].requires_grad_())
    assert torch.equal(call(x), before)


def by_compile(call, x):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend=backend)(x)
    return out, str(graphs[0].graph)


def by_export(call, x):
    class Module(nn.Module):
        def forward(self, x):
            return call(x)

    exported = torch.export.export(Module(), (x,))
    return exported.module()(x), str(exported.graph)


def by_make_fx(call, x):
    graph = torch.fx.experimental.proxy_tensor.make_fx(call)(x)
    return graph(x), str(graph.graph)


def by_jit_trace(call, x):
    traced = torch.jit.trace(call, (x,), check_trace=False)
    return traced(x), str(traced.graph).replace("fastattn::", "fastattn.")


@ops
@pytest.mark.parametrize("trace", [by_compile, by_export, by_make_fx, by_jit_trace])
@pytest.mark.filterwarnings("ignore")  # of PyTorch's about its tracer
def test_a_trace_holds_the_op(op, trace):
    call, x = functions()[op]
    before, plans = call(x), dict(planned.PLANS)
    out, graph = trace(call, x)
    assert name_of(op).replace("::", ".") in graph and torch.equal(out, before)
    out, _ = trace(lambda y: call(y), x + 1)
    assert torch.equal(out, call(x + 1)) and torch.equal(call(x), before)
    assert all(planned.PLANS[key] is plan for key, plan in plans.items())


@ops
def test_tensors_without_memory(op):
    """Fake and meta tensors go to the op's shapes, whatever plans there are."""
    call, x = functions()[op]
    before = call(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
        assert type(fake) is torch._subclasses.FakeTensor and fake.shape == before.shape and fake.stride() == before.stride()
    if op == "varlen":  # whose packing is on the CPU
        with pytest.raises(ValueError, match="packing on cpu"):
            call(x.to("meta"))
    elif op in ("linear", "ffn", "add_norm"):
        with pytest.raises(ValueError, match="but x is on meta"):
            call(x.to("meta"))
    else:
        assert call(x.to("meta")).is_meta
    assert torch.equal(call(x), before)


class Sub(torch.Tensor):
    """A wrapper that has no memory of its own."""

    seen: list = []

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype)

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.name())
        args, kwargs = tree_map(lambda x: x.x if isinstance(x, Sub) else x, (args, kwargs or {}))
        return tree_map(lambda x: Sub(x) if isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


@ops
def test_a_subclass_is_asked(op):
    call, x = functions()[op]
    before = call(x)
    Sub.seen.clear()
    out = call(Sub(x))
    assert name_of(op) in Sub.seen and type(out) is Sub and torch.equal(out.x, before)
    assert torch.equal(call(x), before)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make", [masks.key_padding, masks.dense, lambda keep: keep], ids=["key_padding", "dense", "tensor"])
def test_a_mask_s_subclass_is_asked(make, warm):
    """Memory that kernels would read is not there."""
    q, keep = torch.randn(2, 2, 8, 16), torch.rand(2, 8) < 0.7
    given, same = (make(x if make is masks.key_padding else x[:, None, None].expand(2, 1, 8, 8)) for x in (Sub(keep), keep))
    expected = fastattn.attention(q, q, q, same)
    if warm:
        fastattn.attention(q, q, q, given)
    Sub.seen.clear()
    out = fastattn.attention(q, q, q, given)
    assert "fastattn::attention_forward" in Sub.seen and torch.equal(out.x, expected)


@ops
def test_derivatives_that_are_not_there_raise(op):
    call, x = functions()[op]
    x = x.requires_grad_()
    before = call(x)
    (grad,) = torch.autograd.grad(before.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        call(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))
    assert torch.equal(call(x), before)


@ops
def test_what_is_saved_goes_through_hooks(crossings, op):
    """And what they give back is what the backward reads, in whatever layout."""
    call, x = functions()[op]
    x = x.requires_grad_()
    packed = []

    def pack(saved):
        packed.append(saved.shape)
        return saved

    def unpack(saved):
        return saved.mT.contiguous().mT if saved.dim() > 1 else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = call(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    assert packed and not crossings
    torch.testing.assert_close(grad, expected)


@ops
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(crossings, op, reentrant):
    call, x = functions()[op]
    x = x.requires_grad_()
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    (checkpoint(call, x, use_reentrant=reentrant).sum()).backward()
    assert torch.equal(x.grad, expected) and not crossings


@ops
def test_results_are_changed_in_place_as_the_op_s_are(op):
    """A recorded result, which of attention is a view and refuses, and one that is not."""
    call, x = functions()[op]

    def changed():
        y = x.clone().requires_grad_()
        return torch.autograd.grad(call(y).mul_(2).add_(1).square().sum(), y)[0]

    for way in (Watching, contextlib.nullcontext):
        with way():
            if op in ("attention", "varlen"):
                with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                    changed()
            else:
                y = x.clone().requires_grad_()
                (expected,) = torch.autograd.grad((call(y) * 2 + 1).square().sum(), y)
                assert torch.equal(changed(), expected)
    before = call(x)
    call(x).zero_()
    assert torch.equal(call(x), before)


@ops
def test_inference_mode_and_back(crossings, op):
    call, x = functions()[op]
    before = call(x)
    with torch.inference_mode():
        inside = call(x)
        assert inside.is_inference() and torch.equal(inside, before)
        assert torch.equal(call(x.clone()), before)
    y = x.clone().requires_grad_()
    assert torch.equal(call(y), before) and call(y).requires_grad and not crossings
