"""Layers that are frozen, dropped, shared, replaced or put in another order, after the model was accelerated."""

import copy

import pytest
import torch
from torch import nn
from twins import (
    ENCODERS,
    assert_close,
    assert_moved,
    assert_same,
    assert_same_gradients,
    assert_served_again,
    batch,
    bert,
    inferred,
    step,
    twins,
)

import fastattn

transformers = pytest.importorskip("transformers")

LAYERS = {"bert": "encoder.layer", "roberta": "encoder.layer", "distilbert": "transformer.layer", "clip_text": "encoder.layers"}


def layers_of(model, name="bert"):
    return model.get_submodule(LAYERS[name])


def put_back(model, layers, name="bert"):
    path, _, last = LAYERS[name].rpartition(".")
    setattr(model.get_submodule(path), last, nn.ModuleList(layers))


def deleted(model, name):
    del layers_of(model, name)[0]


def sliced(model, name):
    put_back(model, layers_of(model, name)[:1], name)


def reversed_order(model, name):
    put_back(model, reversed(layers_of(model, name)), name)


def swapped_in_place(model, name):
    layers = layers_of(model, name)
    layers[0], layers[1] = layers[1], layers[0]


def shared(model, name):
    layers = layers_of(model, name)
    layers[1] = layers[0]


def appended_again(model, name):
    layers = layers_of(model, name)
    layers.append(layers[0])


def appended_copy(model, name):
    layers = layers_of(model, name)
    layers.append(copy.deepcopy(layers[0]))


def inserted(model, name):
    layers = layers_of(model, name)
    layers.insert(0, copy.deepcopy(layers[1]))


def replaced_by_a_fresh_one(model, name):
    """Of the same class, from a model that was not accelerated."""
    layers_of(model, name)[1] = layers_of(ENCODERS[name](), name)[0]


def part_replaced(model, name):
    first, second = layers_of(model, name)
    part = next(part for part, module in second.named_modules() if type(module) is nn.Linear)
    second.set_submodule(part, copy.deepcopy(first.get_submodule(part)))


CHANGES = (
    deleted, sliced, reversed_order, swapped_in_place, shared, appended_again, appended_copy, inserted, replaced_by_a_fresh_one,
    part_replaced,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ENCODERS)
def test_layers_changed(name, change):
    plain, ours, handle = twins(ENCODERS[name]())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        change(model, name)
    assert_moved(before, assert_same(plain, ours))
    assert_same_gradients(plain, ours)
    handle.restore()
    assert torch.equal(inferred(ours, batch()), inferred(plain, batch()))


@pytest.mark.parametrize("change", [appended_copy, replaced_by_a_fresh_one, deleted], ids=lambda change: change.__name__)
def test_restore_of_a_model_gives_back_all_that_is_in_it_now(change):
    """The handle knows what it replaced; `restore(model)` what is there: a copy of an accelerated layer too."""
    ours = bert()
    fastattn.accelerate(ours)
    change(ours, "bert")
    inferred(ours, batch())
    fastattn.restore(ours)
    assert not any("forward" in vars(module) for module in ours.modules())
    plain = bert()
    change(plain, "bert")
    assert torch.equal(inferred(ours, batch()), inferred(plain, batch()))
    fastattn.restore(ours)
    assert_same(plain, ours)


class Halved(nn.Module):
    """A layer of somebody's own, that looks at the shape it is given."""

    def forward(self, hidden_states, *args, **kwargs):
        sequences, length, hidden = hidden_states.shape
        return hidden_states / 2 + hidden_states.mean(-1).view(sequences, length, 1)


class Wrapped(nn.Module):
    """A layer with something beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        return self.layer(hidden_states, *args, **kwargs) + hidden_states.roll(1, 1)


@pytest.mark.parametrize("change", [lambda layer: Halved(), Wrapped], ids=["another", "wrapped"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_layer_of_another_class(name, change):
    plain, ours, _ = twins(ENCODERS[name]())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        layers_of(model, name)[1] = change(layers_of(model, name)[1])
    assert_moved(before, assert_same(plain, ours))
    assert_same_gradients(plain, ours)


def test_shared_from_the_start():
    """As in ALBERT: one layer, applied twice."""
    model = bert()
    shared(model, "bert")
    plain, ours, handle = twins(model)
    assert_same(plain, ours)
    assert_same_gradients(plain, ours)
    for m in (plain, ours):
        step(m, torch.optim.SGD(m.parameters(), lr=0.05), batch())
    assert_same(plain, ours)
    assert not handle.report.fallbacks


def test_one_encoder_in_two_places():
    """Two towers of one encoder: accelerated once, restored once."""
    model = nn.ModuleDict({"query": bert()})
    model["document"] = model["query"]
    handle = fastattn.accelerate(model)
    assert_same(bert(), model["document"])
    handle.restore()
    assert torch.equal(inferred(model["document"], batch()), inferred(bert(), batch()))


FROZEN = {
    "embeddings": lambda name: "embeddings" in name,
    "all_but_the_last_layer": lambda name: "layer.1" not in name and "classifier" not in name,
    "all_but_biases": lambda name: not name.endswith("bias"),
    "all_but_norms": lambda name: "LayerNorm" not in name,
    "all_but_the_head": lambda name: "classifier" not in name,
    "queries": lambda name: "query" in name,
    "weights_of_the_ffn": lambda name: name.endswith("intermediate.dense.weight"),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(frozen):
    """After an evaluation; the same parameters get a gradient, and the same one; thawed again."""
    plain, ours, handle = twins(bert(transformers.BertForSequenceClassification, num_labels=3))
    before = assert_same(plain, ours)
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not FROZEN[frozen](name))
    assert_same_gradients(plain, ours)
    for model in (plain, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
        step(model.train(), optimizer, batch())
        model.eval()
    assert_moved(before, assert_same(plain, ours))
    for model in (plain, ours):
        model.requires_grad_(True)
    assert_same_gradients(plain, ours)
    assert not handle.report.fallbacks


def test_frozen_encoder_as_features():
    """Its output taken with gradients on, no parameter of it wanting one, into a head that trains."""
    plain, ours, _ = twins(bert())
    for model in (plain, ours):
        model.requires_grad_(False)
    out, expected = (model(**batch()).pooler_output for model in (ours, plain))
    assert_close(out, expected)
    assert not out.requires_grad
    head = nn.Linear(32, 3)
    assert_close(torch.autograd.grad(head(out).sum(), head.weight)[0], torch.autograd.grad(head(expected).sum(), head.weight)[0])


def test_early_exit():
    """The first layers of an accelerated model called by hand, as readers of intermediate states do."""
    plain, ours, handle = twins(bert())
    assert_same(plain, ours)
    found = []
    with torch.no_grad():
        for model in (plain, ours):
            states = model.embeddings(input_ids=batch()["input_ids"])
            found.append((model.encoder.layer[0](states), model.encoder(states).last_hidden_state))
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)
    assert_served_again(handle, ours)
