"""Linear layers that are no longer what they seem: pruned, quantized, parametrized, lent other weights, tied."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import (
    assert_close,
    assert_moved,
    assert_named,
    assert_same,
    assert_same_gradients,
    assert_served_again,
    batch,
    bert,
    inferred,
    linears,
    step,
    twins,
)

import fastattn

transformers = pytest.importorskip("transformers")


def one_linear(model):
    return model.encoder.layer[0].intermediate.dense


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned(model):
    for part in linears(model).values():
        prune.l1_unstructured(part, "weight", 0.5)


def pruned_whole_rows(model):
    prune.ln_structured(one_linear(model), "weight", 0.5, n=2, dim=0)


def pruned_by_hand(model):
    prune.custom_from_mask(one_linear(model), "bias", torch.arange(48) % 2)


def spectral(model):
    parametrizations.spectral_norm(one_linear(model))


def weight_normed(model):
    part = parametrizations.weight_norm(one_linear(model))
    part.parametrizations.weight.original0.data.mul_(1.5)


def doubled(model):
    parametrize.register_parametrization(one_linear(model), "weight", Doubled())


def old_spectral(model):
    nn.utils.spectral_norm(one_linear(model))


def doubled_norm(model):
    parametrize.register_parametrization(model.encoder.layer[0].output.LayerNorm, "weight", Doubled())


WAYS = (pruned, pruned_whole_rows, pruned_by_hand, spectral, weight_normed, doubled, old_spectral, doubled_norm)


def put_on(way, model):
    torch.manual_seed(3)
    way(model)


def taken_off(model):
    for part in model.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):
                parametrize.remove_parametrizations(part, name)
        elif prune.is_pruned(part) and isinstance(part, nn.Linear):
            for name in ("weight", "bias"):
                if hasattr(part, f"{name}_mask"):
                    prune.remove(part, name)
        elif hasattr(part, "weight_u"):
            nn.utils.remove_spectral_norm(part)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_put_on_an_accelerated_model_and_taken_off(way):
    plain, ours, handle = twins(bert())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        put_on(way, model)
    assert_moved(before, assert_same(plain, ours))
    for model in (plain, ours):
        step(model, torch.optim.SGD(model.parameters(), lr=0.05), batch())
    assert_same(plain, ours)
    assert_named(handle)
    for model in (plain, ours):
        taken_off(model)
    assert_moved(before, assert_same(plain, ours))
    assert_same_gradients(plain, ours)
    assert_served_again(handle, ours)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_accelerated_when_it_is_on(way):
    plain, ours = bert(), bert()
    for model in (plain, ours):
        put_on(way, model)
    handle = fastattn.accelerate(ours)
    assert_named(handle)
    assert_same(plain, ours)
    assert_same_gradients(plain, ours)
    for model in (plain, ours):
        taken_off(model)
    assert_same(plain, ours)


@pytest.mark.parametrize("inplace", [True, False])
def test_quantized(inplace):
    """Dynamically, to int8: the linear layers are other modules afterwards."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if not torch.backends.quantized.supported_engines:
        pytest.skip("PyTorch has no quantized kernels here")
    plain, ours, handle = twins(bert())
    before = assert_same(plain, ours)
    quantized = [quantization.quantize_dynamic(m, {nn.Linear}, inplace=inplace) for m in (plain, ours)]
    expected, actual = (inferred(m, batch()) for m in quantized)
    assert_close(actual, expected)
    assert_moved(before, expected)
    if inplace:
        assert_named(handle)
    else:
        assert_same(plain, ours)
    ours = copy.deepcopy(quantized[0])
    handle = fastattn.accelerate(ours)
    assert_close(inferred(ours, batch()), expected)
    assert_named(handle)


