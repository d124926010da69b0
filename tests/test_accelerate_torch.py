"""`accelerate` of models with torch.nn.TransformerEncoder: equal, proven, looked at in each call, and given back."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
from modules import assert_like, perturbed
from torch import nn

import fastattn

PADDING = torch.arange(9) >= torch.tensor([[9], [4], [1]])
SIDES = {"right": PADDING, "left": PADDING.flip(1)}
CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)


class Model(nn.Module):
    def __init__(self, norm_first=False, batch_first=True, dropout=0.0, norm=True, activation="gelu"):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout, activation, batch_first=batch_first, norm_first=norm_first)
        self.inputs = nn.Linear(6, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None, enable_nested_tensor=not norm_first)
        self.batch_first = batch_first

    def forward(self, x, padding=None, mask=None, is_causal=None):
        x = self.inputs(x if self.batch_first else x.transpose(0, 1))
        y = self.encoder(x, mask, padding, is_causal)
        return y if self.batch_first else y.transpose(0, 1)


def models(**options):
    torch.manual_seed(0)
    theirs = perturbed(Model(**options))
    ours = copy.deepcopy(theirs)
    return theirs, ours


@pytest.mark.parametrize("unpad", ["auto", "always", "never"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_and_gradients(batch_first, norm_first, unpad):
    theirs, ours = models(batch_first=batch_first, norm_first=norm_first)
    handle = fastattn.accelerate(ours, strict=True, unpad=unpad)
    x = torch.randn(3, 9, 6)
    for padding in (None, *SIDES.values()):
        for mask, hint in ((None, None), (CAUSAL, True)):
            if mask is not None and padding is SIDES["left"]:
                continue  # the first rows see nothing: torch.nn gives NaN
            keep = 1 if padding is None else ~padding[..., None]
            more = {"padding": padding, "mask": mask, "is_causal": hint}
            assert_like(theirs, ours, lambda m, x, keep=keep, more=more: (m(x, **more) * keep,), {"x": x})
    assert not handle.report.fallbacks and list(handle.report.accelerated) == ["encoder"]
    assert bool(handle.report.padded) == (unpad == "auto")


def test_inference_where_torch_takes_padding_out():
    """Left padding stays, where torch.nn leaves it in."""
    theirs, ours = (model.eval() for model in models(norm=False))
    handle = fastattn.accelerate(ours)
    x = torch.randn(3, 9, 6)
    with torch.no_grad():
        for _ in range(2):
            out = ours(x, PADDING)
            torch.testing.assert_close(out, theirs(x, PADDING), rtol=1e-5, atol=1e-5)  # at padding too, which is 0
            assert not out[PADDING].any() and not handle.report.padded
        torch.testing.assert_close(ours(x, SIDES["left"]), theirs(x, SIDES["left"]), rtol=1e-5, atol=1e-5)
        assert sum(handle.report.padded.values()) == 1


def test_dropout_trains_by_our_draws():
    _, ours = models(dropout=0.3)
    handle, x = fastattn.accelerate(ours, strict=True, unpad="always"), torch.randn(3, 9, 6)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ours(x, PADDING))
    # the first call draws more: it proves the layers, which draws nothing
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    assert all(part.training for part in ours.modules()) and not handle.report.fallbacks
    ours.eval()
    assert torch.equal(ours(x, PADDING), ours(x, PADDING))


def test_weights_may_change_in_any_way():
    theirs, ours = models()
    fastattn.accelerate(ours, strict=True)
    x, layer = torch.randn(3, 9, 6), ours.encoder.layers[0]
    ours(x)

    def same():
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        layer.self_attn.in_proj_weight.mul_(1.5)
        same()
        layer.self_attn.in_proj_weight = nn.Parameter(layer.self_attn.in_proj_weight * 0.5)
        same()
        layer.self_attn.out_proj.weight.data = layer.self_attn.out_proj.weight.data * 0.5
        same()
        layer.linear1 = perturbed(nn.Linear(16, 24), seed=3)
        same()
        ours.load_state_dict({name: x + 0.01 for name, x in ours.state_dict().items()}, assign=True)
        same()
    assert ours.double()(x.double()).dtype == torch.float64


def test_what_is_not_what_it_seems(caplog):
    theirs, ours = models()
    handle, x = fastattn.accelerate(ours), torch.randn(3, 9, 6)
    ours(x)
    seen = []
    hook = ours.encoder.layers[1].linear1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert seen and any("hooks" in why for why in handle.report.fallbacks)
    hook.remove()
    ours(x)
    assert sum(handle.report.fallbacks.values()) == 1
    ours.encoder.layers[1].activation = torch.tanh
    changed = copy.deepcopy(theirs)
    changed.encoder.layers[1].activation = torch.tanh
    torch.testing.assert_close(ours(x), changed(x), rtol=0, atol=0)
    assert any("activation" in why for why in handle.report.fallbacks)

    class Own(nn.TransformerEncoderLayer):
        pass

    other = nn.TransformerEncoder(Own(16, 2, batch_first=True), 2)
    report = fastattn.accelerate(other).report
    assert not report.accelerated and "Own" in report.left[""]
    with pytest.raises(NotImplementedError, match="capacity"):
        fastattn.accelerate(models()[1], strict=True, capacity=40)


@pytest.mark.parametrize("part", ["eps", "activation"])
def test_the_first_call_proves(part, monkeypatch):
    """A twin that computes otherwise is found out, and the encoder's own code runs."""
    from fastattn.integrations import accelerate_torch

    make = accelerate_torch.twin_of

    def wrong(module):
        twin = make(module)
        if part == "activation":
            twin.layers[1].activation = "relu"
        else:
            twin.layers[1].norm1 = nn.LayerNorm(16, eps=0.1)
        return twin

    monkeypatch.setattr(accelerate_torch, "twin_of", wrong)
    theirs, ours = models()
    handle, x = fastattn.accelerate(ours), torch.randn(3, 9, 6)
    for _ in range(2):
        torch.testing.assert_close(ours(x, PADDING), theirs(x, PADDING), rtol=0, atol=0)
    assert "layer 1 differs" in handle.report.left["encoder"] and sum(handle.report.fallbacks.values()) == 2
    strict = copy.deepcopy(theirs)
    fastattn.accelerate(strict, strict=True)
    with pytest.raises(NotImplementedError, match="differs"):
        strict(x)


