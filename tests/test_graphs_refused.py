"""Calls that are not captured as CUDA graphs: they run as they are, and the reason is counted. A capture is pretended."""

import enum
from collections import OrderedDict

import pytest
import torch
from pretended_graphs import on_host
from test_graphs import Small, assert_equal, x
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.graphs import graphed


@pytest.fixture
def model():
    return Small().eval()


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class WatchingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def hooked(model):
    model.linear.register_forward_hook(lambda *_: None)


def hooked_before(model):
    model.register_forward_pre_hook(lambda *_: None)


def hooked_in_a_new_dict(model):
    """As hooks are often cleared."""
    model.norm._forward_hooks = OrderedDict()
    model.norm.register_forward_hook(lambda *_: None)


REFUSED = {
    "training mode": nn.Module.train,
    "hooks inside": hooked,
    "hooks ": hooked_before,
    "which a replay would not run": hooked_in_a_new_dict,
}


@pytest.mark.parametrize("words", REFUSED)
@torch.no_grad()
def test_a_model_that_is_not_captured(capturing, model, words):
    call, given = graphed(model), x()
    call(given)
    REFUSED[words](model)
    assert_equal(call(given), model(given))
    (why,) = call.not_captured
    assert words in why and capturing.replays == 1


def test_a_part_in_training_mode(capturing, model):
    model.norm.train()
    call = graphed(model)
    with torch.no_grad():
        call(x())
    assert list(call.not_captured) == ["the model is in training mode"]
    model.eval()
    with torch.no_grad():
        call(x())
    assert capturing.captures == 1


def test_global_hooks(capturing, model):
    call, given = graphed(model), x()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with torch.no_grad():
            call(given)
    finally:
        handle.remove()
    assert "hooks on every module" in next(iter(call.not_captured)) and not capturing.captures


def test_gradients(capturing, model):
    """Wanted where grad mode is on and a weight or an input requires one; a call after that is still right."""
    call, given = graphed(model), x()
    call(given)["y"].sum().backward()
    assert model.linear.weight.grad is not None and not capturing.captures
    assert "a gradient may be wanted" in next(iter(call.not_captured))
    model.requires_grad_(False)
    call(given)
    assert capturing.captures == 1
    given.requires_grad_()
    call(given)["y"].sum().backward()
    assert given.grad is not None and capturing.replays == 1


@torch.no_grad()
def test_modes_and_transformations(capturing, model):
    call, given = graphed(model), x()
    with Watching():
        call(given)
    with WatchingDispatch():
        call(given)
    torch.func.vmap(lambda row: call(row[None])["y"])(given)
    with torch.autograd.forward_ad.dual_level():
        call(given)
    assert sum(call.not_captured.values()) == 4 and not capturing.captures
    with torch.device("cpu"):  # is a mode too, of functions that make tensors alone
        call(given)
    assert capturing.captures == 1


@torch.no_grad()
def test_inputs_that_are_not_captured(capturing, model):
    call = graphed(model.forward)
    for given in (x().as_subclass(Own), on_host(x()), x(0)):
        call(given)
    call(x(), name=torch.float32)
    assert list(call.not_captured) == [
        "an input is a Own",
        "only calls on a CUDA device are captured, and this one is on cpu",
        "an input is empty",
        "an input is a dtype",
    ]
    call(x(), name="a")
    assert capturing.captures == 1


@torch.no_grad()
def test_traced_and_compiled(capturing, model):
    call, given = graphed(model.requires_grad_(False)), x()
    torch.jit.trace(lambda y: call(y)["y"], (given,), check_trace=False)
    compiled = torch.compile(lambda y: call(y)["y"], backend="eager")
    torch.testing.assert_close(compiled(given), model(given)["y"])
    assert list(call.not_captured) == ["it is traced or compiled"] and not capturing.captures


@torch.no_grad()
def test_inside_a_capture_nothing_is_captured(capturing, model, monkeypatch):
    inner = graphed(model)
    outer = graphed(Around(inner, model))
    given = x()
    for _ in range(2):
        assert torch.equal(outer(given), model(given)["y"] + 1)
    assert capturing.captures == 1 and "part of another capture" in next(iter(inner.not_captured))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    inner.not_captured.clear()
    inner(given)
    assert "part of another capture" in next(iter(inner.not_captured))


class Around(nn.Module):
    def __init__(self, call, model):
        super().__init__()
        self.call, self.model = call, model
        self.eval()

    def forward(self, given):
        return self.call(given)["y"] + 1


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again(capturing, model, caplog):
    call, given = graphed(model), x()
    capturing.fails = "its capture failed with RuntimeError: no"
    for _ in range(2):
        assert_equal(call(given), model(given))
    assert call.not_captured == {capturing.fails: 2} and caplog.text.count("no") == 1
    capturing.fails = None
    call(x(5))
    assert capturing.captures == 1


@torch.no_grad()
def test_what_a_call_itself_raises_is_raised(capturing, model):
    with pytest.raises(RuntimeError, match="mat1 and mat2|shape"):
        graphed(model)(torch.randn(3, 7))


@torch.no_grad()
def test_an_output_of_some_other_kind(capturing):
    class Other(nn.Module):
        def forward(self, y):
            return {y.shape: y, "what": object()}["what"]

    call = graphed(Other().eval())
    assert type(call(x())) is object and call.not_captured == {"its output holds a object": 1}


@torch.no_grad()
def test_a_plain_value_of_a_class_of_its_own(capturing):
    class Two(enum.IntEnum):
        A = 2

    class Tells(nn.Module):
        def forward(self, y):
            return {"y": y + 1, "how": Two.A}

    call = graphed(Tells().eval())
    for _ in range(2):
        assert call(x())["how"] is Two.A
    assert capturing.replays == 2


def test_bad_arguments(model):
    with pytest.raises(TypeError, match="call must be a torch.nn.Module or a method of one, got function"):
        graphed(lambda y: y)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        graphed(model, limit=0)
    with pytest.raises(TypeError, match="limit must be a number of graphs, got True"):
        graphed(model, limit=True)


def test_on_a_cpu_nothing_is_captured(model):
    call, given = graphed(model), x()
    with torch.no_grad():
        assert_equal(call(given), model(given))
    assert call.not_captured == {"only calls on a CUDA device are captured, and this one is on cpu": 1}
