"""Every family of encoders that `accelerate` knows, against the untouched model: one line for each, tiny, with random weights."""

import copy
import importlib

import pytest
import torch

import fastattn
from fastattn.integrations.accelerate_families import FAMILIES
from fastattn.integrations.accelerate_parts import Family

transformers = pytest.importorskip("transformers")

L = 12
LENGTHS = torch.tensor([L, 5, 1, 8])[:, None]
MASKS = {
    "none": torch.ones(4, L).bool(),
    "right": torch.arange(L) < LENGTHS,
    "left": torch.arange(L) >= L - LENGTHS,
    "holes": torch.rand(4, L, generator=torch.Generator().manual_seed(2)) > 0.4,
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 1}
LAYOUT = {
    **BERT,
    "coordinate_size": 4,
    "shape_size": 8,
    "input_size": 16,
    "patch_size": 4,
    "rel_pos_bins": 8,
    "rel_2d_pos_bins": 8,
}
CLIP = {**BERT, "eos_token_id": 59, "bos_token_id": 58, "projection_dim": 16, "projection_size": 32}
VIT = {**SIZES, "image_size": 16, "patch_size": 4, "num_channels": 3}
DINO = {**VIT, "mlp_ratio": 2, "layerscale_value": 0.5}
DINO3 = {**VIT, "layerscale_value": 0.5, "pos_embed_rescale": None, "num_register_tokens": 2}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "vocab_size": 60,
    "pad_token_id": 1,
}
BART |= {"max_position_embeddings": 40, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "pad_token_id": 1}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
BEIT = {**VIT, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0, "use_relative_position_bias": True}
WAVES = {
    **SIZES,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 4,
    "layerdrop": 0.0,
}
WAVES |= {"num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "num_feat_extract_layers": 2, "conv_pos_kernel_size": 3}
STABLE = {**WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
# class: (module of transformers', what its config is given)
MODELS = {
    "SiglipTextModel": ("siglip", CLIP),
    "SiglipVisionModel": ("siglip", VIT),
    "Siglip2TextModel": ("siglip2", CLIP),
    "Siglip2VisionModel": ("siglip2", {**SIZES, "patch_size": 4, "num_patches": 16}),
    "CLIPSegTextModel": ("clipseg", CLIP),
    "CLIPSegVisionModel": ("clipseg", VIT),
    "AltRobertaModel": ("altclip", BERT),
    "AltCLIPVisionModel": ("altclip", VIT),
    "ChineseCLIPTextModel": ("chinese_clip", BERT),
    "ChineseCLIPVisionModel": ("chinese_clip", VIT),
    "AlignTextModel": ("align", BERT),
    "BlipVisionModel": ("blip", VIT),
    "DeiTModel": ("deit", VIT),
    "ViTMAEModel": ("vit_mae", {**VIT, "mask_ratio": 0.0}),
    "ViTMSNModel": ("vit_msn", VIT),
    "IJepaModel": ("ijepa", VIT),
    "Dinov2Model": ("dinov2", DINO),
    "Dinov2Model-giant": ("dinov2", {**DINO, "use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("dinov2_with_registers", DINO),
    "VideoMAEModel": ("videomae", {**VIT, "num_frames": 2, "tubelet_size": 2}),
    "MetaClip2TextModel": ("metaclip_2", CLIP),
    "MetaClip2VisionModel": ("metaclip_2", VIT),
    "XCLIPTextModel": ("x_clip", CLIP),
    "ErnieModel": ("ernie", BERT),
    "RoCBertModel": ("roc_bert", {**BERT, "enable_pronunciation": False, "enable_shape": False, "concat_input": False}),
    "BertGenerationEncoder": ("bert_generation", BERT),
    "Data2VecTextModel": ("data2vec.modeling_data2vec_text", BERT),
    "ClapTextModel": ("clap", BERT),
    "LayoutLMModel": ("layoutlm", BERT),
    "MarkupLMModel": ("markuplm", {**BERT, "max_depth": 4, "xpath_unit_hidden_size": 8, "max_xpath_tag_unit_embeddings": 220}),
    "SplinterModel": ("splinter", BERT),
    "BlipTextModel": ("blip.modeling_blip_text", {**BERT, "encoder_hidden_size": 32}),
    "AlbertModel": ("albert", {**BERT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "XLMRobertaXLModel": ("xlm_roberta_xl", BERT),
    "RobertaPreLayerNormModel": ("roberta_prelayernorm", BERT),
    "RemBertModel": ("rembert", {**BERT, "input_embedding_size": 16}),
    "MegatronBertModel": ("megatron_bert", BERT),
    "MPNetModel": ("mpnet", BERT),
    "LayoutLMv3Model": ("layoutlmv3", LAYOUT),
    "LayoutLMv3Model-distances": ("layoutlmv3", {**LAYOUT, "has_spatial_attention_bias": False}),
    "EsmModel": ("esm", {**BERT, "position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4}),
    "EsmModel-absolute": ("esm", {**BERT, "mask_token_id": 4}),
    "ModernBertModel": ("modernbert", {**BERT, "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 6}),
    "NomicBertModel": ("nomic_bert", BERT),
    "GteModel": ("gte", BERT),
    "JinaEmbeddingsV3Model": ("jina_embeddings_v3", BERT),
    "EuroBertModel": ("eurobert", {**BERT, "num_key_value_heads": 1}),
    "DINOv3ViTModel": ("dinov3_vit", DINO3),
    "DINOv3ViTModel-gated": ("dinov3_vit", {**DINO3, "use_gated_mlp": True, "hidden_act": "silu"}),
    "Aimv2VisionModel": ("aimv2", VIT),
    "BeitModel": ("beit", BEIT),
    "BeitModel-shared": ("beit", {**BEIT, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0}),
    "Data2VecVisionModel": ("data2vec.modeling_data2vec_vision", BEIT),
    "Data2VecVisionModel-shared": (
        "data2vec.modeling_data2vec_vision",
        {**BEIT, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
    ),
    "ASTModel": ("audio_spectrogram_transformer", {**SIZES, "patch_size": 4, "max_length": 16, "num_mel_bins": 8}),
    "VivitModel": ("vivit", {**VIT, "num_frames": 2, "tubelet_size": [2, 4, 4]}),
    "MT5Stack": ("mt5", T5),
    "UMT5Stack": ("umt5", T5),
    "BartEncoder": ("bart", BART),
    "PLBartEncoder": ("plbart", BART),
    "MarianEncoder": ("marian", BART),
    "MBartEncoder": ("mbart", BART),
    "PegasusEncoder": ("pegasus", BART),
    "M2M100Encoder": ("m2m_100", BART),
    "BlenderbotEncoder": ("blenderbot", BART),
    "WhisperEncoder": ("whisper", {**BART, "num_mel_bins": 8, "max_source_positions": 12}),
    "Wav2Vec2Model": ("wav2vec2", WAVES),
    "Wav2Vec2Model-stable": ("wav2vec2", STABLE),
    "UniSpeechModel": ("unispeech", WAVES),
    "UniSpeechSatModel": ("unispeech_sat", STABLE),
    "Data2VecAudioModel": ("data2vec.modeling_data2vec_audio", {**WAVES, "num_conv_pos_embeddings": 2}),
    "HubertModel": ("hubert", WAVES),
    "HubertModel-stable": ("hubert", STABLE),
}


def family_of(name):
    return FAMILIES[name.split("-")[0]]


DOCUMENTS = [name for name in MODELS if "LayoutLMv3" in name]  # text, and an image of 17 tokens behind it
TEXTS = [name for name in MODELS if family_of(name).packs and name != "Siglip2VisionModel"] + DOCUMENTS
CASES = [(name, side) for name in MODELS for side in (MASKS if name in TEXTS else ("none",))]
KINDS = list({repr((family_of(name), name.partition("-")[2])): name for name in reversed(MODELS)}.values())[::-1]
each_kind = pytest.mark.parametrize("name", KINDS)  # the first of those that are described alike
each_model = pytest.mark.parametrize("name", MODELS)
each_case = pytest.mark.parametrize(("name", "side"), CASES)


def build(name, dropout=0.0, only=None, **options):
    """The model, twice, all its dropouts (or only the one that its config calls so) with that rate."""
    torch.manual_seed(0)
    module, sizes = MODELS[name]
    home = importlib.import_module(f"transformers.models.{module if '.' in module else f'{module}.modeling_{module}'}")
    cls = getattr(home, name.split("-")[0].replace("Stack", "EncoderModel"))
    config = cls.config_class(**{**sizes, **options})
    for key in dropouts(config):
        setattr(config, key, dropout if only in (None, key) else 0.0)
    config._attn_implementation = "eager"
    model = cls(config).train()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, norms and layer scales are not 0 and 1, attention is not uniform
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model, copy.deepcopy(model)


def dropouts(config):
    return [key for key, value in config.to_dict().items() if "dropout" in key and type(value) in (int, float)]


def inputs(name, side="none"):
    generator = torch.Generator().manual_seed(1)
    if name in ("VideoMAEModel", "VivitModel"):
        return {"pixel_values": torch.randn(2, 2, 3, 16, 16, generator=generator)}
    if name == "Siglip2VisionModel":
        shapes = torch.tensor([[4, 4], [2, 3], [1, 1], [3, 3]])
        mask = torch.arange(16) < shapes.prod(1, keepdim=True)
        pixels = torch.randn(4, 16, 48, generator=generator)
        return {"pixel_values": pixels, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}
    if name == "WhisperEncoder":
        return {"input_features": torch.randn(2, 8, 24, generator=generator)}
    if name == "ASTModel":
        return {"input_values": torch.randn(2, 16, 8, generator=generator)}
    if family_of(name).masked_at == "encoder" and name not in DOCUMENTS:
        mask = torch.arange(120) < torch.tensor([[120], [50], [30]])
        return {"input_values": torch.randn(3, 120, generator=generator), "attention_mask": mask.long()}
    if name not in TEXTS:
        given = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
        return given | ({"noise": torch.rand(3, 16, generator=generator)} if name == "ViTMAEModel" else {})
    ids = torch.randint(3, 57, (4, L), generator=generator)
    ids, columns = ids.masked_fill(~MASKS[side], 1), torch.arange(L) * MASKS[side]
    if family_of(name).pooled in ("end", "eos"):
        ids.scatter_(1, columns.amax(1, keepdim=True), 59)
    if name == "EsmModel":  # the share of masked tokens counts, among the real ones
        ids[1, columns[1].max()] = 4
    given = {"input_ids": ids, "attention_mask": MASKS[side].long()}
    if name in DOCUMENTS:
        boxes, size = torch.randint(0, 40, (4, L, 4), generator=generator).sort(-1).values, torch.tensor([0, 0, 60, 60])
        given |= {"bbox": boxes[..., [0, 2, 1, 3]] + size, "pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}
    return given


def keep_of(given):
    mask = given.get("attention_mask", given.get("pixel_attention_mask"))
    if mask is not None and "bbox" in given:
        mask = torch.nn.functional.pad(mask, (0, 17), value=1)
    return 1 if mask is None or "input_values" in given else mask[..., None]


def results(model, given):
    """What it gives at real tokens, and what it pools."""
    outputs = model(**given)
    pooled = outputs.get("pooler_output")
    return [outputs.last_hidden_state * keep_of(given), *([] if pooled is None else [pooled])]


def gradients(model, outs):
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, given):
    found, expected = results(ours, given), results(model, given)
    for ours_out, out in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_out, out, rtol=2e-5, atol=2e-5)
    grads, expected_grads = gradients(ours, found), gradients(model, expected)
    assert grads.keys() == expected_grads.keys() and len(grads) > 10
    for key, grad in expected_grads.items():
        error = (grads[key] - grad).abs().max() / grad.abs().max().clamp(min=1)
        assert error < 2e-5, f"{key}: {error}"


def layers_of(name, model):
    encoder = next(m for m in model.modules() if type(m).__name__ == name.split("-")[0])
    return list(family_of(name).layers_of(encoder).values())


@each_case
def test_outputs_and_gradients_are_the_model_s(name, side):
    """In training mode with dropout 0; the first call proves the layers."""
    model, ours = build(name)
    handle = fastattn.accelerate(ours, strict=True)
    for _ in range(2):
        assert_same(model, ours, inputs(name, side))
    assert not handle.report.fallbacks and not handle.report.left


@each_model
def test_inference(name):
    model, ours = (m.eval() for m in build(name))
    handle = fastattn.accelerate(ours, strict=True)
    given = inputs(name, "right")
    for _ in range(2):
        with torch.no_grad():
            out, expected = ours(**given, output_hidden_states=True), model(**given, output_hidden_states=True)
            for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(a * keep_of(given), b * keep_of(given), rtol=2e-5, atol=2e-5)
            alone = ours(**given, return_dict=False)[0] * keep_of(given)
            torch.testing.assert_close(alone, out.last_hidden_state * keep_of(given), rtol=2e-5, atol=2e-5)
        with torch.inference_mode():
            for a, b in zip(results(ours, given), results(model, given), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert not handle.report.fallbacks
    handle.restore()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(results(ours, given), results(model, given), strict=True))


@each_kind
def test_padding_is_taken_out_where_nobody_reads_it(name):
    _, ours = build(name)
    handle = fastattn.accelerate(ours, strict=True)
    results(ours, inputs(name, "right"))
    family = family_of(name)
    assert ("real tokens alone" in str(handle.report)) == family.unpads
    assert list(handle.report.padded) == (["the token that is pooled is padding"] if family.pooled == "last" else [])


@each_model
def test_training_drops_on_the_fast_path(name):
    _, ours = build(name, dropout=0.1)
    handle = fastattn.accelerate(ours, strict=True)
    given = inputs(name, "right")
    torch.manual_seed(5)
    outs = results(ours, given)
    grads = gradients(ours, outs)
    assert all(grad.isfinite().all() for grad in grads.values()) and not handle.report.fallbacks
    torch.manual_seed(5)
    again = results(ours, given)
    torch.testing.assert_close(again, outs)
    assert (outs[0] - results(ours.eval(), given)[0]).abs().max() > 1e-3


@each_kind
def test_dropout_is_where_the_model_has_it(name):
    """Each alone with a rate of 1, by which all that it is of is 0, whoever draws."""
    given, found = inputs(name, "right"), []
    for key in dropouts(build(name)[0].config):
        model, ours = build(name, 1.0, key)
        handle = fastattn.accelerate(ours, strict=True, unpad="never")
        results(ours, given)  # proves the layers
        for a, b in zip(results(ours, given), results(model, given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        found.append((results(model, given)[0] - results(model.eval(), given)[0]).abs().max() > 1e-3)
        assert not handle.report.fallbacks
    assert any(found)


@each_kind
def test_gradient_checkpointing(name):
    grads, dropout = [], 0.1
    for checkpointing in (False, True):
        _, ours = build(name, dropout)
        handle = fastattn.accelerate(ours, strict=family_of(name).hands_on != "nobody")
        given = inputs(name, "right")
        results(ours, given)
        if checkpointing:
            if not ours.supports_gradient_checkpointing:
                pytest.skip("transformers has none for it")
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        grads.append(gradients(ours, results(ours, given)))
    if family_of(name).hands_on == "nobody":
        assert "gradient checkpointing" in next(iter(handle.report.fallbacks))
        return
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-5)


@each_kind
def test_autocast(name):
    model, ours = (m.eval() for m in build(name))
    handle = fastattn.accelerate(ours, strict=True)
    given = inputs(name, "right")
    with torch.no_grad():
        exact = results(model, given)[0]
        with torch.autocast("cpu", torch.bfloat16):
            error, own = ((results(m, given)[0] - exact).norm() for m in (ours, model))
    assert error <= 1.25 * own and not handle.report.fallbacks


@each_kind
@torch.no_grad()
def test_replays_of_graphs(name, capturing):
    """A capture is pretended, as in test_accelerate_graphs.py; the first call proves the layers, and is none."""
    model, ours = (m.eval() for m in build(name))
    handle, given, family = fastattn.accelerate(ours, strict=True, cuda_graphs=True), inputs(name, "right"), family_of(name)
    for _ in range(3):
        for a, b in zip(results(ours, given), results(model, given), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    if family.reads_mask or family.masked_at == "encoder":
        assert handle.report.not_captured == {f"its model reads {family.mask} itself": 3} and not capturing.captures
    else:
        assert (capturing.captures, capturing.replays) == (1, 2) and handle.report.not_captured.total() == 1


@each_kind
def test_a_layer_of_another_class_is_refused(name):
    _, ours = build(name)
    layer = layers_of(name, ours)[0]
    layer.__class__ = type("Mine", (type(layer),), {})
    handle = fastattn.accelerate(ours)
    assert "Mine" in next(iter(handle.report.left.values())) and not handle.report.accelerated


@each_kind
def test_what_is_put_in_or_hooked_later_is_seen(name):
    model, ours = build(name)
    handle = fastattn.accelerate(ours)
    given = inputs(name, "right")
    results(ours, given)
    called = []
    for m in (model, ours):
        layers_of(name, m)[0].get_submodule(family_of(name).parts["out"]).register_forward_hook(
            lambda module, args, out: called.append(1) or out * 1.5
        )
    assert_same(model, ours, given)
    assert list(handle.report.fallbacks) == ["out has hooks, which would not run"]


@each_kind
def test_the_proof_sees_a_wrong_number(name, monkeypatch):
    """A scale that is not the model's: without the proof, outputs differ."""
    scale_of = Family.scale_of
    monkeypatch.setattr(Family, "scale_of", lambda self, attention: 1.1 * scale_of(self, attention))
    model, ours = (m.eval() for m in build(name))
    given = inputs(name, "right")
    handle = fastattn.accelerate(ours)
    with torch.no_grad():
        assert torch.equal(results(ours, given)[0], results(model, given)[0])
        assert "differs from its own code" in str(handle.report)
        handle.restore()
        fastattn.accelerate(ours, prove=False, strict=True)
        assert not torch.allclose(results(ours, given)[0], results(model, given)[0], rtol=1e-4, atol=1e-4)


def test_every_family_is_here():
    tested_before = {"BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel", "DistilBertModel"}
    tested_before |= {"CLIPTextModel", "CLIPVisionModel", "ViTModel", "T5Stack"}
    assert {name.split("-")[0] for name in MODELS} | tested_before == set(FAMILIES)
