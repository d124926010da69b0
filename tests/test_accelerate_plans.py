"""What `accelerate` does on a GPU, a layer as a list of launches and as one autograd node, by the interpreter on a CPU."""

import copy
import functools
import sys
import threading

# ruff: noqa: E402  (without triton or transformers nothing below can be imported)
import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
import test_accelerate_families as families
from test_accelerate import LENGTHS, MODELS, L, assert_same, build, gradients, result, text
from test_accelerate_dropout import MODELS as DROPPING
from test_accelerate_dropout import assert_same as assert_drops_the_same
from test_accelerate_dropout import build as dropping
from test_accelerate_dropout import inputs as inputs_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import planned
from fastattn.integrations import accelerate_forward, accelerate_plans, accelerate_training
from fastattn.kernels.triton.launch import GPU, dry

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses a GPU on a CPU")]
FAMILIES = ("bert", "distilbert", "clip_text", "electra")


@pytest.fixture(autouse=True)
def pretending(monkeypatch):
    """Tensors of the CPU stand for those of a GPU, which here is Triton's interpreter."""
    from fastattn.kernels.triton.launch import refusals
    from fastattn.ops.norm import NormProblem

    found = refusals(NormProblem("cpu", torch.float32, 32))
    if found:
        pytest.skip("; ".join(found))
    monkeypatch.setattr(planned, "pretending", True)


@pytest.fixture
def ways(monkeypatch):
    """How often layers went each way."""
    counts = dict.fromkeys(("inferred", "trained", "compute"), 0)

    def counting(name):
        function = getattr(accelerate_forward, name)

        def count(*args, **kwargs):
            found = function(*args, **kwargs)
            counts[name] += found is not None
            return found

        monkeypatch.setattr(accelerate_forward, name, count)

    for name in counts:
        counting(name)
    return counts


def both(name="bert", **options):
    model = build(name)
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, **{"strict": True, "prove": False, **options})
    return model, ours


PLAIN = ("SiglipTextModel", "AlbertModel", "XLMRobertaXLModel", "RemBertModel")
BEYOND = ("BlipVisionModel", "Dinov2Model", "VideoMAEModel", "MPNetModel", "ModernBertModel", "BeitModel", "EuroBertModel")
BEYOND += ("JinaEmbeddingsV3Model", "WhisperEncoder")


@pytest.mark.parametrize("name", PLAIN + BEYOND)
def test_layers_that_are_more_than_plain_are_no_launches(name, ways):
    """A layer scale, a bias, turned positions, a window or a gate would be left out of them."""
    model, ours = families.build(name)
    fastattn.accelerate(ours, strict=True, prove=False)
    given = families.inputs(name, "right")
    families.assert_same(model, ours, given)
    with torch.no_grad():
        found, expected = (families.results(m.eval(), given)[0] for m in (ours, model))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    if name in PLAIN:
        assert ways["compute"] == 0 < ways["inferred"] == ways["trained"]
    else:
        assert ways["inferred"] == ways["trained"] == 0 < ways["compute"]


@pytest.mark.parametrize("given", [{}, {"is_decoder": True}, {"encoder_hidden_states": torch.ones(4, 5, 32).cumsum(1)}])
def test_a_layer_with_cross_attention_is_launches_where_a_call_has_none(given, ways):
    model, ours = families.build("BlipTextModel")
    fastattn.accelerate(ours, strict=True, prove=False)
    given = {**families.inputs("BlipTextModel", "right"), **given, "use_cache": False}
    families.assert_same(model, ours, given)
    with torch.no_grad():
        found, expected = (families.results(m.eval(), given)[0] for m in (ours, model))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    launched = 0 if "encoder_hidden_states" in given else 2
    assert ways == {"inferred": launched, "trained": launched, "compute": 4 - 2 * launched}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_inference(name, side, ways):
    model, ours = both(name)
    model.eval(), ours.eval()
    with torch.no_grad():
        for inputs in (text(side), text(lengths=(L, L))):
            torch.testing.assert_close(result(ours, inputs), result(model, inputs), rtol=2e-5, atol=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(result(ours, text(side)), result(model, text(side)), rtol=2e-5, atol=2e-5)
    assert ways == {"inferred": 6, "trained": 0, "compute": 0}


@pytest.mark.parametrize("name", FAMILIES)
def test_training(name, ways):
    model, ours = both(name)
    for inputs in (text(), text(lengths=(L, L))):
        assert_same(model, ours, inputs)
    assert ways == {"inferred": 0, "trained": 4, "compute": 0}


@pytest.mark.parametrize("name", DROPPING)
def test_training_with_dropout(name, ways):
    """Against the model's own code with the same draws, and the public functions, which draw in the same order."""
    model, ours = dropping(name)
    handle = fastattn.accelerate(ours, strict=True, prove=False, unpad="never")
    for given in (inputs_of(name), inputs_of(name)):  # the second one by the plans of the first
        assert_drops_the_same(model, ours, given, *DROPPING[name][1:])
    assert ways == {"inferred": 0, "trained": 4, "compute": 0} and not handle.report.fallbacks


@pytest.mark.parametrize("name", ["bert", "distilbert", "clip_text"])
def test_training_with_dropout_without_padding(name, ways):
    model, ours = dropping(name)
    fastattn.accelerate(ours, strict=True, prove=False)
    given = text()
    packing = fastattn.Packing.from_mask(given["attention_mask"].bool())
    assert_drops_the_same(model, ours, given, *DROPPING[name][1:], packing)
    assert ways == {"inferred": 0, "trained": 2, "compute": 0}


def test_checkpointed_layers_draw_the_same_again(ways):
    grads = []
    for checkpointing in (False, True):
        _, ours = dropping("bert")
        fastattn.accelerate(ours, strict=True, prove=False)
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        given = text()
        torch.manual_seed(5)
        grads.append(gradients(ours, result(ours, given)))
    assert ways["trained"] >= 4 and ways["compute"] == 0
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-5)


