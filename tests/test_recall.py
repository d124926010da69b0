"""Calls after others: what is remembered of one serves no other that differs in anything that matters."""

import pytest
import torch
from backends import TRITON, device_of
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fastattn
from fastattn import planned

BACKENDS = ["cpu", TRITON]
WIDTH, HIDDEN = 32, 48
OPS = {
    "linear": (fastattn.linear, "activation", [(HIDDEN, WIDTH), (HIDDEN,)], (2, 3, HIDDEN)),
    "ffn": (fastattn.ffn, "activation", [(HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)], None),
    "norm": (fastattn.add_layer_norm, None, [(WIDTH,), (WIDTH,)], (2, 3, WIDTH)),
}


def given(op, backend):
    """The function of x, parameters and, where there is one, a residual; and these tensors."""
    function, activation, parameters, residual = OPS[op]
    options = {"backend": backend, **({"activation": "gelu_tanh"} if activation else {})}
    shapes = [(2, 3, WIDTH), *parameters, *([residual] if residual else [])]
    tensors = [torch.randn(shape, device=device_of(backend)) for shape in shapes]

    def call(x, *others):
        if op == "norm":
            weight, bias, residual = others
            return function(x, residual, weight, bias, **options)
        if op == "linear":
            weight, bias, residual = others
            return function(x, weight, bias, residual=residual, **options)
        return function(x, *others, **options)

    return call, tensors


def with_gaps(x):
    """Between rows; of a vector between elements."""
    return torch.stack([x, x + 1], -1)[..., 0] if x.dim() == 1 else torch.cat([x, x + 1], -1)[..., : x.shape[-1]]


def off_by_one(x):
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def part_of_a_complex(x):
    return torch.complex(x, -x).conj().imag


CHANGES = {
    "gaps": with_gaps,
    "columns": lambda x: x.mT.contiguous().mT if x.dim() > 1 else with_gaps(x),
    "address": off_by_one,
    "dtype": torch.Tensor.half,
    "double": torch.Tensor.double,
    "negative": torch._neg_view,
    "imaginary part": part_of_a_complex,
    "meta": lambda x: x.to("meta"),
    "parameter": nn.Parameter,
    "gradient": lambda x: x.clone().requires_grad_(),
    "subclass": lambda x: TwoTensor(x, x),
    "fewer": lambda x: x[:1],
    "other shape": lambda x: x.flatten(),
    "nothing": lambda x: None,
}


def answer(call, tensors):
    """The result, or the error."""
    try:
        found = call(*tensors)
    except Exception as error:
        return type(error), str(error)
    return found.a if isinstance(found, TwoTensor) else found