def test_called_with_other_weights():
    """Of `functional_call`, which lends a module weights for one call: fewer gradients, and nothing kept of them."""
    plain, ours, _ = twins(bert())
    before = assert_same(plain, ours)
    other = {name: p.detach() * 1.5 for name, p in plain.named_parameters()}
    mask = batch()["attention_mask"][..., None]

    def called(model, weights):
        return torch.func.functional_call(model, weights, (), batch()).last_hidden_state * mask

    for _ in range(2):
        with torch.no_grad():
            expected = called(plain, other)
            assert_close(called(ours, other), expected)
        assert_moved(before, expected)
        assert_close(assert_same(plain, ours), before)
    some = {"encoder.layer.1.output.dense.weight": other["encoder.layer.1.output.dense.weight"]}
    with torch.no_grad():
        assert_close(called(ours, some), called(plain, some))
    grads = []
    for model in (plain, ours):
        weights = {name: p.clone().requires_grad_() for name, p in other.items() if "layer" in name}
        loss = called(model, weights).square().mean()
        grads.append(torch.autograd.grad(loss, list(weights.values())))
    for expected, actual in zip(*grads, strict=True):
        assert_close(actual, expected)


def test_gradients_through_a_step_of_training():
    """As in meta-learning to first order: weights that are results of a computation, not leaves."""
    plain, ours, _ = twins(bert())
    mask = batch()["attention_mask"][..., None]
    found = []
    for model in (plain, ours):
        named = dict(model.named_parameters())
        fast = {name: p - 0.1 * p.sign() for name, p in named.items()}
        (torch.func.functional_call(model, fast, (), batch()).last_hidden_state * mask).square().mean().backward()
        found.append({name: p.grad for name, p in named.items() if p.grad is not None})
    assert len(found[0]) > 10 and found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert_close(found[1][name], expected)


def test_tied_to_the_embeddings():
    plain, ours, _ = twins(bert(transformers.BertForMaskedLM))
    before = assert_same(plain, ours)
    for model in (plain, ours):
        step(model, torch.optim.SGD(model.parameters(), lr=0.05, fused=True), batch())
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert_moved(before, assert_same(plain, ours))


def test_tied_between_layers():
    """One weight in two places, before and after the model was accelerated."""

    def tie(model, part):
        first, second = (layer.get_submodule(part) for layer in model.encoder.layer)
        second.weight = first.weight

    model = bert()
    tie(model, "output.dense")
    plain, ours, handle = twins(model)
    assert ours.encoder.layer[0].output.dense.weight is ours.encoder.layer[1].output.dense.weight
    before = assert_same(plain, ours)
    for m in (plain, ours):
        tie(m, "attention.self.value")
    assert_moved(before, assert_same(plain, ours))
    assert_same_gradients(plain, ours)
    for m in (plain, ours):
        step(m, torch.optim.SGD(m.parameters(), lr=0.05, fused=True), batch())
    assert_same(plain, ours)
    assert not handle.report.fallbacks


def test_query_key_and_value_in_one_tensor():
    """Parameters that are views of one buffer, written through it."""
    plain, ours, _ = twins(bert())
    buffers = []
    for model in (plain, ours):
        own = model.encoder.layer[0].attention.self
        whole = torch.cat([own.query.weight, own.key.weight, own.value.weight]).detach()
        for part, weight in zip((own.query, own.key, own.value), whole.chunk(3), strict=True):
            part.weight = nn.Parameter(weight)
        buffers.append(whole)
    before = assert_same(plain, ours)
    for whole in buffers:
        whole.mul_(2)
    assert_moved(before, assert_same(plain, ours))


def test_a_linear_layer_without_a_bias():
    plain, ours, _ = twins(bert())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        for part in linears(model).values():
            part.bias = None
    assert_moved(before, assert_same(plain, ours))
    assert_same_gradients(plain, ours)


def test_a_copy_of_an_accelerated_model_goes_its_own_way():
    plain, ours, handle = twins(bert())
    before = assert_same(plain, ours)
    copies = [copy.deepcopy(m) for m in (plain, ours)]
    for model in copies:
        for part in linears(model).values():
            part.weight.data.mul_(1.5)
    assert_moved(before, assert_same(*copies))
    assert_close(assert_same(plain, ours), before)
    handle.restore()
    assert_same(*copies)
    assert torch.equal(inferred(ours, batch()), inferred(plain, batch()))
