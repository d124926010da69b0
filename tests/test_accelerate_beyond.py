"""What layers of `accelerate`'s families do beyond the plain scheme: branches and layers left out in training, clamps in float16,
windows, poolers behind packed layers; and what is refused or left."""

import copy
import importlib

import pytest
import torch
from test_accelerate_families import MODELS, build, gradients, inputs, layers_of, results

import fastattn
from fastattn.integrations.accelerate_families import FAMILIES

transformers = pytest.importorskip("transformers")

RANDOM = {
    "Dinov2Model": {"drop_path_rate": 0.5},
    "Dinov2WithRegistersModel": {"drop_path_rate": 0.5},
    "BeitModel": {"drop_path_rate": 0.7},
    "Data2VecVisionModel": {"drop_path_rate": 0.7},
    "Wav2Vec2Model": {"layerdrop": 0.5},
    "HubertModel-stable": {"layerdrop": 0.5},
    "WhisperEncoder": {"encoder_layerdrop": 0.5},
    "BartEncoder": {"encoder_layerdrop": 0.5},
}


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_left_out_in_training_is_the_model_s(name):
    """Branches for some images, and whole layers, by its own code and draw: a seed gives the same outputs and gradients."""
    model, ours = build(name, **RANDOM[name])
    handle = fastattn.accelerate(ours, strict=True)
    results(ours, inputs(name))
    differs = 0.0
    for seed in range(3):
        outs = []
        for m in (model, ours):
            torch.manual_seed(seed)
            out = results(m, inputs(name))
            outs.append((out, gradients(m, out)))
        torch.testing.assert_close(outs[1], outs[0], rtol=2e-5, atol=2e-5)
        differs += (results(ours.eval(), inputs(name))[0] - outs[1][0][0]).abs().max()
        ours.train()
    assert not handle.report.fallbacks and differs > 1e-2


@pytest.mark.parametrize(
    ("name", "path"),
    [("ModernBertModel", "final_norm"), ("JinaEmbeddingsV3Model", "pooler"), ("XLMRobertaXLModel", "encoder.LayerNorm")],
)
def test_who_looks_between_the_layers_and_the_outputs_sees_all_positions(name, path):
    model, ours = (m.eval() for m in build(name))
    handle, given, seen = fastattn.accelerate(ours, strict=True), inputs(name, "right"), []
    results(ours, given)
    assert not handle.report.padded
    for m in (model, ours):
        m.get_submodule(path).register_forward_pre_hook(
            lambda module, args: seen.append(args[0] * given["attention_mask"][..., None])
        )
    for a, b in zip(results(ours, given), results(model, given), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(*seen, rtol=2e-5, atol=2e-5)
    assert list(handle.report.padded) == [f"{path.split('.')[-1]} has hooks, which see all positions"]


def test_a_pooler_that_is_put_in_later():
    model, ours = (m.eval() for m in build("GteModel"))
    handle, given = fastattn.accelerate(ours, strict=True), inputs("GteModel", "right")
    torch.manual_seed(0)
    model.pooler = importlib.import_module("transformers.models.gte.modeling_gte").GtePooler(model.config).eval()
    ours.pooler = copy.deepcopy(model.pooler)
    for a, b in zip(results(ours, given), results(model, given), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert list(handle.report.padded) == ["its pooler is another one than it was"]


def test_no_family_drops_branches_of_packed_tokens():
    """Drop path is of whole images."""
    assert not any(family.packs and "drop_path" in family.parts for family in FAMILIES.values())


def test_layers_that_a_call_does_not_reach_are_noticed(monkeypatch):
    monkeypatch.setitem(FAMILIES, "VideoMAEModel", FAMILIES["VideoMAEModel"]._replace(hands_on="model"))
    model, ours = (m.eval() for m in build("VideoMAEModel"))
    handle, given = fastattn.accelerate(ours), inputs("VideoMAEModel")
    for _ in range(2):
        assert torch.equal(results(ours, given)[0], results(model, given)[0])
    words = "its layers were not called as they are known to be"
    assert handle.report.left == {"": words} and handle.report.fallbacks == {words: 2}


def test_a_model_that_hands_nothing_on_is_left(monkeypatch):
    """As some versions of transformers have it."""
    model, ours = (m.eval() for m in build("SiglipVisionModel"))
    forward = type(ours.encoder).forward

    def forward_alone(self, inputs_embeds, attention_mask=None):
        return forward(self, inputs_embeds, attention_mask)

    forward_alone.__module__ = forward.__module__
    monkeypatch.setattr(type(ours.encoder), "forward", forward_alone)
    assert fastattn.accelerate(ours).report.left == {"": "SiglipEncoder hands no further keyword arguments on to its layers"}


def test_what_layers_have_beyond_is_refused():
    for name, options, words in (
        ("Wav2Vec2Model-stable", {"adapter_attn_dim": 4}, "it has a part adapter_layer, which is not served"),
        ("MPNetModel", {"relative_attention_num_buckets": 40}, "its bias is of 40 distances, not 32"),
    ):
        _, ours = build(name, **options)
        assert fastattn.accelerate(ours).report.left[""] == words


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("BlipTextModel", {"is_decoder": True}, "use_cache=True, which its config says"),
        ("BeitModel", {"attention_mask": torch.ones(3, 17).long()}, "attention_mask was given, beside a bias of positions"),
    ],
)
def test_a_call_beyond_what_is_known_runs_the_model_s_own_code(name, given, words):
    model, ours = (m.eval() for m in build(name))
    handle = fastattn.accelerate(ours)
    given = {**inputs(name, "right"), **given}
    with torch.no_grad():
        assert torch.equal(results(ours, given)[0], results(model, given)[0])
    assert list(handle.report.fallbacks) == [words]


