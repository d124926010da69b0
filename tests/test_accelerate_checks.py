"""What is not exactly what it seems is left to its own code and named, whenever it comes, and whoever brings it."""

import copy
import logging
import types

import pytest
import torch
from replayed import recorded, replayed
from test_accelerate import MODELS, QUIET, SMALL, VISION, build, result, text
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import fastattn
from fastattn.integrations.accelerate import Replaced

transformers = pytest.importorskip("transformers")
modeling_bert = pytest.importorskip("transformers.models.bert.modeling_bert")

PLACES = {
    "bert": (
        *("encoder", "encoder.layer.0", "encoder.layer.0.attention", "encoder.layer.0.attention.self"),
        *("encoder.layer.1.attention.output", "encoder.layer.0.intermediate", "encoder.layer.0.output"),
        *("encoder.layer.0.attention.self.key", "encoder.layer.0.output.LayerNorm", "encoder.layer.1.output.dropout"),
        *("encoder.layer.0.intermediate.intermediate_act_fn", "encoder.layer.0.attention.self.dropout"),
    ),
    "distilbert": ("transformer", "transformer.layer.0", "transformer.layer.0.attention", "transformer.layer.1.ffn"),
    "clip_text": ("encoder", "encoder.layers.0.self_attn", "encoder.layers.1.mlp"),
    "vit": ("layers.0", "layers.0.attention", "layers.1.mlp"),
}
INPUTS = {"vit": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}}


def vit():
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, **QUIET, image_size=16, patch_size=VISION["patch_size"]))


def made(name):
    if name in MODELS:
        return build(name).eval(), text(lengths=(24, 7, 1, 13))
    torch.manual_seed(0)
    return vit().eval(), INPUTS[name]


def doubled(cls):
    """A user's class in place of another, with the same weights: what it computes is its own affair."""

    def forward(self, *args, **kwargs):
        y = cls.forward(self, *args, **kwargs)
        if isinstance(y, torch.Tensor):
            return y * 2
        if isinstance(y, tuple):
            return (y[0] * 2, *y[1:])
        y.last_hidden_state = y.last_hidden_state * 2
        return y

    return type(f"Doubled{cls.__name__}", (cls,), {"forward": forward})


def states(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


CASES = [(name, place) for name, places in PLACES.items() for place in places]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_class_of_somebody_s(name, place, late):
    model, inputs = made(name)
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model, strict=True) if late else None
    states(model, inputs)
    for m in (model, plain):
        part = m.get_submodule(place)
        part.__class__ = doubled(type(part))
    if handle is None:
        with pytest.raises(NotImplementedError, match="Doubled"):
            fastattn.accelerate(model, strict=True)
        handle = fastattn.accelerate(model)
        assert "Doubled" in handle.report.left[""] and not handle.report.accelerated
    else:
        with pytest.raises(NotImplementedError, match="Doubled"):
            model(**inputs)
        handle.restore()
        handle = fastattn.accelerate(model)
    assert torch.equal(states(model, inputs), states(plain, inputs))


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_forward_that_was_set_on_an_instance(name, place, late):
    """By a patch, or another library; where it wraps ours, it keeps working."""
    model, inputs = made(name)
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model) if late else None
    states(model, inputs)
    for m in (model, plain):
        part = m.get_submodule(place)
        base = type("Base", (), {"forward": lambda _, *args, forward=part.forward, **kwargs: forward(*args, **kwargs)})
        part.forward = types.MethodType(doubled(base).forward, part)
    handle = handle or fastattn.accelerate(model)
    assert torch.equal(states(model, inputs), states(plain, inputs))
    assert any("a forward was set" in why for why in (*handle.report.left.values(), *handle.report.fallbacks))
    patched = model.get_submodule(place).forward
    handle.restore()
    assert model.get_submodule(place).forward == patched
    assert torch.equal(states(model, inputs), states(plain, inputs))
    assert [m for m in model.modules() if "forward" in vars(m)] == [model.get_submodule(place)]