def test_the_first_call_proves_them(ways):
    model, ours = both(prove=True, strict=False)
    with torch.no_grad():
        result(ours.eval(), text())
        assert ways["inferred"] == 4, "to be compared, and for the result"
        ours.encoder.layer[0].attention.self.register_forward_hook(lambda *_: None)
        assert torch.equal(result(ours, text()), result(model.eval(), text()))
    assert ways["inferred"] == 4, "with a hook inside, the model's own code runs"


@pytest.mark.parametrize("frozen", ["embeddings", "attention", "output", "LayerNorm", "bias", "weight"])
def test_frozen_parameters_have_no_gradient(frozen):
    model, ours = both()
    for each in (model, ours):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(frozen not in name)
    expected, found = gradients(model, result(model, text())), gradients(ours, result(ours, text()))
    assert found.keys() == expected.keys() and not any(frozen in name for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=2e-4, atol=2e-5)


def test_gradients_of_gradients_raise():
    _, ours = both()
    embeddings = torch.randn(2, L, 32, requires_grad=True)
    out = ours(inputs_embeds=embeddings).last_hidden_state
    (grad,) = torch.autograd.grad(out.square().sum(), embeddings, create_graph=True)
    (plain,) = torch.autograd.grad(ours(inputs_embeds=embeddings).last_hidden_state.square().sum(), embeddings)
    torch.testing.assert_close(grad, plain)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_checkpointing(ways):
    model, ours = both()
    for each in (model, ours):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, ours, text())
    assert ways["trained"] >= 2 and ways["compute"] == 0


def test_hidden_states_are_not_overwritten():
    """Layers share memory, but not that of their results."""
    model, ours = both()
    model.eval(), ours.eval()
    with torch.no_grad():
        for inputs in (text(), text(lengths=(L, L))):
            expected = model(**inputs, output_hidden_states=True).hidden_states
            found = ours(**inputs, output_hidden_states=True).hidden_states
            keep = inputs["attention_mask"][..., None]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a * keep, b * keep, rtol=2e-5, atol=2e-5)
        first = result(ours, text())
        before = first.clone()
        result(ours, text(lengths=LENGTHS[::-1]))
        assert torch.equal(first, before)


def test_rows_of_no_sequence_hold_nothing():
    """What attention does not write is 0, as where it makes its memory itself."""
    _, ours = both(capacity=64)
    encoder = ours.forward.settings
    x = torch.randn(64, 32)
    weights = accelerate_plans.Weights(encoder.layers[0].parts)
    assert weights.key() is not None
    numbers = accelerate_plans.numbers_of(encoder.family, encoder.layers[0].parts)
    packing = fastattn.Packing.from_lengths([24, 7], L, 64)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        scratch = accelerate_plans.Scratch(x, numbers, weights, packing, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert scratch.qkv.isnan().all() and not scratch.attended.any()


def test_threads_do_not_meet(monkeypatch):
    """Memory belongs to a call. (The interpreter serves one thread at a time.)"""
    interpreter = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    launch, lock = interpreter.__call__, threading.Lock()

    def one_at_a_time(self, *args, **kwargs):
        with lock:
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "__call__", one_at_a_time)
    _, ours = both()
    ours.eval()
    batches = [text(lengths=lengths) for lengths in (LENGTHS, LENGTHS[::-1], (L,) * 5)]
    with torch.no_grad():
        expected = [result(ours, inputs) for inputs in batches]
    right = []

    def run(inputs, expected):
        with torch.no_grad():
            for _ in range(3):
                right.append(torch.equal(result(ours, inputs), expected))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(batches, expected, strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert right == [True] * 9


def allocations(call):
    found = []

    def note(frame, event, arg):
        if event == "c_call" and arg.__name__ in ("new_empty", "new_zeros", "empty_like", "new_empty_strided"):
            found.append(arg)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(found)


def test_no_allocation_that_the_layer_before_has_made():
    """Of a layer's own: its result and the hidden features. The rest is made once a call."""
    counts = []
    for layers in (2, 4):
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48, vocab_size=60
        )
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
        fastattn.accelerate(model, strict=True, prove=False)
        with torch.no_grad(), dry(GPU(90)):
            model(**text())
            counts.append(allocations(functools.partial(model, **text())))
    assert counts[1] - counts[0] == 2 * 2


