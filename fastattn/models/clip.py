"""CLIP (Radford et al., 2021, arXiv:2103.00020), plain and whole in one file, with Hugging Face's weights, names and outputs.

B, N, C: batch, tokens, hidden size of a tower; T: rows of packed texts. Layers take (B, N, C) and (T, C). `implementation`
chooses what computes the blocks: see `implementations.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.models import checkpoint, tokens
from fastattn.models.implementations import Ops, activation_of, choose
from fastattn.packing import Packing


@dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        checkpoint.check_heads(self)
        activation_of(self.hidden_act)
        if not isinstance(self.eos_token_id, int):
            raise NotImplementedError(f"eos_token_id must be one integer, got {self.eos_token_id!r}")


@dataclass(frozen=True)
class CLIPVisionConfig:
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        checkpoint.check_heads(self)
        activation_of(self.hidden_act)
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise NotImplementedError(f"{name} must be one integer, a square; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class CLIPConfig:
    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07), the paper's initial temperature

    @classmethod
    def read(cls, config: Any) -> CLIPConfig:
        """From the dictionary of a config.json, or Hugging Face's CLIPConfig. Keys that change nothing here are ignored.

        Old files also hold `text_config_dict` and `vision_config_dict`; where present they count, as in Hugging Face.
        """
        if isinstance(config, cls):
            return config
        raw = checkpoint.settings(config, "clip")
        for tower, config_class in (("text", CLIPTextConfig), ("vision", CLIPVisionConfig)):
            given = raw.get(f"{tower}_config_dict")
            if given is None:
                given = raw.get(f"{tower}_config") or {}
            given = checkpoint.settings(given, f"clip_{tower}_model")
            raw[f"{tower}_config"] = config_class(**checkpoint.known(config_class, given))
        return cls(**checkpoint.known(cls, raw))


class TowerOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, N, C), or (T, C)
    pooler_output: Tensor  # (B, C), or (B, projection_dim) from get_text_features and get_image_features


class CLIPOutput(NamedTuple):
    logits_per_image: Tensor  # (images, texts)
    logits_per_text: Tensor  # (texts, images)
    text_embeds: Tensor  # (texts, projection_dim), of norm 1
    image_embeds: Tensor  # (images, projection_dim), of norm 1
    text_model_output: TowerOutput
    vision_model_output: TowerOutput


class CLIPAttention(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, ops: Ops) -> None:
        super().__init__()
        C = config.hidden_size
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.q_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.ops = ops

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        q, k, v = (
            self.ops.linear(x, proj.weight, proj.bias).unflatten(-1, (self.heads, -1))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.ops.attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.ops.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, ops: Ops) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation_of(config.hidden_act)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return self.ops.ffn(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)


class CLIPLayer(nn.Module):
    """A pre-norm layer that leaves its last addition to the norm that follows: it takes and returns (x, residual)."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, ops: Ops) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config, ops)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config, ops)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None, mask: Any) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(x, residual, self.layer_norm1)
        x, residual = self.norm(self.self_attn(x, mask), residual, self.layer_norm2)
        return self.mlp(x), residual

    def norm(self, x: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The LayerNorm of x + residual, and x + residual itself."""
        return self.ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, return_sum=True)


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, ops: Ops) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPLayer(config, ops) for _ in range(config.num_hidden_layers)])

    def forward(self, x: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        """Two tensors whose sum is the result, the second None if there are no layers."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, mask)
        return x, residual


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        places = tokens.positions(input_ids, packing, self.position_embedding.num_embeddings)
        return self.token_embedding(input_ids) + self.position_embedding(places)


class CLIPTextModel(nn.Module):
    def __init__(self, config: CLIPTextConfig, ops: Ops) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config, ops)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id
        self.ops = ops

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, packing: Packing | None = None) -> TowerOutput:
        keep = tokens.key_mask(attention_mask, input_ids, packing)
        mask = self.ops.mask(keep, True, input_ids.shape[-1], input_ids.device, packing)
        x, residual = self.encoder(self.embeddings(input_ids, packing), mask)
        norm = self.final_layer_norm
        x = tokens.cleared(self.ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps), packing)
        end = self.end_of_text(input_ids, packing)
        if packing is not None:
            return TowerOutput(x, tokens.take(x, end, packing))
        return TowerOutput(x, x[torch.arange(len(x), device=x.device), end])

    def end_of_text(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        """(B,) the position, or the row where packed, that stands for a text: the first end-of-text token, its tokenizer's.

        The first checkpoints were published with an eos_token_id of 2, which is not their end of text; that is the largest id.
        """
        score = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).long()
        if packing is None:
            return score.argmax(-1)
        if packing.max_length == 0:
            return packing.cu_seqlens[:-1]  # no text has a token
        columns = packing.unpack(score + 1).argmax(-1, keepdim=True)  # at padding 0, less than at any token
        rows = torch.arange(packing.capacity, device=input_ids.device)
        return packing.unpack(rows).gather(1, columns)[:, 0]


class CLIPVisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        C, p = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(config.num_channels, C, kernel_size=p, stride=p, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // p) ** 2 + 1, C)
        self.image_shape = (config.num_channels, config.image_size, config.image_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if tuple(pixel_values.shape[1:]) != self.image_shape:
            raise ValueError(f"pixel_values must have shape (B, *{self.image_shape}), got {tuple(pixel_values.shape)}")
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPVisionModel(nn.Module):
    def __init__(self, config: CLIPVisionConfig, ops: Ops) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt as in the weights
        self.encoder = CLIPEncoder(config, ops)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ops = ops

    def forward(self, pixel_values: Tensor) -> TowerOutput:
        x = self.embeddings(pixel_values)
        norm = self.pre_layrnorm
        x = self.ops.add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)
        x, residual = self.encoder(x, self.ops.mask(None, False, x.shape[1], x.device))
        x = x if residual is None else residual + x
        norm = self.post_layernorm
        return TowerOutput(x, self.ops.add_layer_norm(x[:, 0], None, norm.weight, norm.bias, eps=norm.eps))


class CLIPModel(nn.Module):
    """Both towers. `config` is a CLIPConfig, Hugging Face's, or the dictionary of a config.json.

    A new model has random weights and is in training mode; `from_pretrained` gives one in evaluation mode.
    `fastattn.graphs.graphed(model)` replays its inference calls as CUDA graphs, and so `graphed(model.get_text_features)`.
    """

    def __init__(self, config: Any, implementation: str | Ops = "fastattn") -> None:
        super().__init__()
        self.config = CLIPConfig.read(config)
        self.ops = choose(implementation)
        text, vision = self.config.text_config, self.config.vision_config
        self.text_model = CLIPTextModel(text, self.ops)
        self.vision_model = CLIPVisionModel(vision, self.ops)
        self.visual_projection = nn.Linear(vision.hidden_size, self.config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, self.config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(self.config.logit_scale_init_value)))
        initialize(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        packing: Packing | None = None,
    ) -> CLIPOutput:
        """input_ids (texts, N) integers; pixel_values (images, channels, image_size, image_size).

        attention_mask (texts, N), integers or bools, 1 = a real token, None = all are. With a packing of the texts, input_ids is
        packed, (T,), attention_mask None, and the last_hidden_state of texts (T, C), 0 in rows of no text; a text without tokens
        has embeddings of 0. For one of the two kinds of input there are get_text_features and get_image_features.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing: forward compares images with texts; for images alone see get_image_features")
        if pixel_values is None:
            raise ValueError("pixel_values is missing: forward compares texts with images; for texts alone see get_text_features")
        vision, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask, packing=packing)
        image_embeds, text_embeds = (normalized(x) for x in (vision.pooler_output, text.pooler_output))
        logits_per_text = text_embeds @ image_embeds.mT * self.logit_scale.exp()
        return CLIPOutput(logits_per_text.mT, logits_per_text, text_embeds, image_embeds, text, vision)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, packing: Packing | None = None
    ) -> TowerOutput:
        """The text tower, its pooler_output projected to (texts, projection_dim), not normalized."""
        x, pooled = self.text_model(input_ids, attention_mask, packing)
        return TowerOutput(x, self.ops.linear(pooled, self.text_projection.weight, None))

    def get_image_features(self, pixel_values: Tensor) -> TowerOutput:
        """The vision tower, its pooler_output projected to (images, projection_dim), not normalized."""
        x, pooled = self.vision_model(pixel_values)
        return TowerOutput(x, self.ops.linear(pooled, self.visual_projection.weight, None))

    @classmethod
    def from_pretrained(cls, directory: str | Path, implementation: str | Ops = "fastattn") -> CLIPModel:
        """Load config.json and model.safetensors. Missing weights, and unknown ones of a tower, raise ValueError naming them."""
        config = CLIPConfig.read(checkpoint.read_config(directory))
        with torch.device("meta"):
            model = cls(config, implementation)
        checkpoint.assign_weights(model, checkpoint.read_weights(directory), ("text_model.", "vision_model."))
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        config = dataclasses.asdict(self.config)
        config["text_config"]["model_type"] = "clip_text_model"
        config["vision_config"]["model_type"] = "clip_vision_model"
        checkpoint.save(self, {"architectures": ["CLIPModel"], "model_type": "clip", **config}, directory)


def normalized(x: Tensor) -> Tensor:
    """x (B, C) of norm 1; 0 stays 0, with a finite gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def initialize(model: CLIPModel) -> None:
    """Initial weights with the standard deviations of the paper's code: by width, and by depth where a residual is added to."""
    for part in model.modules():
        if isinstance(part, (nn.Embedding, nn.Conv2d)):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, CLIPVisionEmbeddings):
            nn.init.normal_(part.class_embedding, std=part.class_embedding.numel() ** -0.5)
    for tower in (model.text_model, model.vision_model):
        depth = len(tower.encoder.layers)
        for part in tower.modules():
            if isinstance(part, CLIPAttention):
                nn.init.normal_(part.out_proj.weight, std=(2 * depth * part.out_proj.in_features) ** -0.5)
            elif isinstance(part, CLIPMLP):
                nn.init.normal_(part.fc1.weight, std=(2 * part.fc1.in_features) ** -0.5)
                nn.init.normal_(part.fc2.weight, std=(2 * depth * part.fc1.in_features) ** -0.5)
