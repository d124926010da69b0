"""The encoders of transformers that `accelerate` knows, as data: where their layers are, and what is where in a layer.

A family is added by a line of FAMILIES, a `Family` above it if no other fits, and a line of tests/test_accelerate_families.py.
"""

from __future__ import annotations

from torch import nn

from fastattn.integrations.accelerate_parts import Family


def _without(family: Family, *parts: str) -> dict[str, str]:
    return {name: path for name, path in family.parts.items() if name not in parts}


_SELF = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value"}
_BERT = Family(
    "encoder.layer",
    {
        **_SELF,
        "out": "attention.output.dense",
        "first_norm": "attention.output.LayerNorm",
        "second_norm": "output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "activation": "intermediate.intermediate_act_fn",
        "attention": "attention.self",
        "attention_output_dropout": "attention.output.dropout",
        "ffn_output_dropout": "output.dropout",
    },
    head_size="attention_head_size",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=False,
    encoder="encoder",
    packs="encoder",
)
_DISTILBERT = Family(
    "transformer.layer",
    {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "out": "attention.out_lin",
        "first_norm": "sa_layer_norm",
        "second_norm": "output_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "activation": "ffn.activation",
        "attention": "attention",
        "ffn_output_dropout": "ffn.dropout",
    },
    head_size="attention_head_size",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=False,
    encoder="transformer",
    packs="encoder",
)
_SELF_ATTN = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "attention": "self_attn",
}
_CLIP = Family(
    "encoder.layers",
    {
        **_SELF_ATTN,
        "first_norm": "layer_norm1",
        "second_norm": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "activation": "mlp.activation_fn",
    },
    head_size="head_dim",
    scale="scale",
    attention_dropout="dropout",
    pre_norm=True,
    encoder="encoder",
    packs="encoder",
)
_VIT = Family(
    "layers",
    {
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.o_proj",
        "first_norm": "layernorm_before",
        "second_norm": "layernorm_after",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "activation": "mlp.activation_fn",
        "attention": "attention",
        "attention_output_dropout": "dropout",
        "ffn_output_dropout": "dropout",
    },
    head_size="head_dim",
    scale="scaling",
    attention_dropout="attention_dropout",
    pre_norm=True,
)
_T5 = Family(
    "block",
    {
        "query": "layer.0.SelfAttention.q",
        "key": "layer.0.SelfAttention.k",
        "value": "layer.0.SelfAttention.v",
        "out": "layer.0.SelfAttention.o",
        "first_norm": "layer.0.layer_norm",
        "second_norm": "layer.1.layer_norm",
        "down": "layer.1.DenseReluDense.wo",
        "activation": "layer.1.DenseReluDense.act",
        "attention": "layer.0.SelfAttention",
        "attention_output_dropout": "layer.0.dropout",
        "ffn_output_dropout": "layer.1.dropout",
        "hidden_dropout": "layer.1.DenseReluDense.dropout",
    },
    head_size="key_value_proj_dim",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=True,
    packs="layers",
    pooled="none",
    rms="T5LayerNorm",
    hands_bias=True,
    clamps="inside",
    variants=(
        {"up": "layer.1.DenseReluDense.wi"},
        {"up": "layer.1.DenseReluDense.wi_0", "gate": "layer.1.DenseReluDense.wi_1"},
    ),
    optional=(("relative", "layer.0.SelfAttention.relative_attention_bias"),),
)
_CLIP_TEXT = _CLIP._replace(causal=True, pooled="end")
_CLIP_VISION = _CLIP._replace(packs=None, mask=None)
_BLIP_VISION = _CLIP_VISION._replace(
    parts={
        **_without(_CLIP, "query", "key", "value"),
        "joined": "self_attn.qkv",
        "out": "self_attn.projection",
    },
    dropout_called=True,
)
_BLIP_TEXT = _BERT._replace(
    scale=None,
    dropout_called=True,
    decodes=True,
    variants=(
        {
            "cross_query": "crossattention.self.query",
            "cross_key": "crossattention.self.key",
            "cross_value": "crossattention.self.value",
            "cross_out": "crossattention.output.dense",
            "cross_norm": "crossattention.output.LayerNorm",
            "cross_attention": "crossattention.self",
            "cross_output_dropout": "crossattention.output.dropout",
        },
    ),
)
_DINOV2 = _VIT._replace(
    layers="encoder.layer",
    parts={
        **_without(_VIT, "up", "down", "activation", "attention_output_dropout", "ffn_output_dropout"),
        "first_norm": "norm1",
        "second_norm": "norm2",
        "first_scale": "layer_scale1.lambda1",
        "second_scale": "layer_scale2.lambda1",
        "drop_path": "drop_path",
    },
    variants=(  # of the giant one the FFN is gated
        {"up": "mlp.fc1", "down": "mlp.fc2", "activation": "mlp.activation_fn"},
        {"up": "mlp.gate_proj", "gate": "mlp.up_proj", "down": "mlp.down_proj", "activation": "mlp.act_fn"},
    ),
)
_VIDEOMAE = _BERT._replace(
    parts={
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "out": "attention.output.dense",
        "first_norm": "layernorm_before",
        "second_norm": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
        "activation": "intermediate.intermediate_act_fn",
        "attention": "attention.attention",
        "attention_output_dropout": "attention.output.dropout",
        "ffn_output_dropout": "output.dropout",
    },
    attention_dropout="dropout_prob",
    key_unbiased=True,
    pre_norm=True,
    packs=None,
    mask=None,
    hands_on="encoder",
)
_PRE_BERT = _BERT._replace(pre_norm=True)
_ALBERT = _BERT._replace(
    layers="encoder.albert_layer_groups.*.albert_layers",  # each called several times
    parts={
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "out": "attention.dense",
        "first_norm": "attention.LayerNorm",
        "second_norm": "full_layer_layer_norm",
        "up": "ffn",
        "down": "ffn_output",
        "activation": "activation",
        "attention": "attention",
        "attention_output_dropout": "attention.output_dropout",
    },
    attention_dropout="attention_dropout",
)
_XLM_ROBERTA_XL = _PRE_BERT._replace(
    parts={
        **_without(_BERT, "ffn_output_dropout"),
        "first_norm": "attention.self_attn_layer_norm",
        "second_norm": "LayerNorm",
    }
)
_ROBERTA_PRE_LAYER_NORM = _PRE_BERT._replace(
    parts={**_BERT.parts, "first_norm": "attention.LayerNorm", "second_norm": "intermediate.LayerNorm"}
)
_ESM = _PRE_BERT._replace(
    parts={**_without(_BERT, "activation"), "first_norm": "attention.LayerNorm", "second_norm": "LayerNorm"},
    activation="gelu",
    scale=None,
    rotary=True,
    reads_mask=True,
)
_OLD_BERT = _BERT._replace(scale=None, dropout_called=True, tuples=True, hands_on="nobody")
_MEGATRON_BERT = _OLD_BERT._replace(parts={**_BERT.parts, "first_norm": "attention.ln", "second_norm": "ln"}, pre_norm=True)
_LAYOUTLMV3 = _BERT._replace(
    scale=None,
    dropout_called=True,
    packs=None,  # tokens of the image stand behind those of the text, and each pair has a bias
    masked_at="encoder",
    pair_bias=(("rel_pos", "has_relative_attention_bias"), ("rel_2d_pos", "has_spatial_attention_bias")),
    bias_scaled=True,
)
_MPNET = _OLD_BERT._replace(
    parts={
        **_BERT.parts,
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "out": "attention.attn.o",
        "first_norm": "attention.LayerNorm",
        "attention": "attention.attn",
        "attention_output_dropout": "attention.dropout",
    },
    packs="layers",
    hands_on="encoder",
    buckets=(32, 128),
    shared=(("relative", "encoder.relative_attention_bias"),),
)
_BEIT = _VIT._replace(
    parts={**_VIT.parts, "first_scale": "lambda_1", "second_scale": "lambda_2", "drop_path": "drop_path"},
    optional=(("position_bias", "relative_position_bias"),),
    pair_bias=(("attention_mask", None),),
)
_DATA2VEC_VISION = _VIDEOMAE._replace(
    parts={**_VIDEOMAE.parts, "first_scale": "lambda_1", "second_scale": "lambda_2", "drop_path": "drop_path"},
    optional=(("position_bias", "attention.attention.relative_position_bias"),),
    pair_bias=(("relative_position_bias", None),),
    scale=None,
    attention_dropout="dropout",
    hands_on="nobody",
    tuples=True,
)
_BART = Family(
    "layers",
    {
        **_SELF_ATTN,
        "first_norm": "self_attn_layer_norm",
        "second_norm": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
        "activation": "activation_fn",
        "attention_output_dropout": "dropout",
        "ffn_output_dropout": "dropout",
        "hidden_dropout": "activation_dropout",
    },
    head_size="head_dim",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=False,
    packs="layers",
    pooled="none",
    clamps="overflows",
)
_PRE_BART = _BART._replace(pre_norm=True, clamps="always")
_WAV2VEC2 = Family(
    "encoder.layers",
    {
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.out_proj",
        "first_norm": "layer_norm",
        "second_norm": "final_layer_norm",
        "up": "feed_forward.intermediate_dense",
        "down": "feed_forward.output_dense",
        "activation": "feed_forward.intermediate_act_fn",
        "attention": "attention",
        "attention_output_dropout": "dropout",
        "ffn_output_dropout": "feed_forward.output_dropout",
        "hidden_dropout": "feed_forward.intermediate_dropout",
    },
    head_size="head_dim",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=False,
    encoder="encoder",
    masked_at="encoder",
    stable="do_stable_layer_norm",
    absent=("adapter_layer",),
)
_MODERNBERT = Family(
    "layers",
    {
        "joined": "attn.Wqkv",
        "out": "attn.Wo",
        "first_norm": "attn_norm",
        "second_norm": "mlp_norm",
        "up": "mlp.Wi",
        "down": "mlp.Wo",
        "activation": "mlp.act",
        "attention": "attn",
        "attention_output_dropout": "attn.out_drop",
        "hidden_dropout": "mlp.drop",
    },
    head_size="head_dim",
    scale=None,
    attention_dropout="attention_dropout",
    pre_norm=True,
    packs="layers",
    rotary=True,
    window="sliding_window",
    gated=True,
)
_NOMIC_BERT = Family(
    "layers",
    {
        **_SELF_ATTN,
        "out": "self_attn.o_proj",
        "first_norm": "post_attention_layernorm",
        "second_norm": "post_mlp_layernorm",
        "up": "mlp.gate_proj",
        "gate": "mlp.up_proj",
        "down": "mlp.down_proj",
        "activation": "mlp.act_fn",
        "attention_output_dropout": "post_attention_dropout",
        "ffn_output_dropout": "post_mlp_dropout",
    },
    head_size="head_dim",
    scale="scaling",
    attention_dropout="attention_dropout",
    pre_norm=False,
    packs="layers",
    rotary=True,
)
_GTE = _NOMIC_BERT._replace(parts={**_NOMIC_BERT.parts, "hidden_dropout": "mlp.dropout"})
_JINA_V3 = _NOMIC_BERT._replace(
    parts={**_without(_NOMIC_BERT, "gate"), "up": "mlp.fc1", "down": "mlp.fc2", "activation": "mlp.activation_fn"}
)
_EUROBERT = _NOMIC_BERT._replace(
    parts={
        **_without(_NOMIC_BERT, "attention_output_dropout", "ffn_output_dropout"),
        "first_norm": "input_layernorm",
        "second_norm": "post_attention_layernorm",
    },
    pre_norm=True,
    rms="RMSNorm",
    grouped=True,
)
_DINOV3 = _DINOV2._replace(
    layers="model.layer",
    attention_dropout="dropout",
    mask=None,
    rotary=True,
    variants=(
        {"up": "mlp.gate_proj", "gate": "mlp.up_proj", "down": "mlp.down_proj", "activation": "mlp.act_fn"},
        {"up": "mlp.up_proj", "down": "mlp.down_proj", "activation": "mlp.act_fn"},
    ),
)
_AIMV2_VISION = _CLIP_VISION._replace(
    parts={
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.out_proj",
        "attention": "attention",
        "first_norm": "rms_norm1",
        "second_norm": "rms_norm2",
        "up": "ffn.gate_proj",
        "gate": "ffn.up_proj",
        "down": "ffn.down_proj",
        "activation": "ffn.act_fn",
    },
    rms="RMSNorm",
)
FAMILIES = {
    **dict.fromkeys(("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel"), _BERT),
    "DistilBertModel": _DISTILBERT,
    **dict.fromkeys(("CLIPTextModel", "CLIPSegTextModel", "XCLIPTextModel"), _CLIP_TEXT),
    "MetaClip2TextModel": _CLIP_TEXT._replace(pooled="eos"),
    **dict.fromkeys(("CLIPVisionModel", "CLIPSegVisionModel", "MetaClip2VisionModel"), _CLIP_VISION),
    **dict.fromkeys(("AltCLIPVisionModel", "ChineseCLIPVisionModel", "SiglipVisionModel"), _CLIP_VISION),
    "BlipVisionModel": _BLIP_VISION,
    **dict.fromkeys(("SiglipTextModel", "Siglip2TextModel"), _CLIP._replace(pooled="last")),
    "Siglip2VisionModel": _CLIP._replace(mask="pixel_attention_mask", reads_mask=True, pooled="none"),
    **dict.fromkeys(("ErnieModel", "RoCBertModel", "BertGenerationEncoder", "Data2VecTextModel"), _BERT),
    **dict.fromkeys(("ChineseCLIPTextModel", "ClapTextModel"), _BERT),
    # these warn where a mask is missing
    **dict.fromkeys(("AlignTextModel", "LayoutLMModel", "MarkupLMModel", "SplinterModel"), _BERT._replace(reads_mask=True)),
    "LayoutLMv3Model": _LAYOUTLMV3,
    "AltRobertaModel": _BERT._replace(layers="encoder.layers"),
    "BlipTextModel": _BLIP_TEXT,
    "AlbertModel": _ALBERT,
    "XLMRobertaXLModel": _XLM_ROBERTA_XL,
    "RobertaPreLayerNormModel": _ROBERTA_PRE_LAYER_NORM,
    "RemBertModel": _OLD_BERT,
    "MegatronBertModel": _MEGATRON_BERT,
    "MPNetModel": _MPNET,
    "EsmModel": _ESM,
    "ModernBertModel": _MODERNBERT,
    "NomicBertModel": _NOMIC_BERT,
    "GteModel": _GTE,
    "JinaEmbeddingsV3Model": _JINA_V3,
    "EuroBertModel": _EUROBERT,
    **dict.fromkeys(("ViTModel", "DeiTModel", "ViTMAEModel", "ViTMSNModel", "IJepaModel"), _VIT),
    **dict.fromkeys(("Dinov2Model", "Dinov2WithRegistersModel"), _DINOV2),
    "DINOv3ViTModel": _DINOV3,
    "Aimv2VisionModel": _AIMV2_VISION,
    "VideoMAEModel": _VIDEOMAE,
    "BeitModel": _BEIT,
    "Data2VecVisionModel": _DATA2VEC_VISION,
    **dict.fromkeys(("ASTModel", "VivitModel"), _VIT),
    **dict.fromkeys(("T5Stack", "MT5Stack"), _T5),
    "UMT5Stack": _T5._replace(hands_bias=False),
    **dict.fromkeys(("BartEncoder", "PLBartEncoder", "MarianEncoder"), _BART),
    **dict.fromkeys(("MBartEncoder", "PegasusEncoder", "M2M100Encoder", "BlenderbotEncoder"), _PRE_BART),
    "WhisperEncoder": _PRE_BART._replace(mask=None, packs=None),
    **dict.fromkeys(("Wav2Vec2Model", "UniSpeechModel", "UniSpeechSatModel"), _WAV2VEC2),
    "Data2VecAudioModel": _WAV2VEC2._replace(stable=None),
    "HubertModel": _WAV2VEC2._replace(hands_on="encoder"),
}


def own_class(module: nn.Module) -> type | None:
    """transformers' class that a module is of, or derives from, if it is one that is served; transformers itself need not be
    installed."""
    return next(
        (c for c in type(module).__mro__ if c.__module__.startswith("transformers.models.") and c.__name__ in FAMILIES), None
    )
