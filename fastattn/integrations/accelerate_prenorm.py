"""timm's and open_clip's transformers for `accelerate`: each of their blocks computes y = x + attention(LN(x)), y + ffn(LN(y)).

The products, attention, the FFN and the norms are ours; what else there is (drop path, layer scale, norms of heads, of hidden
features and of other kinds) is the block's own module, which is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import masks
from fastattn.activations import GATED
from fastattn.integrations.accelerate_layers import heads_of, rate, traced
from fastattn.integrations.accelerate_parts import ACTIVATION_CLASSES, activation_name, full_name, inside, own_name
from fastattn.masks import Mask
from fastattn.nn.masking import causal_by_looks
from fastattn.ops.attention import attention
from fastattn.ops.attention_qkv import attention_qkv
from fastattn.ops.dispatch import autocast_dtype
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear
from fastattn.ops.norm import add_layer_norm
from fastattn.ops.rotary import rotary

NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm", "open_clip.transformer.LayerNorm")
LINEARS = ("torch.nn.modules.linear.Linear", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear")
DROPOUTS = ("torch.nn.modules.dropout.Dropout", "torch.nn.modules.linear.Identity")
ACTIVATION_HOMES = ("timm.layers.activations", "open_clip.transformer")
GATES = {inner: name for name, inner in GATED.items()}


@dataclass
class Seen:
    """What was read of the last tensors that a model's blocks were given. On a CPU, where a buffer may be written to without a
    version that counts it, `values` are compared."""

    last: tuple[Tensor, int, Tensor | None, Mask | None] | None = None  # attn_mask, version, values, the Mask that it is, if any
    turning: tuple[Tensor, int] | None = None  # a rope whose pairs have one angle each; of a GPU alone

    def __getstate__(self) -> dict[str, Any]:
        return {"last": None, "turning": None}


class Mlp(NamedTuple):
    """The parts of one, by name."""

    up: str
    activation: str
    down: str
    gate: str | None = None  # beside `up`, whose activation it multiplies
    gated: bool = False  # `up` gives what is activated, and then its factor


MLPS = {
    "timm.layers.mlp.Mlp": Mlp("fc1", "act", "fc2"),
    "timm.layers.mlp.GluMlp": Mlp("fc1", "act", "fc2", gated=True),
    "timm.layers.mlp.SwiGLU": Mlp("fc1_g", "act", "fc2", gate="fc1_x"),
    "torch.nn.modules.container.Sequential": Mlp("c_fc", "gelu", "c_proj"),
}


class PreNorm(NamedTuple):
    """A class of such blocks: whose they are, the arguments of its forward, x first, and paths in a block."""

    models: str
    inputs: tuple[str, ...]
    served: tuple[str, ...]  # of the inputs beyond x; with another one a call runs the block's own code
    attention: str  # the class that `attn` must be, exactly
    mlps: tuple[str, ...]  # and those that `mlp` may be
    norms: tuple[str, str]
    out: str
    scales: tuple[str, str]  # modules or parameters, which a block may lack
    drop_paths: tuple[str, str] | None = None
    dropouts: tuple[str, str, str] | None = None  # of what attention adds, hidden, of what the FFN adds
    joined: str | None = None  # query, key and value as one, beside `attn.attn_drop`; None: of a MultiheadAttention
    apart: tuple[str, str, str] | None = None  # query, key and value, in place of it
    bias: str | None = None  # the argument that is added to scores
    absent: tuple[str, ...] = ()  # what a block may have that is not served
    does: str = "fused attention, FFN and norms"
    tupled: bool = False

    def proving(self, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        return given, None

    def unserved(self, block: Any, given: dict[str, Any], seen: Seen) -> str | None:
        more = [name for name in self.inputs[1:] if given.get(name) is not None and given[name] is not False]
        for name in more:
            if name not in self.served:
                return f"{name} was given"
        if "is_causal" in more and "attn_mask" in more:
            return "attn_mask was given beside is_causal"
        x = given[self.inputs[0]]
        for added in ("attn_mask", *([self.bias] if self.bias else [])):
            mask = given.get(added)
            if mask is not None and not self._is_mask(mask, x, block.attn.num_heads):
                return f"{added} is no bool or float tensor that the model itself takes"
        rope = given.get("rope")
        if rope is not None and not (_turns(rope, x, block.attn) and _alike(rope, block.attn.rotate_half, seen)):
            return "rope is no plain table of the tokens behind the first ones"
        return None

    def _is_mask(self, mask: Any, x: Tensor, heads: int) -> bool:
        if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
            return False
        if self.joined is None:  # open_clip casts it
            shapes = (x.shape[1],) * 2, (x.shape[0] * heads, *(x.shape[1],) * 2)
            return mask.shape in shapes and (mask.dtype == torch.bool or mask.is_floating_point())
        return mask.dtype in (torch.bool, x.dtype) or (mask.is_floating_point() and autocast_dtype(x) is not None)

    def computed(self, block: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> Tensor:
        first, second = (getattr(block, name) for name in self.norms)
        after, hidden, last = (0.0,) * 3 if self.dropouts is None else (rate(inside(block, path)) for path in self.dropouts)
        normal = norm_of_sum(first, x, None, 0.0)[0]
        y, dropout = self._branch(block, 0, self._attended(block, normal, given, seen), after)
        normal, x = norm_of_sum(second, y, x, dropout)
        y, dropout = self._branch(block, 1, _ffn(block.mlp, normal, hidden), last)
        return x + (F.dropout(y, dropout) if dropout else y)

    def _attended(self, block: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> Tensor:
        """What attention gives each token, (B, L, C), its last product included."""
        module, out, scale = block.attn, inside(block, self.out), None
        dropout = module.dropout if self.joined is None else getattr(module.attn_drop, "p", 0.0)
        dropout = dropout if module.training else 0.0
        if self.joined is not None and not module.fused_attn:
            # where timm calls PyTorch's attention, it is the module around the dropout that says whether it trains
            scale, dropout = module.scale, rate(module.attn_drop)
        mask, bias = self._terms(module, x, given, seen)
        options: Any = {"bias": bias, "scale": scale, "dropout": dropout}
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        normed = not all(norm is None or type(norm) is nn.Identity for norm in norms)
        weights, rope = self._joined(block), given.get("rope")
        qkv = None if weights is None else linear(x, *weights).unflatten(-1, (3, module.num_heads, -1))
        if qkv is not None and rope is None and not normed:
            y = attention_qkv(qkv, mask, **options)
        else:
            if qkv is not None:
                q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, L, D) each
            else:
                q, k, v = heads_of(x, module.num_heads, *(inside(block, path) for path in self.apart or ()))
            q, k = (norms[0](q), norms[1](k)) if normed else (q, k)  # type: ignore[misc]
            q, k = (q, k) if rope is None else _turned(q, k, rope, module)
            y = attention(q, k, v, mask, **options).transpose(1, 2)
        y = _through(getattr(module, "norm", None), y.flatten(-2))
        gate = getattr(module, "gate", None)
        return linear(y if gate is None else y * gate(x).sigmoid(), out.weight, out.bias)

    def _joined(self, block: Any) -> tuple[Tensor, Tensor | None] | None:
        """Weight (3 C, C) and bias of query, key and value as one, where a block has them so."""
        module = block.attn
        if self.joined is None:
            return module.in_proj_weight, module.in_proj_bias
        one = inside(block, self.joined)
        if one is None:
            return None
        if getattr(module, "q_bias", None) is not None:
            return one.weight, torch.cat((module.q_bias, module.k_bias, module.v_bias))
        return one.weight, one.bias

    def _terms(self, module: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> tuple[Mask | None, Tensor | None]:
        """What may be seen, and what is added to scores."""
        if given.get("is_causal"):
            return masks.causal("top_left"), None
        attn_mask = given.get("attn_mask")
        if self.bias is not None:
            attn_mask = given.get(self.bias)
            if module.relative_position_bias_table is not None:
                own = module._get_rel_pos_bias()
                attn_mask = own if attn_mask is None else own + attn_mask
        if attn_mask is None:
            return None, None
        torchs = self.joined is None
        if attn_mask.dtype == torch.bool and (torchs or (self.bias is not None and not module.fused_attn)):
            # 0 and 1, which open_clip adds, and timm's Beit where it does not call PyTorch's function
            attn_mask = attn_mask.to(x.dtype)
        readable = self.bias is None and not traced(x) and not attn_mask.is_inference() and not attn_mask.requires_grad
        mask = _known_mask(seen, attn_mask) if readable else _mask(attn_mask, False)
        if mask is not None:
            return mask, None
        if attn_mask.dim() == 3 and torchs:  # (B H, L, L)
            attn_mask = attn_mask.unflatten(0, (x.shape[0], -1))
        return None, bias_of(attn_mask[(None,) * (4 - attn_mask.dim())], x)

    def _branch(self, block: nn.Module, n: int, y: Tensor, dropout: float) -> tuple[Tensor, float]:
        """What is added to the residual stream, (B, L, C), and the dropout that is still to come."""
        scale, drop_path = getattr(block, self.scales[n], None), getattr(block, self.drop_paths[n]) if self.drop_paths else None
        if all(part is None or type(part) is nn.Identity for part in (scale, drop_path)):
            return y, dropout
        y = F.dropout(y, dropout) if dropout else y
        return _through(drop_path, y * scale if isinstance(scale, Tensor) else _through(scale, y)), 0.0

    def made_otherwise(self, block: Any) -> str | None:
        if own_name(block.mlp) not in self.mlps:
            return f"mlp is a {full_name(type(block.mlp))}, not a plain {self.mlps[0].rpartition('.')[2]}"
        mlp = MLPS[full_name(type(block.mlp))]
        weights = [] if self.joined is None else [self.joined] if inside(block, self.joined) is not None else self.apart or ()
        linears = (self.out, *(f"mlp.{name}" for name in (mlp.up, mlp.gate, mlp.down) if name), *weights)
        dropouts = () if self.dropouts is None else ("attn.attn_drop", *self.dropouts)
        wanted = {"attn": (self.attention,), **dict.fromkeys(linears, LINEARS), **dict.fromkeys(dropouts, DROPOUTS)}
        why = otherwise(block, wanted)
        if why is not None:
            return why
        found = getattr(block.mlp, mlp.activation)
        if _activation(found) is None or (mlp.gated and _activation(found) not in GATES):
            return f"activation {type(found).__name__} is not served"
        for path in self.absent:
            owner, _, name = path.rpartition(".")
            if getattr(inside(block, owner) if owner else block, name, None) is not None:
                return f"it has {path}, which is not served"
        if self.joined is not None:
            return _glu_otherwise(block.mlp) if mlp.gated else None
        attn = block.attn
        if not (attn.batch_first and attn._qkv_same_embed_dim) or attn.add_zero_attn:
            return "attn is not batch_first with keys and values of one size, or adds zeros"
        names = [mlp.up, mlp.activation, mlp.down]
        return None if [*block.mlp._modules] == names else "mlp has other modules than those known"


TIMM = PreNorm(
    models="timm's VisionTransformer",
    inputs=("x", "attn_mask", "is_causal"),
    served=("attn_mask", "is_causal"),
    attention="timm.layers.attention.Attention",
    mlps=("timm.layers.mlp.Mlp",),
    norms=("norm1", "norm2"),
    out="attn.proj",
    scales=("ls1", "ls2"),
    drop_paths=("drop_path1", "drop_path2"),
    dropouts=("attn.proj_drop", "mlp.drop1", "mlp.drop2"),
    joined="attn.qkv",
)
EVA = TIMM._replace(
    models="Eva",
    inputs=("x", "rope", "attn_mask", "is_causal"),
    served=("rope", "attn_mask", "is_causal"),
    attention="timm.models.eva.EvaAttention",
    mlps=("timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU"),
    scales=("gamma_1", "gamma_2"),
    apart=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
)
BEIT = EVA._replace(
    models="Beit",
    inputs=("x", "shared_rel_pos_bias"),
    served=("shared_rel_pos_bias",),
    attention="timm.models.beit.Attention",
    mlps=("timm.layers.mlp.Mlp", "timm.layers.mlp.SwiGLU"),
    apart=None,
    bias="shared_rel_pos_bias",
)
OPEN_CLIP = PreNorm(
    models="open_clip's towers",
    inputs=("q_x", "k_x", "v_x", "attn_mask"),
    served=("attn_mask",),
    attention="torch.nn.modules.activation.MultiheadAttention",
    mlps=("torch.nn.modules.container.Sequential",),
    norms=("ln_1", "ln_2"),
    out="attn.out_proj",
    scales=("ls_1", "ls_2"),
    absent=("ln_1_kv", "attn.bias_k", "attn.bias_v"),
)
KINDS = {
    "timm.models.vision_transformer.Block": TIMM,
    "timm.models.eva.EvaBlock": EVA,
    "timm.models.beit.Block": BEIT,
    "open_clip.transformer.ResidualAttentionBlock": OPEN_CLIP,
}


def _ffn(mlp: Any, x: Tensor, dropout: float) -> Tensor:
    """Dropout is of hidden features; a norm of these (EVA-02) comes behind it."""
    of = MLPS[full_name(type(mlp))]
    up, activation, down = (getattr(mlp, name) for name in (of.up, of.activation, of.down))
    norm, name = getattr(mlp, "norm", None), _activation(activation)
    assert name is not None
    if of.gate is None and (norm is None or type(norm) is nn.Identity):
        name = GATES[name] if of.gated else name
        return ffn(x, up.weight, up.bias, down.weight, down.bias, activation=name, dropout=dropout)
    hidden = linear(x, up.weight, up.bias, activation=name)
    if of.gate is not None:
        gate = getattr(mlp, of.gate)
        hidden = hidden * linear(x, gate.weight, gate.bias)
    return linear(_through(norm, F.dropout(hidden, dropout) if dropout else hidden), down.weight, down.bias)


def _glu_otherwise(mlp: Any) -> str | None:
    if mlp.gate_last or mlp.chunk_dim != -1:
        return "mlp activates the second half, not the first"
    return None if type(mlp.norm) is nn.Identity else "mlp has a norm beside a gate in one product"


def _turns(rope: Any, x: Tensor, attn: Any) -> bool:
    """Whether it is sines and cosines of each token and feature, (L - first ones, 2 D), as `_turned` reads them."""
    if not isinstance(rope, Tensor) or rope.dim() != 2 or rope.requires_grad or rope.dtype not in (x.dtype, torch.float32):
        return False
    return rope.shape == (x.shape[1] - attn.num_prefix_tokens, 2 * attn.head_dim) and attn.head_dim % 2 == 0


def _alike(rope: Tensor, half: bool, seen: Seen) -> bool:
    """Whether both features of each pair have one angle. Of a table on a GPU it is read once."""
    if seen.turning is not None and seen.turning[1] == rope._version and _place(seen.turning[0]) == _place(rope):
        return True
    if traced(rope):
        return False
    pairs = rope.unflatten(1, (2, 2, -1) if half else (2, -1, 2)).unbind(2 if half else 3)
    alike = torch.equal(*pairs)
    if alike and rope.is_cuda:
        seen.turning = rope.detach(), rope._version
    return alike


def _turned(q: Tensor, k: Tensor, rope: Tensor, attn: Any) -> tuple[Tensor, Tensor]:
    """By the angles of timm's table, which has those of a pair twice; the first tokens are not turned."""
    half, count = attn.rotate_half, attn.num_prefix_tokens
    sin, cos = (table[:, : table.shape[1] // 2] if half else table[:, ::2] for table in rope.chunk(2, -1))
    if count:
        cos, sin = torch.cat((cos.new_ones(count, cos.shape[1]), cos)), torch.cat((sin.new_zeros(count, sin.shape[1]), sin))
    return rotary(q, k, cos, sin, interleaved=not half)


def _mask(attn_mask: Tensor, readable: bool) -> Mask | None:
    """Of bools, and of floats of which the host may see that they are the causal mask."""
    if attn_mask.dtype == torch.bool:
        return masks.dense(attn_mask)
    return masks.causal("top_left") if readable and causal_by_looks(attn_mask, None) else None


def _known_mask(seen: Seen, attn_mask: Tensor) -> Mask | None:
    """Made, and floats read, once for all blocks, and again only of another tensor or after a write."""
    last = seen.last
    if (
        last is None
        or last[1] != attn_mask._version
        or _place(last[0]) != _place(attn_mask)
        or (last[2] is not None and not torch.equal(last[2], attn_mask))
    ):
        values = None if attn_mask.is_cuda else attn_mask.detach().clone()
        seen.last = last = attn_mask.detach(), attn_mask._version, values, _mask(attn_mask, True)
    return last[3]


def _place(x: Tensor) -> tuple:
    """A slice of a buffer is another tensor in each call."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def bias_of(bias: Tensor, x: Tensor) -> Tensor:
    """In the dtype that attention adds it in to the scores of x."""
    return bias.to(x.dtype if autocast_dtype(x) is None else torch.float32)


def _through(module: nn.Module | None, x: Tensor) -> Tensor:
    return x if module is None or type(module) is nn.Identity else module(x)


def norm_of_sum(norm: Any, y: Tensor, x: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The norm of x + dropout(y), and the sum: by the module where it is no LayerNorm that we know, or of another dtype."""
    dtype = y.dtype if x is None else torch.promote_types(x.dtype, y.dtype)
    plain = own_name(norm) in NORMS and not getattr(norm, "_fast_norm", False)
    if not plain or (norm.weight is not None and norm.weight.dtype not in (dtype, torch.float32)):
        y = F.dropout(y, dropout) if dropout else y
        total = y if x is None else x + y
        return norm(total), total
    options: Any = {"eps": norm.eps, "dropout": dropout}
    if x is None:
        return add_layer_norm(y, None, norm.weight, norm.bias, **options), y  # type: ignore[return-value]
    return add_layer_norm(y.to(dtype), x, norm.weight, norm.bias, return_sum=True, **options)  # type: ignore[return-value]


def _activation(module: nn.Module) -> str | None:
    """Our name of what it computes; None: not served."""
    if own_name(module) is None:
        return None
    if type(module).__module__ in ACTIVATION_HOMES:
        return ACTIVATION_CLASSES.get(type(module).__name__) or {"QuickGELU": "quick_gelu"}.get(type(module).__name__)
    return activation_name(module)


def otherwise(block: nn.Module, wanted: dict[str, tuple[str, ...]]) -> str | None:
    """Which part, by its path, is of another class than those wanted, or None."""
    for path, classes in wanted.items():
        if own_name(inside(block, path)) not in classes:
            return f"{path} is a {full_name(type(inside(block, path)))}, not a plain {classes[0].rpartition('.')[2]}"
    return None