def test_a_class_whose_forward_was_replaced(monkeypatch):
    model, inputs = made("bert")
    own = modeling_bert.BertSelfOutput.forward

    def forward(self, hidden_states, input_tensor):
        return own(self, hidden_states * 2, input_tensor)

    handle = fastattn.accelerate(model)
    states(model, inputs)
    monkeypatch.setattr(modeling_bert.BertSelfOutput, "forward", forward)
    plain = copy.deepcopy(model)
    fastattn.restore(plain)
    assert torch.equal(states(model, inputs), states(plain, inputs))
    assert "BertSelfOutput.forward was replaced" in next(iter(handle.report.fallbacks))
    handle.restore()
    assert "BertSelfOutput.forward was replaced" in fastattn.accelerate(model).report.left[""]


KINDS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [x for x in PLACES["bert"] if x.count(".") > 2 and not x.endswith("self.dropout")])
def test_a_hook_inside_a_layer(place, kind, late):
    """It runs, the report names it, and when it goes the model is served again."""
    model, inputs = made("bert")
    if late:
        handle = fastattn.accelerate(model)
        states(model, inputs)
    ran = []
    hook = getattr(model.get_submodule(place), kind)(lambda *_: ran.append(1))
    handle = handle if late else fastattn.accelerate(model)
    model(**inputs).last_hidden_state.sum().backward()
    why = next(iter(handle.report.fallbacks if late else handle.report.left.values()))
    assert ran and why.endswith("has hooks, which would not run")
    hook.remove()
    handle = handle if late else fastattn.accelerate(model, strict=True)
    calls = sum(handle.report.fallbacks.values())
    model(**inputs)
    assert sum(handle.report.fallbacks.values()) == calls


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_full_backward_hook])
def test_hooks_on_every_module(register):
    """What counts FLOPs, or draws a graph of modules, sees all of them."""
    model, inputs = made("bert")
    fastattn.accelerate(model)
    states(model, inputs)
    seen = []
    hook = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(**inputs).last_hidden_state.sum().backward()
    finally:
        hook.remove()
    assert seen.count("BertSelfAttention") == 2


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "clip_text"])
def test_a_hook_on_a_layer_sees_every_position(name, late):
    """(B, L, C), and what it makes of that is what the model computes."""
    model, inputs = made(name)
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model, strict=True) if late else None
    states(model, inputs)
    shapes = []

    def steer(module, args, y):
        shapes.append(tuple(y.shape))
        y = y.clone()
        y[:, 0] += 1.0
        return y

    for m in (model, plain):
        layers = next(x for x in m.modules() if isinstance(x, nn.ModuleList))
        hook = layers[0].register_forward_hook(steer)
    handle = handle or fastattn.accelerate(model, strict=True)
    keep = inputs["attention_mask"][..., None]
    torch.testing.assert_close(states(model, inputs) * keep, states(plain, inputs) * keep, rtol=2e-5, atol=2e-5)
    assert shapes == [(4, 24, 32)] * len(shapes) and not handle.report.fallbacks
    assert any("has hooks" in why for why in handle.report.padded)
    hook.remove()


CHANGES = {
    "replaced": lambda layers: layers.__setitem__(0, copy.deepcopy(layers[1])),
    "reordered": lambda layers: layers.__init__([layers[1], layers[0]]),
    "dropped": lambda layers: layers.__delitem__(0),
    "shared": lambda layers: layers.__setitem__(0, layers[1]),
    "added": lambda layers: layers.append(copy.deepcopy(layers[0])),
}


