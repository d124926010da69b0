"""The first call computes each layer both ways: what that catches, what it lets pass, and that nothing else is seen of it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import MODELS, build, result, text
from torch import nn

import fastattn
from fastattn.integrations import accelerate_proof
from fastattn.integrations.accelerate import Encoder, Replaced

transformers = pytest.importorskip("transformers")
modeling_bert = pytest.importorskip("transformers.models.bert.modeling_bert")


@pytest.fixture
def errors(monkeypatch):
    """Of each compared layer, as a share of its bound."""
    found = []
    measure = accelerate_proof.relative_error

    def measured(ours, theirs, x, keep):
        error = measure(ours, theirs, x, keep)
        found.append(error / accelerate_proof.bound_of(x))
        return error

    monkeypatch.setattr(accelerate_proof, "relative_error", measured)
    return found


def encoder_of(model):
    settings = (vars(m)["forward"].settings for m in model.modules() if isinstance(vars(m).get("forward"), Replaced))
    return next(x for x in settings if isinstance(x, Encoder))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, "autocast"])
def test_rounding_passes(dtype, implementation, errors):
    """Large weights, wide layers and hot scores; within a half of what is allowed, so that another machine has room."""
    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024, vocab_size=60, initializer_range=0.3
    )
    model = transformers.BertModel(config).eval()
    model.set_attn_implementation(implementation)
    model = model if dtype == "autocast" else model.to(dtype)
    fastattn.accelerate(model, strict=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        model(**text())
    assert len(errors) == 3 and max(errors) < 0.5, errors


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_proven_once(name, errors):
    model = build(name).eval()
    handle = fastattn.accelerate(model, strict=True)
    with torch.inference_mode():
        model(**text())
    layers = len(errors)
    assert layers == 2 and max(errors) < 0.5 and not encoder_of(model).unproven
    model(**text("left"))
    assert len(errors) == layers
    handle.refresh()
    model(**text())
    assert len(errors) == 2 * layers


def halved(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """An attention function of somebody's, under a name of its own."""
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.transpose(1, 2) * 0.5, None


def another_order(self, attention_output):
    """The activation behind the second linear, in a method that nobody compares."""
    hidden = self.intermediate.dense(attention_output)
    return self.output(hidden, attention_output)


def registered(model, monkeypatch):
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "halved", halved)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "halved", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("halved")


def a_method(model, monkeypatch):
    monkeypatch.setattr(modeling_bert.BertLayer, "feed_forward_chunk", another_order)


def an_activation(model, monkeypatch):
    """Of the class that is known, but not what it computes."""
    cls = type(model.encoder.layer[0].intermediate.intermediate_act_fn)
    monkeypatch.setattr(model.encoder.layer[1].intermediate.intermediate_act_fn, "act", F.relu)
    assert cls.__name__ == "GELUActivation"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seeded", [registered, a_method, an_activation])
def test_what_differs_is_left(seeded, training, monkeypatch):
    model = build("bert").train(training)
    seeded(model, monkeypatch)
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model)
    torch.testing.assert_close(result(model, text()), result(plain, text()), rtol=2e-5, atol=2e-5)
    assert torch.equal(result(model, text()), result(plain, text()))
    [(name, why)] = handle.report.left.items()
    assert name == f"encoder.layer.{1 if seeded is an_activation else 0}" and "differs from its own code by" in why
    assert list(handle.report.fallbacks.values()) == [2] and why in str(handle.report)
    handle.restore()
    fastattn.accelerate(model, strict=True)
    with pytest.raises(NotImplementedError, match="differs from its own code"):
        model(**text())
    fastattn.restore(model)
    fastattn.accelerate(model, strict=True, prove=False)
    assert not torch.allclose(result(model, text()), result(plain, text()), atol=1e-4)


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.GELU(), nn.ReLU(), nn.SiLU()], ids=str)
def test_activations_of_torch(activation):
    """PyTorch's GELU is of two kinds, which one class has."""
    model = build("bert").eval()
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = activation
    plain = copy.deepcopy(model)
    fastattn.accelerate(model, strict=True, prove=False)
    torch.testing.assert_close(result(model, text()), result(plain, text()), rtol=2e-5, atol=2e-5)


