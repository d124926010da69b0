"""BERT (Devlin et al., 2018, arXiv:1810.04805), plain and whole in one file, with Hugging Face's weights, names and outputs.

B, N, C: batch, tokens, hidden size; T: rows of a packed batch. Layers take (B, N, C) and (T, C). `implementation` chooses what
computes the blocks: see `implementations.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models import checkpoint, tokens
from fastattn.models.implementations import Ops, activation_of, choose
from fastattn.packing import Packing


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        checkpoint.check_heads(self)
        activation_of(self.hidden_act)

    @classmethod
    def read(cls, config: Any) -> BertConfig:
        """From the dictionary of a config.json, or Hugging Face's BertConfig. Keys that change nothing here are ignored.

        Raises NotImplementedError for one that would: a decoder, cross attention, relative positions, pruned heads.
        """
        if isinstance(config, cls):
            return config
        raw = checkpoint.settings(config, "bert")
        if raw.get("position_embedding_type", "absolute") != "absolute":
            raise NotImplementedError(
                f"position_embedding_type {raw['position_embedding_type']!r} is not served, only 'absolute'"
            )
        for key in ("is_decoder", "add_cross_attention", "pruned_heads"):
            if raw.get(key):
                raise NotImplementedError(f"{key} = {raw[key]!r} is not served: this is an encoder with all its heads")
        return cls(**checkpoint.known(cls, raw))


class BertModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, N, C), or (T, C)
    pooler_output: Tensor | None  # (B, C)


class MaskedLMOutput(NamedTuple):
    logits: Tensor  # (B, N, vocab_size), or (T, vocab_size)


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, C, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, C)
        self.LayerNorm = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob
        self.ops = ops

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None, packing: Packing | None
    ) -> Tensor:
        if position_ids is None:
            position_ids = tokens.positions(input_ids, packing, self.position_embeddings.num_embeddings)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        norm = self.LayerNorm
        return F.dropout(self.ops.add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps), self.dropout, self.training)


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        C = config.hidden_size
        self.query = nn.Linear(C, C)
        self.key = nn.Linear(C, C)
        self.value = nn.Linear(C, C)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.ops = ops

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        q, k, v = (
            self.ops.linear(x, proj.weight, proj.bias).unflatten(-1, (self.heads, -1))
            for proj in (self.query, self.key, self.value)
        )
        out = self.ops.attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return out.flatten(-2)


class BertOutput(nn.Module):
    """The end of both halves of a layer, after a linear map: LayerNorm(dropout(x) + residual)."""

    def __init__(self, config: BertConfig, ops: Ops, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        norm = self.LayerNorm
        dropout = self.dropout if self.training else 0.0
        return self.ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout=dropout)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, ops)
        self.output = BertOutput(config, ops, config.hidden_size)
        self.ops = ops

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        dense = self.output.dense
        return self.output(self.ops.linear(self.self(x, mask), dense.weight, dense.bias), x)


class BertIntermediate(nn.Module):
    """Holds the first linear map of the feed-forward block, under Hugging Face's name."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.attention = BertAttention(config, ops)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, ops, config.intermediate_size)
        self.activation = activation_of(config.hidden_act)
        self.ops = ops

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        x = self.attention(x, mask)
        up, down = self.intermediate.dense, self.output.dense
        return self.output(self.ops.ffn(x, up.weight, up.bias, down.weight, down.bias, activation=self.activation), x)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config, ops) for _ in range(config.num_hidden_layers)])

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.ops = ops

    def forward(self, first: Tensor) -> Tensor:
        """first (B, C): the hidden state of the first token of each sequence."""
        return torch.tanh(self.ops.linear(first, self.dense.weight, self.dense.bias))