@pytest.mark.parametrize("sliced", [False, True], ids=["in_place", "new_list"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["bert", "clip_text"])
def test_layers_that_change_places(name, change, sliced):
    model, inputs = made(name)
    plain = copy.deepcopy(model)
    fastattn.accelerate(model)
    states(model, inputs)
    for m in (model, plain):
        holder = m.encoder
        path = "layer" if name == "bert" else "layers"
        layers = getattr(holder, path)
        if sliced:
            layers = nn.ModuleList(list(layers))
            setattr(holder, path, layers)
        CHANGES[change](layers)
    keep = inputs["attention_mask"][..., None]
    torch.testing.assert_close(states(model, inputs) * keep, states(plain, inputs) * keep, rtol=2e-5, atol=2e-5)
    fastattn.restore(model)
    torch.testing.assert_close(states(model, inputs) * keep, states(plain, inputs) * keep, rtol=2e-5, atol=2e-5)


def test_numbers_are_read_in_each_call():
    """Scale, eps and dropout are plain attributes, which tell nobody when they change."""
    model, inputs = made("bert")
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model, strict=True)
    states(model, inputs)
    for m in (model, plain):
        m.encoder.layer[0].attention.self.scaling = 1.7
        m.encoder.layer[1].output.LayerNorm.eps = 0.3
    keep = inputs["attention_mask"][..., None]
    torch.testing.assert_close(states(model, inputs) * keep, states(plain, inputs) * keep, rtol=2e-5, atol=2e-5)
    for m in model.modules():
        m.training = type(m) is nn.Dropout  # dropout alone, as Monte Carlo estimates have it
        m.p = 0.4 if type(m) is nn.Dropout else None
    assert not torch.equal(states(model, inputs), states(model, inputs)) and not handle.report.fallbacks


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_where_the_model_has_it(name):
    """With one seed, no padding, and what fastattn drew dropped by the model too; the rest of what is drawn is PyTorch's."""
    model = build(name, "eager")
    for m in model.modules():
        if type(m) is nn.Dropout:
            m.p = 0.3
    inputs = text(lengths=(24, 24))
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    ours(**inputs)  # proves itself
    torch.manual_seed(7)
    with recorded() as draws:
        found = result(ours, inputs)
    assert len(draws) == {"distilbert": 4, "clip_text": 0}.get(name, 6)
    torch.manual_seed(7)
    with replayed(draws, torchs_own=(0,)):  # of the embeddings
        torch.testing.assert_close(found, result(model, inputs), rtol=2e-5, atol=2e-5)


def test_other_numbers_than_words_in_a_call():
    """Arguments that reach attention through the model's keyword arguments, and change it."""
    model, inputs = made("bert")
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for extra in ({"is_causal": True}, {"output_hidden_states": True}, {"num_items_in_batch": 3, "is_causal": False}):
            out, expected = model(ids, **extra).last_hidden_state, plain(ids, **extra).last_hidden_state
            torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    assert handle.report.fallbacks == {"is_causal was given": 1}


def test_what_is_to_come_is_said_before():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    assert not fastattn.accelerate(model).report.foreseen, "its dropouts are served"
    fastattn.restore(model)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    report = fastattn.accelerate(model).report
    assert "output_attentions=True" in report.foreseen["bert"] and "to come: all calls" in str(report)
    assert not fastattn.accelerate(build("bert")).report.foreseen


def test_the_first_fallback_is_a_warning(caplog):
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).train()
    fastattn.accelerate(model)
    with caplog.at_level(logging.WARNING, "fastattn"):
        for _ in range(3):
            model(**text(), use_cache=True)
            model(**text())
            model(**text(), output_attentions=True)
    said = [record.message.split(": ")[1] for record in caplog.records if record.name == "fastattn"]
    assert said == ["use_cache=True", "output_attentions=True"]


def test_what_is_no_model():
    class Pipeline:
        model = build("bert")

    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got Pipeline: give it .model"):
        fastattn.accelerate(Pipeline())
    with pytest.raises(TypeError, match=r"got str: load it first.*AutoModel.from_pretrained\('bert-base-uncased'\)"):
        fastattn.accelerate("bert-base-uncased")
    with pytest.raises(ValueError, match="unpad must be one of auto, always, never; got 'no'"):
        fastattn.accelerate(build("bert"), unpad="no")
    for capacity, error in ((-1, ValueError), (8.0, TypeError), ("8", TypeError), (True, TypeError)):
        with pytest.raises(error, match="capacity"):
            fastattn.accelerate(build("bert"), capacity=capacity)