def test_restored_copied_and_unpickled():
    theirs, ours = models()
    x = torch.randn(3, 9, 6)
    with fastattn.accelerate(ours, strict=True) as handle:
        expected = ours(x)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        twins = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
        for twin in twins:
            with torch.no_grad():
                twin.encoder.layers[0].self_attn.in_proj_weight.zero_()
            assert not torch.allclose(twin(x), expected)
            fastattn.restore(twin)
            assert "forward" not in vars(twin.encoder)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
        handle.refresh()
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
    assert "forward" not in vars(ours.encoder)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_traced_and_under_autocast():
    theirs, ours = (model.eval() for model in models(norm=False))
    fastattn.accelerate(ours, strict=True)
    x, keep = torch.randn(3, 9, 6), ~PADDING[..., None]
    expected = ours(x, PADDING)
    exported = torch.export.export(ours, (x, PADDING)).module()
    torch.testing.assert_close(exported(x, PADDING) * keep, expected * keep, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = ours(x, PADDING), theirs(x, PADDING)
    assert out.dtype == plain.dtype and (out - plain).norm() < 0.02 * plain.norm()


def test_what_stands_at_padding_is_torch_s():
    """With a norm at the end, without torch.nn's fast path, with single layers in training, with frozen weights."""
    x = torch.randn(3, 9, 6)
    for change in ("norm", "switch", "layer", "frozen"):
        theirs, ours = (model.eval() for model in models(norm=change == "norm"))
        fastattn.accelerate(ours, strict=True)
        with contextlib.ExitStack() as stack:
            if change == "switch":
                stack.callback(torch.backends.mha.set_fastpath_enabled, True)
                torch.backends.mha.set_fastpath_enabled(False)
            if change != "frozen":
                stack.enter_context(torch.no_grad())
            for model in (theirs, ours):
                if change == "layer":
                    model.encoder.layers[0].train()
                model.requires_grad_(change != "frozen")
            for _ in range(2):
                torch.testing.assert_close(ours(x, PADDING), theirs(x, PADDING), rtol=1e-5, atol=1e-5)


def test_modes_are_the_module_s():
    _, ours = models(dropout=0.5)
    for layer in ours.encoder.layers:
        layer.eval()
    ours.encoder.layers[1].dropout1.train()
    modes = {name: part.training for name, part in ours.named_modules()}
    handle, x = fastattn.accelerate(ours, strict=True), torch.randn(3, 9, 6)
    assert not torch.equal(ours(x), ours(x))  # by that one
    ours.encoder.layers[1].eval()
    assert torch.equal(ours(x), ours(x))
    ours.encoder.layers[1].dropout1.train()
    handle.restore()
    assert {name: part.training for name, part in ours.named_modules()} == modes


@pytest.mark.parametrize("change", ["part", "method", "class", "functional", "dtype"])
def test_runs_its_own_code(change, monkeypatch):
    theirs, ours = models()
    handle, x = fastattn.accelerate(ours), torch.randn(3, 9, 6)
    ours(x)
    if change == "class":
        monkeypatch.setattr(nn.TransformerEncoderLayer, "_ff_block", lambda self, x: x * 0)
    for model in (theirs, ours):
        if change == "part":
            model.encoder.layers[0].dropout1, model.encoder.layers[1].norm2 = nn.Identity(), nn.Identity()
        elif change == "method":
            model.encoder.layers[0]._ff_block = lambda x: x * 0
    call = functools.partial(lambda model, *args: model(*args))
    if change == "functional":
        weights = {name: p.detach() * 1.1 for name, p in ours.named_parameters()}
        call = lambda model, *args: torch.func.functional_call(model, weights, args)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "dtype"), torch.set_grad_enabled(change != "dtype"):
        out, expected = (call(model.train(change != "dtype"), x) for model in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert out.dtype == expected.dtype and sum(handle.report.fallbacks.values()) == 1
