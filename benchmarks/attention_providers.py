"""Everything that can serve one attention request, each as a function that builds its `run`, or raises its refusal.

`run(q, k, v) -> out`, all (B, H, S, D) in (B, S, H, D) memory; where the request has a bias, `run(q, k, v, learned)`. Masks and
packings are built before the clock starts; what is made of `learned` is a part of the call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks.mask_cases import MaskCase
from fastattn import biases, masks
from fastattn.ops.attention import BACKENDS

Run = Callable[..., Tensor]
TENSOR, TABLE = "tensor", "table"  # what `learned` is: a bias (1, H, S, S), or of T5's relative bias its values (BUCKETS, H)
BUCKETS = 32


@dataclass(frozen=True)
class Request:
    """What is asked for: `lengths` (B,) real tokens per sequence, None where every row is full.

    A `structure` stands in place of both causality and lengths.
    """

    B: int
    H: int
    S: int
    D: int
    causal: bool
    lengths: Tensor | None
    device: torch.device
    bias: str | None = None  # TENSOR or TABLE
    dropout: float = 0.0
    seed: int = 0  # of fastattn's dropout; others draw their own
    structure: MaskCase | None = None

    def keep(self) -> Tensor | None:
        """bool, (B, 1, 1, S), with causality (B, 1, S, S), of a structure (1 or B, 1, S, S), True = may attend."""
        if self.structure is not None:
            return self.structure.mask.pairs(self.S, self.S, self.device)
        if self.lengths is None:
            return None
        position = torch.arange(self.S, device=self.device)
        keys = (position < self.lengths[:, None])[:, None, None]
        return keys & (position <= position[:, None]) if self.causal else keys

    def mask(self) -> masks.Mask | None:
        """For fastattn; padded queries are dead in it."""
        if self.structure is not None:
            return self.structure.mask
        mask = masks.causal() if self.causal else None
        if self.lengths is None:
            return mask
        padding = masks.padding(self.lengths, self.lengths)
        return padding if mask is None else mask & padding

    def bias_of(self, learned: Tensor | None) -> Tensor | biases.Bias | None:
        """For fastattn."""
        return biases.relative(learned) if self.bias == TABLE and learned is not None else learned

    def dense_bias(self) -> Callable[[Tensor | None], Tensor | None]:
        """For those that take tensors alone: makes (1, H, S, S) of `learned`, from a table by a look-up as T5's models do."""
        if self.bias != TABLE:
            return lambda learned: learned
        buckets = biases.relative(torch.zeros(BUCKETS, self.H, device=self.device)).buckets
        assert buckets is not None
        position, reach = torch.arange(self.S, device=self.device), len(buckets) // 2
        index = buckets[(position - position[:, None]).clamp(-reach, reach) + reach].long()
        return lambda table: None if table is None else F.embedding(index, table).permute(2, 0, 1)[None]


class Provider(NamedTuple):
    name: str
    build: Callable[[Request], Run]
    ours: bool = False
    package: str | None = None  # where it must be importable
    main: bool = False  # has its turn in any budget
    slow: bool = False  # takes ten seconds to compile, so that it runs only when asked for


def eager(request: Request) -> Run:
    """Two matrix products and a softmax in the dtype, as models without a fused kernel compute it."""
    keep = request.keep()
    if keep is None and request.causal:
        keep = torch.ones(request.S, request.S, dtype=torch.bool, device=request.device).tril()
    hidden = None if keep is None else ~keep
    scale, dense = request.D**-0.5, request.dense_bias()

    def run(q: Tensor, k: Tensor, v: Tensor, learned: Tensor | None = None) -> Tensor:
        s, bias = q @ k.mT * scale, dense(learned)
        s = s if bias is None else s + bias
        s = s if hidden is None else s.masked_fill(hidden, float("-inf"))
        p = torch.softmax(s, -1)
        return (p if not request.dropout else F.dropout(p, request.dropout)) @ v

    return run


def sdpa(backend: SDPBackend | None, request: Request) -> Run:
    """PyTorch's function; `backend` None lets it choose. A bias and a mask must be one float tensor there."""
    keep, dense, causal = request.keep(), request.dense_bias(), request.causal
    if request.bias is not None and causal and keep is None:
        keep = torch.ones(request.S, request.S, dtype=torch.bool, device=request.device).tril()
    hidden = None if keep is None else ~keep

    def run(q: Tensor, k: Tensor, v: Tensor, learned: Tensor | None = None) -> Tensor:
        mask, bias = keep, dense(learned)
        if bias is not None:
            bias = bias.expand(request.B, request.H, request.S, request.S)
            mask = bias if hidden is None else bias.masked_fill(hidden, float("-inf"))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, mask, request.dropout, causal and mask is None)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, request.dropout, causal and mask is None)

    return run


def ours(backend: str, request: Request) -> Run:
    mask, options = request.mask(), dict[str, Any](backend=backend)
    if request.dropout:  # a seed on the device: nothing is copied to it in a call
        options |= {"dropout": request.dropout, "seed": torch.tensor([request.seed], device=request.device)}

    def run(q: Tensor, k: Tensor, v: Tensor, learned: Tensor | None = None) -> Tensor:
        out = fastattn.attention(q, k, v, mask, bias=request.bias_of(learned), **options)
        assert isinstance(out, Tensor)
        return out

    return run