def same(a, b):
    if isinstance(a, tuple) or isinstance(b, tuple):
        return a == b
    return torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype and (a.grad_fn is None) == (b.grad_fn is None)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_gives_what_it_gives_alone(backend, op, change):
    call, tensors = given(op, backend)
    for place in range(len(tensors)):
        other = [CHANGES[change](x) if i == place else x for i, x in enumerate(tensors)]
        planned.PLANS.clear()
        alone = answer(call, other)
        for first, second in ((tensors, other), (other, tensors)):
            planned.PLANS.clear()
            before = answer(call, first)
            assert same(answer(call, second), alone if second is other else answer(call, tensors))
            assert same(answer(call, first), before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows(backend, op):
    """Their number and dimensions are the call's own; a residual has x's."""
    call, tensors = given(op, backend)
    fixed = len(OPS[op][2])

    def rows(x, *lead):
        return torch.randn(*lead, x.shape[-1], device=x.device)

    for first in ((2, 3), (7,), (1, 1)):
        for second in ((2, 3), (3, 2), (5,), (0, 3), (2, 2, 2), ()):
            changed = [rows(x, *second) if i in (0, fixed + 1) else x for i, x in enumerate(tensors)]
            planned.PLANS.clear()
            alone = answer(call, changed)
            call(*(rows(x, *first) if i in (0, fixed + 1) else x for i, x in enumerate(tensors)))
            assert same(answer(call, changed), alone)
    if OPS[op][3]:
        residual = rows(tensors[-1], 3, 2)
        assert answer(call, [*tensors[:-1], residual])[0] is ValueError


@pytest.mark.parametrize("op", ["linear", "ffn", "norm"])
def test_recall_asks_where_tensors_lie(op):
    """No guard knows addresses, nor whether rows of any number are contiguous."""
    call, tensors = given(op, "cpu")
    call(*tensors)
    module = {"linear": fastattn.ops.linear, "ffn": fastattn.ops.ffn, "norm": fastattn.ops.norm}[op]

    def found(x, *others):
        if op == "norm":
            weight, bias, residual = others
            return planned.recall(*module._request(x, residual, weight, bias, 1e-12, False, False, "cpu"))
        return planned.recall(*module._request(x, *others, "gelu_tanh", "cpu"))

    assert found(*tensors) and found(*(x.clone() for x in tensors))
    for place in range(len(tensors)):
        for change in (with_gaps, off_by_one):
            assert not found(*(change(x) if i == place else x for i, x in enumerate(tensors)))


@pytest.mark.parametrize("op", OPS)
def test_a_call_that_is_remembered_makes_no_key(op, monkeypatch):
    call, tensors = given(op, "cpu")
    with torch.no_grad():
        first = call(*tensors)
        monkeypatch.setattr(planned, "layout", None)
        for module in (fastattn.ops.linear, fastattn.ops.ffn, fastattn.ops.norm):
            monkeypatch.setattr(module, "_look_up", None)
        assert torch.equal(call(*tensors), first)


@pytest.mark.parametrize("op", OPS)
def test_what_watches_sees_a_remembered_call(op):
    """A mode, autocast, forward mode; and without any, inference mode and gradients are told apart."""
    call, tensors = given(op, "cpu")
    plain = call(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(*tensors), plain) == (op == "norm")
    with torch.inference_mode():
        assert call(*tensors).is_inference()
    assert not call(*tensors).is_inference()
    assert call(tensors[0].requires_grad_(), *tensors[1:]).requires_grad
    with torch.no_grad():
        assert not call(*tensors).requires_grad
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(call(*tensors), torch._subclasses.FakeTensor)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        call(*tensors)
    assert any(event.key.startswith("fastattn::") for event in profile.key_averages())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        call(torch.autograd.forward_ad.make_dual(tensors[0].detach(), tensors[0].detach()), *tensors[1:])
    with torch.no_grad():
        assert torch.equal(call(*tensors), plain)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_layout(backend, op):
    """Through one forward, gradients that lie in different ways, each with what the others left behind."""
    call, tensors = given(op, backend)
    leaves = [x.requires_grad_() for x in tensors]
    y = call(*leaves)
    dy = torch.randn_like(y)
    kinds = dy, with_gaps(dy), off_by_one(dy), torch._neg_view(-dy), dy.transpose(0, 1).contiguous().transpose(0, 1)
    first, *others = (torch.autograd.grad(y, leaves, kind, retain_graph=True) for kind in (*kinds, *kinds))
    for grads in others:
        for a, b in zip(first, grads, strict=True):
            torch.testing.assert_close(a, b)


def test_precision_is_a_part_of_what_is_remembered(matmul_precision):
    x, w = torch.randn(4, WIDTH), torch.randn(HIDDEN, WIDTH)
    name = ("linear", None, "cpu", True, True, False)
    with torch.no_grad():
        for setting in ("ieee", "tf32", "ieee"):
            matmul_precision.fp32_precision = setting
            fastattn.linear(x, w, backend="cpu")
            fastattn.linear(x, w, backend="cpu")
    assert [precision for _, precision, _ in planned.PLANS[name]] == ["ieee", "tf32"]
