"""One encoder of each kind that `accelerate` knows: the layers of a common checkpoint, two of them, with random weights.

Sizes are the defaults of transformers' config classes, which are those of a base checkpoint; where they are not, the case has
the checkpoint's. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import shapes

FILL = 0.5  # share of real tokens, where there is padding
RATE = 16000  # samples of a second
Inputs = dict[str, Tensor]


class Case(NamedTuple):
    name: str  # transformers' class
    module: str  # where that is, below transformers.models
    given: Callable[[Any, int], Inputs]  # (config, batch) -> what it is called with
    batch: int = 8
    options: dict[str, Any] = {}  # of the config, where its defaults are not those of the checkpoint
    layers: int = 2
    length: int | None = None  # of what the first layer is given, where the last gives less

    def transformers_class(self) -> Any:
        """Raises ImportError or AttributeError where this transformers has none."""
        path = self.module if "." in self.module else f"{self.module}.modeling_{self.module}"
        return getattr(importlib.import_module(f"transformers.models.{path}"), self.name)

    def config(self, cls: Any) -> tuple[Any, int]:
        """(the config, with a few of its layers; how many they were). Those of a model in stages are all kept."""
        config = cls.config_class(**self.options)
        if hasattr(config, "depths"):
            return config, sum(config.depths)
        full = config.num_hidden_layers
        config.num_hidden_layers = min(self.layers, full)
        return config, full


def build(cls: Any, config: Any) -> nn.Module:
    """Seeded weights. What transformers begins with a constant (biases, norms, scales, tables of positions) is random as well,
    so that the accuracy gate sees it."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def text(config: Any, batch: int, length: int = 128) -> Inputs:
    """Token ids with padding on the right; the last real one ends the text, where the config names such a token."""
    lengths = shapes.ragged_lengths(batch, length, FILL)[:, None]
    place = torch.arange(length)
    ids = torch.randint(5, min(30000, config.vocab_size - 8), (batch, length), generator=_generator())
    if config.eos_token_id is not None:
        ids = ids.masked_fill(place == lengths - 1, config.eos_token_id)
    ids = ids.masked_fill(place >= lengths, config.pad_token_id or 0)
    return {"input_ids": ids, "attention_mask": (place < lengths).long()}


def document(config: Any, batch: int) -> Inputs:
    """A text whose tokens have boxes on a page, and the page's image."""
    given = text(config, batch)
    corners = torch.randint(0, 1000, (batch, 128, 2, 2), generator=_generator()).sort(-2).values
    return given | {"bbox": corners.flatten(-2)} | images(config, batch, config.input_size)


def images(config: Any, batch: int, size: int | None = None) -> Inputs:
    size = config.image_size if size is None else size
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=_generator())}


def video(config: Any, batch: int) -> Inputs:
    size = config.image_size
    return {"pixel_values": torch.randn(batch, config.num_frames, 3, size, size, generator=_generator())}


def spectrogram(config: Any, batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, config.max_length, config.num_mel_bins, generator=_generator())}


def ten_seconds(config: Any, batch: int) -> Inputs:
    """CLAP's spectrogram."""
    return {"input_features": torch.randn(batch, 1, 1001, config.num_mel_bins, generator=_generator())}


def half_a_minute(config: Any, batch: int) -> Inputs:
    """Whisper's spectrogram: it takes no other length."""
    return {"input_features": torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=_generator())}


def sound(config: Any, batch: int) -> Inputs:
    """Samples of clips of up to a second."""
    lengths = shapes.ragged_lengths(batch, RATE, FILL)[:, None]
    mask = torch.arange(RATE) < lengths
    return {"input_values": torch.randn(batch, RATE, generator=_generator()) * mask, "attention_mask": mask.long()}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


ALBERT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}  # albert-base-v2
ESM_2 = {  # of 150M parameters
    "hidden_size": 640, "num_attention_heads": 20, "intermediate_size": 2560, "num_hidden_layers": 30,
    "position_embedding_type": "rotary", "emb_layer_norm_before": False, "token_dropout": True,
    "vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32,
}  # fmt: skip
XLM = {"emb_dim": 1024, "n_heads": 8, "n_layers": 6}  # xlm-clm-ende-1024
T5 = {"d_model": 768, "num_heads": 12, "d_ff": 3072, "num_layers": 12}  # t5-base
BART = {"d_model": 768, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072, "encoder_layers": 6}  # bart-base
WHISPER = {"d_model": 512, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layers": 6}  # whisper-base
BEIT = {"use_relative_position_bias": True}  # beit-base, data2vec-vision-base
CASES = (
    Case("BertModel", "bert", text),
    Case("DistilBertModel", "distilbert", text),
    Case("AlbertModel", "albert", text, options=ALBERT),
    Case("MPNetModel", "mpnet", text),
    Case("LayoutLMv3Model", "layoutlmv3", document, batch=2),
    Case("XLMModel", "xlm", text, options=XLM),
    Case("RobertaPreLayerNormModel", "roberta_prelayernorm", text),
    Case("EsmModel", "esm", text, options=ESM_2),
    Case("ModernBertModel", "modernbert", text),
    Case("NomicBertModel", "nomic_bert", text),
    Case("T5EncoderModel", "t5", text, options=T5),
    Case("BartEncoder", "bart", text, options=BART),
    Case("CLIPTextModel", "clip", functools.partial(text, length=77)),
    Case("CLIPVisionModel", "clip", images),
    Case("SiglipVisionModel", "siglip", images, batch=4),
    Case("BlipVisionModel", "blip", images, batch=2),
    Case("ViTModel", "vit", images, batch=4),
    Case("DeiTModel", "deit", images, batch=4),
    Case("Dinov2Model", "dinov2", images, batch=4),
    Case("DINOv3ViTModel", "dinov3_vit", images, options={"num_register_tokens": 4}),
    Case("BeitModel", "beit", images, batch=4, options=BEIT),
    Case("Data2VecVisionModel", "data2vec.modeling_data2vec_vision", images, batch=4, options=BEIT),
    Case("VideoMAEModel", "videomae", video, batch=2, options={"num_frames": 4}),
    Case("ASTModel", "audio_spectrogram_transformer", spectrogram, batch=1),
    Case("ClapAudioModel", "clap", ten_seconds, batch=1, length=4096),
    Case("WhisperEncoder", "whisper", half_a_minute, batch=1, options=WHISPER),
    Case("Wav2Vec2Model", "wav2vec2", sound, batch=4, layers=12),  # with two, convolutions would be most of it
    Case("HubertModel", "hubert", sound, batch=4, layers=12),
)