def flex(request: Request) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if request.dropout:
        raise NotImplementedError("flex_attention takes no dropout argument")
    lengths, causal, dense = request.lengths, request.causal, request.dense_bias()

    def mask_mod(b, h, i, j):
        visible = j >= 0
        visible = visible & (i >= j) if causal else visible
        return visible if lengths is None else visible & (j < lengths[b])

    masked = lengths is not None or causal
    batch = None if lengths is None else request.B
    if request.structure is not None:
        masked, mask_mod = True, request.structure.mask_mod
        batch = None if request.structure.lengths is None else request.B
    block = create_block_mask(mask_mod, batch, None, request.S, request.S, device=str(request.device)) if masked else None
    torch._dynamo.reset()  # each shape is compiled for itself, whatever was compiled before
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, learned: Tensor | None = None) -> Tensor:
        bias = dense(learned)
        if bias is None:
            return compiled(q, k, v, block_mask=block)
        return compiled(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[0, h, i, j], block_mask=block)

    return run


def flash_attn(request: Request) -> Run:
    module = importlib.import_module("flash_attn")
    if request.bias is not None:
        raise NotImplementedError("flash_attn_func takes no bias argument")
    options = {"dropout_p": request.dropout, "causal": request.causal}
    if request.structure is not None:
        return _flash_attn_structure(module, request.structure, options)
    if request.lengths is None:
        return lambda q, k, v: module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)
    real = (torch.arange(request.S, device=request.device) < request.lengths[:, None]).flatten().nonzero()[:, 0]
    ends = F.pad(request.lengths.cumsum(0), (1, 0)).int()
    longest = int(request.lengths.max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # removing and restoring the padding is part of the call
        packed = (x.transpose(1, 2).flatten(0, 1).index_select(0, real) for x in (q, k, v))
        out = module.flash_attn_varlen_func(*packed, ends, ends, longest, longest, **options)
        full = out.new_zeros(request.B * request.S, request.H, request.D).index_copy(0, real, out)
        return full.unflatten(0, (request.B, request.S)).transpose(1, 2)

    return run


def _flash_attn_structure(module, structure: MaskCase, options: dict) -> Run:
    if structure.window is not None:
        options = {**options, "window_size": structure.window}
        return lambda q, k, v: module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)
    if structure.lengths is None:
        raise NotImplementedError("flash_attn_func takes causality, windows and packed sequences, and no other mask")
    ends = F.pad(structure.lengths.flatten().cumsum(0), (1, 0)).int()
    longest = int(structure.lengths.max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # documents that fill their rows lie packed already
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = module.flash_attn_varlen_func(*packed, ends, ends, longest, longest, **options)
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    return run


def xformers(request: Request) -> Run:
    ops = importlib.import_module("xformers.ops")
    keep, dense, full = request.keep(), request.dense_bias(), (request.B, request.H, request.S, request.S)
    fixed: Any = ops.LowerTriangularMask() if request.lengths is None and request.causal else None
    hidden = None if keep is None else ~keep
    if hidden is not None:
        fixed = torch.zeros(full, device=request.device, dtype=torch.bfloat16).masked_fill(hidden, float("-inf"))

    def run(q: Tensor, k: Tensor, v: Tensor, learned: Tensor | None = None) -> Tensor:
        bias = dense(learned)
        if bias is not None:
            mask = bias.expand(full) if hidden is None else bias.expand(full).masked_fill(hidden, float("-inf"))
        else:
            mask = fixed.to(q.dtype) if isinstance(fixed, Tensor) else fixed
        return ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, request.dropout).transpose(1, 2)

    return run


def transformer_engine(request: Request) -> Run:
    te = importlib.import_module("transformer_engine.pytorch")
    kind = {(False, False): "no_mask", (False, True): "padding", (True, False): "causal", (True, True): "padding_causal"}
    mask_type = "arbitrary" if request.structure is not None else kind[request.causal, request.lengths is not None]
    options = {"attn_mask_type": mask_type, "qkv_format": "bshd", "attention_dropout": request.dropout}
    layer = te.DotProductAttention(request.H, request.D, **options)
    keep = None if request.structure is None else request.keep()
    keys = None if keep is None else ~keep  # its masks hold True where a pair is hidden
    if request.lengths is not None:
        keys = ~(torch.arange(request.S, device=request.device) < request.lengths[:, None])[:, None, None]
    dense = request.dense_bias()

    def run(q: Tensor, k: Tensor, v: Tensor, learned: Tensor | None = None) -> Tensor:
        bias = dense(learned)
        extra = {} if bias is None else {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}
        out = layer(*(x.transpose(1, 2) for x in (q, k, v)), attention_mask=keys, **extra)
        return out.view(request.B, request.S, request.H, request.D).transpose(1, 2)

    return run


def providers(device: torch.device) -> list[Provider]:
    """All that could serve on this device, in the order of the tables; the first two are the baselines."""
    baselines = [Provider("eager", eager, main=True), Provider("SDPA", functools.partial(sdpa, None), main=True)]
    elsewhere = ("eager", "cpu") if device.type == "cuda" else ("eager", "triton", "cuda")
    backends = [name for name in BACKENDS if name not in elsewhere]
    own = [Provider(f"fastattn {name}", functools.partial(ours, name), True, main=True) for name in backends]
    if device.type == "cpu":
        math = Provider("SDPA math", functools.partial(sdpa, SDPBackend.MATH))
        return [*baselines, math, *own]
    named = {"math": SDPBackend.MATH, "efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "cudnn": SDPBackend.CUDNN_ATTENTION}  # fmt: skip
    return [
        *baselines,
        *(Provider(f"SDPA {name}", functools.partial(sdpa, backend)) for name, backend in named.items()),
        Provider("FlexAttention, compiled", flex, slow=True),
        Provider("flash-attn", flash_attn, package="flash_attn"),
        Provider("xformers", xformers, package="xformers"),
        Provider("Transformer Engine", transformer_engine, package="transformer_engine"),
        *own,
    ]