def test_another_attention_function_after_the_first_call(monkeypatch):
    model = build("bert").eval()
    handle = fastattn.accelerate(model)
    plain = copy.deepcopy(model)
    fastattn.restore(plain)
    result(model, text())
    for m in (model, plain):
        registered(m, monkeypatch)
    for _ in range(2):
        torch.testing.assert_close(result(model, text()), result(plain, text()), rtol=2e-5, atol=2e-5)
    assert handle.report.left
    for m in (model, plain):
        m.set_attn_implementation("sdpa")
    torch.testing.assert_close(result(model, text()), result(plain, text()), rtol=2e-5, atol=2e-5)
    assert not handle.report.left and sum(handle.report.fallbacks.values()) == 2


@pytest.mark.parametrize("precision", ["none", "ieee", "tf32", "bf16"])
def test_the_bound_follows_pytorch_s_switch(precision, errors):
    """And asks for it in the one way that does not raise where users set it in the other."""
    switch = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, precision
    try:
        model = build("bert").eval()
        fastattn.accelerate(model, strict=True)
        model(**text())
        bound = accelerate_proof.bound_of(torch.zeros(1))
    finally:
        switch.fp32_precision = before
    assert max(errors) < 0.5 and bound == {"tf32": 2**-8, "bf16": 2**-5}.get(precision, 2**-15)


def test_only_real_tokens_count():
    """One of them that is wrong is enough, in fp32 by little; what stands at padding is nobody's."""
    x, keep = torch.randn(3, 5, 64), torch.arange(5) < torch.tensor([[5], [2], [0]])
    theirs = x + torch.randn(3, 5, 64)
    at_padding = torch.where(keep[..., None], theirs, torch.nan)
    bound = accelerate_proof.bound_of(x)
    assert accelerate_proof.relative_error(at_padding, theirs, x, keep) == 0
    assert accelerate_proof.relative_error(at_padding, theirs, x, None) == torch.inf
    off = theirs.clone()
    off[1, 1] *= 1 + 1e-4
    assert bound < accelerate_proof.relative_error(off, theirs, x, keep) < 1e-4
    off[1, 1] = torch.nan
    assert accelerate_proof.relative_error(off, theirs, x, keep) == torch.inf
    assert accelerate_proof.relative_error(theirs, off, x, keep) == torch.inf
    assert accelerate_proof.relative_error(off, off, x, keep) == 0
    assert math.isnan(accelerate_proof.relative_error(off, off, x, torch.zeros_like(keep)))  # nothing is proven


def test_a_batch_of_nothing_proves_nothing(errors):
    model = build("bert").eval()
    fastattn.accelerate(model, strict=True)
    model(**text(lengths=(0, 0)))
    assert encoder_of(model).unproven
    model(**text())
    assert not encoder_of(model).unproven


def test_nothing_is_seen_of_it():
    """Modes, gradients and the generator are what they were: the first call, which proves, draws what a later one draws."""
    model = build("bert").train()
    model.encoder.layer[1].eval()
    for m in model.modules():
        if type(m) is nn.Dropout and m is not model.encoder.layer[0].attention.self.dropout:
            m.p = 0.5
    modes = [m.training for m in model.modules()]
    handle = fastattn.accelerate(model, strict=True)
    model.encoder.layer[0].attention.self.dropout.p = 0.0
    inputs, outs = text(lengths=(24, 24)), []
    for unproven in (True, False):
        assert bool(encoder_of(model).unproven) == unproven
        torch.manual_seed(4)
        outs.append((result(model, inputs), torch.get_rng_state()))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled() and not handle.report.fallbacks


def test_autocast_trains_after_it():
    """Casts of weights that were made without gradients are not what the step then uses."""
    model = build("bert")
    plain = copy.deepcopy(model)
    fastattn.accelerate(model, strict=True)
    grads = []
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = result(m, text()).square().sum()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert grads[0].shape == grads[1].shape
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()


def test_a_copy_proves_itself(errors):
    model = build("bert").eval()
    fastattn.accelerate(model, strict=True)
    model(**text())
    copy.deepcopy(model)(**text())
    assert len(errors) == 4
