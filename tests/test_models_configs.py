"""The models' configs against Hugging Face's: what is read, what is ignored, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastattn.models.bert import BertConfig, BertModel
from fastattn.models.clip import CLIPConfig, CLIPModel

transformers = pytest.importorskip("transformers")

BERT = transformers.BertConfig(vocab_size=50, hidden_size=36, hidden_act="relu", tie_word_embeddings=False, pad_token_id=None)
CLIP = transformers.CLIPConfig(
    text_config={"vocab_size": 50, "hidden_size": 32, "eos_token_id": 49, "bos_token_id": 1},
    vision_config={"image_size": 8, "patch_size": 2, "hidden_size": 48, "attention_dropout": 0.5},
    projection_dim=24,
)


def test_configs_are_read_as_transformers_writes_them():
    for hugging, config_class in ((BERT, BertConfig), (CLIP, CLIPConfig)):
        config = config_class.read(json.loads(hugging.to_json_string()))
        assert config == config_class.read(hugging) == config_class.read(config)
        written = hugging.to_dict()
        for name, value in dataclasses.asdict(config).items():
            expected = {key: written[name][key] for key in value} if isinstance(value, dict) else written[name]
            assert value == expected, name


def test_config_defaults_are_those_of_transformers():
    for config, hugging in ((BertConfig(), transformers.BertConfig()), (CLIPConfig(), transformers.CLIPConfig())):
        assert config == type(config).read(hugging)


def test_old_clip_configs():
    old = {"text_config": {"hidden_size": 64, "eos_token_id": 2}, "text_config_dict": {"hidden_size": 32}, "vision_config": {}}
    config = CLIPConfig.read(old)
    assert config == CLIPConfig.read(transformers.CLIPConfig(**old))
    assert (config.text_config.hidden_size, config.text_config.eos_token_id) == (32, 49407)


@pytest.mark.parametrize(
    "change",
    [
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"model_type": "roberta"},
        {"hidden_act": "mish"},
    ],
)
def test_what_changes_the_mathematics_is_refused(change):
    (name,) = change
    with pytest.raises(NotImplementedError, match=name):
        BertConfig.read({"model_type": "bert"} | change)
    assert BertConfig.read({"model_type": "bert", "use_cache": True, "gradient_checkpointing": False}) == BertConfig()


def test_clip_configs_that_are_refused():
    for change, name in (
        ({"model_type": "siglip"}, "siglip"),
        ({"text_config": {"hidden_act": "mish"}}, "mish"),
        ({"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id"),
        ({"vision_config": {"image_size": [8, 16]}}, "image_size"),
    ):
        with pytest.raises(NotImplementedError, match=name):
            CLIPConfig.read(change)
    with pytest.raises(ValueError, match="hidden_size 33 is not a multiple"):
        CLIPConfig.read({"vision_config": {"hidden_size": 33}})


@pytest.mark.parametrize("model", [BertModel, CLIPModel])
def test_a_folder_that_is_not_there(model):
    with pytest.raises(FileNotFoundError, match="there is no folder bert-base-uncased: .* nothing is downloaded"):
        model.from_pretrained("bert-base-uncased")
