"""Layers by fastattn's ops, with the constructors, state dicts and numbers of torch.nn's, and what torch.nn has not."""

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.convert import convert
from fastattn.nn.decoder import DecoderLayer
from fastattn.nn.encoder import Encoder, EncoderLayer
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.parallel import tensor_parallel_plan
from fastattn.nn.rotary import Rotary

__all__ = [
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "MultiHeadAttention",
    "Rotary",
    "convert",
    "tensor_parallel_plan",
]
