"""torch.nn.TransformerEncoder as a model of `benchmarks.models`: hidden states and a padding mask in, hidden states out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

IMPLEMENTATIONS = ("eager", "torch.nn")


class Output(NamedTuple):
    last_hidden_state: Tensor  # (B, L, hidden)


class TorchEncoder(nn.Module):
    """Layers as BERT's, norms behind the sums, by a config with Hugging Face's keys.

    implementation: "torch.nn" is the module as it comes, its fast path for inference included; "eager" computes every product of
    attention by itself, padding too.
    """

    def __init__(self, config: dict, implementation: str) -> None:
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
        sizes = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
        layer = nn.TransformerEncoderLayer(*sizes, config["hidden_dropout_prob"], config["hidden_act"], batch_first=True)
        self.encoder, self.implementation = nn.TransformerEncoder(layer, config["num_hidden_layers"]), implementation
        for name, parameter in self.named_parameters():  # its layers are copies of one, and biases 0
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Output:
        """inputs_embeds (B, L, hidden); attention_mask (B, L), 0 = padding."""
        padding = None if attention_mask is None else ~attention_mask.bool()
        if self.implementation == "torch.nn":
            return Output(self.encoder(inputs_embeds, src_key_padding_mask=padding))
        with _no_fast_path(), sdpa_kernel(SDPBackend.MATH):
            return Output(self.encoder(inputs_embeds, src_key_padding_mask=padding))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