def change(how, model):
    linear = model.encoder.layer[1].attention.self.key
    with torch.no_grad():
        if how == "in place":
            linear.weight.mul_(1.5)
        elif how == "data written":
            linear.weight.data.mul_(1.5)
        elif how == "data replaced":
            linear.weight.data = linear.weight.data * 1.5
        elif how == "data transposed in place":
            linear.weight.data = linear.weight.data.t()
        elif how == "data cut":
            mlp = model.encoder.layer[1].intermediate.dense, model.encoder.layer[1].output.dense
            mlp[0].weight.data, mlp[0].bias.data = mlp[0].weight.data[:40], mlp[0].bias.data[:40]
            mlp[1].weight.data = mlp[1].weight.data[:, :40].contiguous()
        elif how == "another parameter":
            linear.weight = nn.Parameter(linear.weight * 1.5)
        elif how == "bias gone":
            for name in ("query", "key", "value"):
                getattr(model.encoder.layer[1].attention.self, name).bias = None
        elif how == "one bias gone":
            linear.bias = None
        elif how == "eps":
            model.encoder.layer[1].output.LayerNorm.eps = 0.1
        elif how == "scale":
            model.encoder.layer[1].attention.self.scaling = 0.5
        elif how == "loaded":
            model.load_state_dict({name: x * 1.25 for name, x in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "how",
    ["in place", "data written", "data replaced", "data transposed in place", "data cut", "another parameter", "bias gone",
     "one bias gone", "eps", "scale", "loaded"],
)  # fmt: skip
def test_changes_between_calls_are_seen(how):
    model, ours = both()
    model.eval(), ours.eval()
    with torch.no_grad():
        before = result(ours, text())
        for each in (model, ours):
            change(how, each)
        after = result(ours, text())
        torch.testing.assert_close(after, result(model, text()), rtol=2e-5, atol=2e-5)
        assert not torch.equal(after, before)


def test_copies_have_weights_of_their_own():
    model, ours = both()
    model.eval(), ours.eval()
    with torch.no_grad():
        expected = result(ours, text())
        twin = copy.deepcopy(ours)
        for parameter in twin.parameters():
            parameter.mul_(0)
        assert not torch.equal(result(twin, text()), expected)
        assert torch.equal(result(ours, text()), expected)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_what_is_left_to_the_public_functions(ways):
    """Where something watches, where a dropout is active without gradients, where dtypes are mixed."""
    model, ours = both()
    with torch.no_grad():
        with Seen() as seen:
            result(ours, text())
        assert "fastattn.attention_forward.default" in seen.names
        with torch.autocast("cpu", torch.bfloat16):
            result(ours, text())
        assert ways == {"inferred": 0, "trained": 0, "compute": 4}
        for layer in ours.encoder.layer:
            layer.output.dropout.p = 0.5
        result(ours, text())
        assert ways["compute"] == 6
        result(ours.eval(), text())
        assert ways["compute"] == 6 and ways["inferred"] == 2, "a dropout in evaluation is none"
        ours.bfloat16().encoder.layer[0].output.LayerNorm.float()
        result(ours, text())
        assert ways["compute"] == 7 and ways["inferred"] == 3


def test_one_node_for_each_layer():
    _, ours = both()
    nodes, left = 0, [ours(**text()).last_hidden_state.grad_fn]
    seen = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += "_Layer" in node.name()
        left += [after for after, _ in node.next_functions]
    assert nodes == 2


def test_backward_where_a_mode_watches():
    """The forward went by plans, the backward goes by the ops."""
    _, ours = both()
    expected = gradients(ours, result(ours, text()))
    out = result(ours, text())
    with Seen() as seen:
        found = gradients(ours, out)
    assert {"fastattn.attention_backward.default", "fastattn.ffn_backward.default"} <= seen.names
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)


def test_every_family_is_covered():
    assert set(FAMILIES) < set(MODELS)
    assert 2 * len(accelerate_plans.ORDER) == accelerate_training.WEIGHTS