def test_repr_of_a_handle_says_what_it_holds():
    model = torch.nn.Sequential(build("bert"))
    handle = fastattn.accelerate(model)
    assert repr(handle) == "<Handle of accelerate: 1 encoder accelerated, none left; print its report for more>"
    handle.restore()
    assert repr(handle) == "<Handle of accelerate: the model was restored>"
    assert "0 encoders accelerated, 1 left" in repr(fastattn.accelerate(torch.nn.Linear(2, 2)))


def test_wrapped_by_another_library():
    """One that keeps our forward and puts its own in front: both stay, and both can go, in either order."""
    model, inputs = made("bert")
    expected = states(model, inputs)
    keep = inputs["attention_mask"][..., None]

    def wrapped(m):
        m._original_forward = m.forward
        m.forward = types.MethodType(lambda self, *args, **kwargs: self._original_forward(*args, **kwargs), m)

    handle = fastattn.accelerate(model)
    wrapped(model)
    torch.testing.assert_close(states(model, inputs) * keep, expected * keep, rtol=2e-5, atol=2e-5)
    assert not handle.overflowed
    handle.refresh()
    handle.restore()
    assert torch.equal(states(model, inputs), expected) and "forward" in vars(model)
    model.forward = model._original_forward  # as that library takes its own away
    del model._original_forward
    assert torch.equal(states(model, inputs), expected)
    fastattn.restore(model)
    assert not any("forward" in vars(m) for m in model.modules())
    with fastattn.accelerate(model, strict=True):
        torch.testing.assert_close(states(model, inputs) * keep, expected * keep, rtol=2e-5, atol=2e-5)


def test_restoring_copies():
    model, inputs = made("bert")
    expected = states(model, inputs)
    handle = fastattn.accelerate(model)
    twin = copy.deepcopy(model)
    fastattn.restore(twin)
    assert torch.equal(states(twin, inputs), expected) and not any("forward" in vars(m) for m in twin.modules())
    assert isinstance(vars(model)["forward"], Replaced)
    second = fastattn.accelerate(copy.deepcopy(model), strict=True)  # a copy's handle is nowhere, so it need not be restored
    assert second.report.accelerated
    with pytest.raises(ValueError, match="accelerated already"):
        fastattn.accelerate(model)
    handle.restore()
    fastattn.restore(model)
    assert torch.equal(states(model, inputs), expected)


def replicated(model, factor):
    """What nn.DataParallel makes of a model for each further device: here with other weights, so that one sees whose are used."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module.named_children():
            setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * factor)
    return copies[model]


def test_data_parallel_copies_compute_with_their_own_weights():
    model, inputs = made("bert")
    twice = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    handle = fastattn.accelerate(model)
    expected = states(twice, inputs)
    assert torch.equal(states(replicated(model, 2), inputs), expected)
    assert torch.equal(states(replicated(copy.deepcopy(model), 2), inputs), expected)
    assert "nn.DataParallel runs copies" in next(iter(handle.report.fallbacks))
    handle.restore()
    assert not any("_replicate_for_data_parallel" in vars(m) for m in model.modules())


def test_identity_in_the_place_of_dropout():
    model, inputs = made("bert")
    for m in list(model.modules()):
        for name, child in list(m.named_children()):
            if type(child) is nn.Dropout:
                setattr(m, name, nn.Identity())
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model, strict=True)
    keep = inputs["attention_mask"][..., None]
    for m in (model, plain):
        m.train()
        for layer in m.encoder.layer:  # whose own code reads a probability there in training
            layer.attention.self.eval()
    torch.testing.assert_close(states(model, inputs) * keep, states(plain, inputs) * keep, rtol=2e-5, atol=2e-5)
    assert not handle.report.fallbacks