class BertModel(nn.Module):
    """The encoder. `config` is a BertConfig, Hugging Face's, or the dictionary of a config.json.

    A new model has random weights and is in training mode; `from_pretrained` gives one in evaluation mode.
    `fastattn.graphs.graphed(model)` replays its inference calls as CUDA graphs.
    """

    def __init__(self, config: Any, implementation: str | Ops = "fastattn", add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = BertConfig.read(config)
        self.ops = choose(implementation)
        self.embeddings = BertEmbeddings(self.config, self.ops)
        self.encoder = BertEncoder(self.config, self.ops)
        self.pooler = BertPooler(self.config, self.ops) if add_pooling_layer else None
        initialize(self, self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
    ) -> BertModelOutput:
        """input_ids (B, N) integers; attention_mask (B, N), integers or bools, 1 = a real token, None = all are.

        token_type_ids (B, N), default 0; position_ids (B, N) or (1, N), default 0 .. N - 1. Padding may be on either side.

        With a packing all of these are packed, (T,), and attention_mask is None; position_ids are by default the columns of the
        padded batch. last_hidden_state is (T, C), 0 in rows of no sequence; the pooler takes the first row of each sequence,
        and 0 for one without tokens.
        """
        keep = tokens.key_mask(attention_mask, input_ids, packing)
        mask = self.ops.mask(keep, False, input_ids.shape[-1], input_ids.device, packing)
        x = self.encoder(self.embeddings(input_ids, token_type_ids, position_ids, packing), mask)
        x = tokens.cleared(x, packing)
        if self.pooler is None:
            return BertModelOutput(x, None)
        first = x[:, 0] if packing is None else tokens.take(x, packing.cu_seqlens[:-1], packing)
        return BertModelOutput(x, self.pooler(first))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, implementation: str | Ops = "fastattn", add_pooling_layer: bool = True
    ) -> BertModel:
        """Load config.json and model.safetensors; weights may be those of a model with a head, under the prefix "bert.".

        Raises ValueError naming weights that are missing: a checkpoint of BertForMaskedLM has no pooler and needs
        add_pooling_layer=False. Heads are left out, an unknown weight of the encoder raises (see `assign_weights`).
        """
        config = BertConfig.read(checkpoint.read_config(directory))
        with torch.device("meta"):
            model = cls(config, implementation, add_pooling_layer)
        stored = {name.removeprefix("bert."): tensor for name, tensor in _read_weights(directory).items()}
        checkpoint.assign_weights(model, stored, ("embeddings.", "encoder."))
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        checkpoint.save(self, _config_json(self), directory)


class BertPredictionTransform(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = activation_of(config.hidden_act)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        norm = self.LayerNorm
        x = self.ops.linear(x, self.dense.weight, self.dense.bias, activation=self.activation)
        return self.ops.add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)


class BertPredictions(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.transform = BertPredictionTransform(config, ops)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's own, unless embeddings are not tied
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(self.transform(x), self.decoder.weight, self.decoder.bias)


class BertHead(nn.Module):
    def __init__(self, config: BertConfig, ops: Ops) -> None:
        super().__init__()
        self.predictions = BertPredictions(config, ops)


class BertForMaskedLM(nn.Module):
    """The encoder with the masked-language-model head; the decoder shares its weight with the word embeddings.

    `fastattn.graphs.graphed(model)` replays its inference calls as CUDA graphs.
    """

    def __init__(self, config: Any, implementation: str | Ops = "fastattn") -> None:
        super().__init__()
        self.config = BertConfig.read(config)
        self.ops = choose(implementation)
        self.bert = BertModel(self.config, self.ops, add_pooling_layer=False)
        self.cls = BertHead(self.config, self.ops)
        initialize(self.cls, self.config)
        if self.config.tie_word_embeddings:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
            self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
    ) -> MaskedLMOutput:
        """The arguments are `BertModel.forward`'s; with a packing, logits are (T, vocab_size), 0 in rows of no sequence."""
        x = self.bert(input_ids, attention_mask, token_type_ids, position_ids, packing=packing).last_hidden_state
        return MaskedLMOutput(tokens.cleared(self.cls.predictions(x), packing))

    @classmethod
    def from_pretrained(cls, directory: str | Path, implementation: str | Ops = "fastattn") -> BertForMaskedLM:
        """Load config.json and model.safetensors, whose encoder may lie under the prefix "bert." or under none.

        Raises ValueError naming weights that are missing, such as the head's in a checkpoint of the encoder alone. A pooler
        and other heads are left out.
        """
        config = BertConfig.read(checkpoint.read_config(directory))
        with torch.device("meta"):
            model = cls(config, implementation)
        bare = ("embeddings.", "encoder.", "pooler.")
        stored = {f"bert.{k}" if k.startswith(bare) else k: tensor for k, tensor in _read_weights(directory).items()}
        checkpoint.assign_weights(model, stored, ("bert.embeddings.", "bert.encoder."))
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        checkpoint.save(self, _config_json(self), directory)


def initialize(module: nn.Module, config: BertConfig) -> None:
    """BERT's initial weights: normal for matrices, with a row of zeros for padding, and zero for biases."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=config.initializer_range)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


def _read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The stored weights; the oldest checkpoints call the two of a LayerNorm gamma and beta."""
    names = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    weights = {}
    for name, tensor in checkpoint.read_weights(directory).items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor
    return weights


def _config_json(model: BertModel | BertForMaskedLM) -> dict[str, Any]:
    return {"architectures": [type(model).__name__], "model_type": "bert", **dataclasses.asdict(model.config)}