@pytest.mark.parametrize("bias", [64600.0, 65500.0])
@pytest.mark.parametrize("name", ["WhisperEncoder", "BartEncoder", "MBartEncoder"])
def test_float16_is_clamped(name, bias):
    """BART does so where something overflows."""
    model, ours = (m.eval().half() for m in build(name))
    for m in (model, ours):
        with torch.no_grad():
            last = layers_of(name, m)[-1].get_submodule("fc2" if name != "BartEncoder" else "final_layer_norm")
            last.bias.fill_(bias)
            last.weight.mul_(500 if bias > 65000 else 1)
            m.layer_norm = torch.nn.Identity()
    fastattn.accelerate(ours, strict=True, prove=False)
    given = {key: x.half() if x.is_floating_point() else x for key, x in inputs(name).items()}
    with torch.no_grad():
        found, expected = (m(**given).last_hidden_state for m in (ours, model))
    least = 64512 if name != "BartEncoder" or bias > 65000 else 64600  # the greatest of float16, less 1000, as float16 has it
    assert found.isfinite().all() and abs(found.max().item() - least) <= 32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_a_decoder_behind_an_encoder():
    """What is written behind padded texts is what the model writes."""
    torch.manual_seed(0)
    _, sizes = MODELS["BartEncoder"]
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, decoder_start_token_id=2)).eval()
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours)
    given = inputs("BartEncoder", "right")
    written = [m.generate(**given, max_new_tokens=6, do_sample=False, num_beams=2) for m in (model, ours)]
    assert torch.equal(*written) and list(handle.report.accelerated) == ["model.encoder"] and not handle.report.fallbacks


def test_the_mask_of_a_window_is_made_once_a_call(monkeypatch):
    made = []
    window = fastattn.masks.window
    monkeypatch.setattr(fastattn.masks, "window", lambda *reach: made.append(reach) or window(*reach))
    _, ours = build("ModernBertModel", num_hidden_layers=5)
    fastattn.accelerate(ours, strict=True)
    results(ours, inputs("ModernBertModel", "right"))
    made.clear()
    results(ours, inputs("ModernBertModel", "right"))
    assert made == [(3, 3)]


@pytest.mark.parametrize("name", ["RemBertModel", "MPNetModel", "JinaEmbeddingsV3Model", "ModernBertModel", "BeitModel"])
def test_compiled_without_a_graph_break(name):
    """Also where a batch reaches layers by no argument of theirs."""
    model, ours = build(name)
    fastattn.accelerate(ours, strict=True, prove=False)
    torch._dynamo.reset()
    compiled, given = torch.compile(ours, backend="aot_eager", fullgraph=True), inputs(name, "right")
    for a, b in zip(results(compiled, given), results(model, given), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
