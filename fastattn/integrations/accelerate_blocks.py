"""timm's and open_clip's transformers for `accelerate`: each of their blocks computes y = x + attention(LN(x)), y + ffn(LN(y)).

Their models hand no config and no padding on, so that a block stands alone: it looks at itself in each call, and proves itself in
its first one. The products, attention, the FFN and the norms are ours; what else there is (drop path, layer scale, norms of heads
and of other kinds) is the block's own module, which is called.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import masks
from fastattn.integrations.accelerate_checks import GLOBAL_HOOKS, HOOKS
from fastattn.integrations.accelerate_forward import Replaced, Report
from fastattn.integrations.accelerate_layers import rate, traced
from fastattn.integrations.accelerate_parts import ACTIVATION_CLASSES, activation_name
from fastattn.integrations.accelerate_proof import Proof, tell
from fastattn.kept import nothing_kept
from fastattn.masks import Mask
from fastattn.nn.masking import causal_by_looks
from fastattn.ops.attention import attention
from fastattn.ops.attention_qkv import attention_qkv
from fastattn.ops.dispatch import autocast_dtype
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear
from fastattn.ops.norm import add_layer_norm
from fastattn.planned import PLAIN


class Kind(NamedTuple):
    """A class of blocks: whose they are, the arguments of its forward, x first, and paths in a block."""

    models: str
    inputs: tuple[str, ...]
    served: tuple[str, ...]  # of the inputs beyond x; with another one a call runs the block's own code
    attention: str  # the class that `attn` must be, exactly
    mlp: tuple[str, tuple[str, ...]]  # and `mlp`; activation and products in it, which lie between the first and the last
    norms: tuple[str, str]
    out: str
    scales: tuple[str, str]  # modules or parameters, which a block may lack
    drop_paths: tuple[str, str] | None = None
    dropouts: tuple[str, str, str] | None = None  # of what attention adds, hidden, of what the FFN adds
    joined: str | None = None  # query, key and value as one, beside `attn.attn_drop`; None: of a MultiheadAttention
    absent: tuple[str, ...] = ()  # what a block may have that is not served


TIMM = Kind(
    models="timm's VisionTransformer",
    inputs=("x", "attn_mask", "is_causal"),
    served=("attn_mask", "is_causal"),
    attention="timm.layers.attention.Attention",
    mlp=("timm.layers.mlp.Mlp", ("fc1", "act", "fc2")),
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
    attention="timm.models.eva.EvaAttention",
    scales=("gamma_1", "gamma_2"),
)
BEIT = EVA._replace(
    models="Beit",
    inputs=("x", "shared_rel_pos_bias"),
    served=(),
    attention="timm.models.beit.Attention",
    absent=("attn.relative_position_bias_table",),
)
OPEN_CLIP = Kind(
    models="open_clip's towers",
    inputs=("q_x", "k_x", "v_x", "attn_mask"),
    served=("attn_mask",),
    attention="torch.nn.modules.activation.MultiheadAttention",
    mlp=("torch.nn.modules.container.Sequential", ("c_fc", "gelu", "c_proj")),
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
MODELS = ", ".join(kind.models for kind in KINDS.values())
NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm", "open_clip.transformer.LayerNorm")
LINEARS = ("torch.nn.modules.linear.Linear", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear")
DROPOUTS = ("torch.nn.modules.dropout.Dropout", "torch.nn.modules.linear.Identity")
ACTIVATION_HOMES = ("timm.layers.activations", "open_clip.transformer")
# what `why_not` reads beside modules; other numbers are read where they are used
NUMBERS = ("approximate", "batch_first", "add_zero_attn", "_qkv_same_embed_dim", "attention")


@dataclass
class Seen:
    """The last attn_mask that a model's blocks were given, held, its version, and the Mask that it is; None: it is added."""

    last: tuple[Tensor, int, Mask | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"last": None}


@dataclass
class Block:
    """What is known of one."""

    name: str
    kind: Kind
    report: Report
    strict: bool
    prove: bool
    graphs: bool
    seen: Seen
    noted: tuple = ()  # what the next three rest on
    refused: str | None = None
    differs: str | None = None
    unproven: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules, and proves itself."""
        return {**vars(self), "noted": ()}

    def forget(self) -> None:
        self.noted, self.seen.last = (), None

    def refusal(self, module: nn.Module) -> str | None:
        """Why its own code is to run, as it is now."""
        noted = _noted(module)
        if noted != self.noted:
            self.refused, self.unproven, self.differs = why_not(module, self.kind), self.prove, None
            self.noted = noted
            self.report.left.pop(self.name, None)
        return self.refused or self.differs


def kind_of(module: nn.Module) -> Kind | None:
    """Also of classes that derive from a known one, which are then refused by name."""
    return next((KINDS[name] for cls in type(module).__mro__ if (name := _full(cls)) in KINDS), None)


def accelerate_block(handle: Any, name: str, module: nn.Module, capacity: int | None, **settings: Any) -> None:
    """One block inside a model; or its line in `report.left`."""
    kind = kind_of(module)
    assert kind is not None
    why = f"capacity is not served of {kind.models}" if capacity is not None else why_not(module, kind)
    if why is None and "forward" in vars(module):
        why = "a forward was set on it"
    if why is not None:
        handle.report.left[name] = why
        return
    seen = handle._blocks[0].seen if handle._blocks else Seen()
    handle._blocks.append(Block(name, kind, handle.report, seen=seen, **settings))
    handle._replace(module, block_forward, handle._blocks[-1])
    around = name.rpartition(".")[0]
    count = sum(block.name.rpartition(".")[0] == around for block in handle._blocks)
    what = f"{type(module).__name__}, {count} layer{'s' * (count > 1)}: fused attention, FFN and norms"
    handle.report.accelerated[around] = what


def block_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    block, module = at.settings, at.module
    if torch.compiler.is_dynamo_compiling():  # which would have to trace how a block is looked at
        return at.own(*args, **kwargs)
    if block.graphs:
        block.report.not_captured["timm's and open_clip's blocks are not captured"] += 1
    given = {**dict(zip(block.kind.inputs, args, strict=False)), **kwargs}
    why = block.refusal(module) or _unserved(block.kind, len(args), given)
    if why is not None:
        block.report.fell_back(block, why)
        return at.own(*args, **kwargs)
    x = given.pop(block.kind.inputs[0])
    terms = _terms(block, x, given.get("attn_mask"), given.get("is_causal", False))
    if block.unproven and not traced(x):
        proof = Proof(None)

        def ours(x: Tensor) -> Tensor:
            return computed(block.kind, module, x, *terms)

        if not proof.holds(block.name, module, x, lambda x: at.own(x, **given), ours):
            assert proof.difference is not None
            block.differs = block.report.left[block.name] = tell(proof.difference)
            block.report.fell_back(block, block.differs)
            return at.own(*args, **kwargs)
        block.unproven = proof.compared == 0
    return computed(block.kind, module, x, *terms)


def _unserved(kind: Kind, count: int, given: dict[str, Any]) -> str | None:
    """Why a call cannot be served, or None."""
    x, more = given.get(kind.inputs[0]), [name for name, value in given.items() if value is not None and value is not False]
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or count > len(kind.inputs) or not set(given) <= set(kind.inputs):
        return "it was not called with a plain tensor (batch, length, features) and the arguments that are known"
    for name in more:
        if name not in (kind.inputs[0], *kind.served):
            return f"{name} was given"
    if "is_causal" in more and "attn_mask" in more:
        return "attn_mask was given beside is_causal"
    mask = given.get("attn_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4 or not (mask.is_floating_point() or mask.dtype == torch.bool):
        return "attn_mask is no bool or float tensor of two to four dimensions"
    return None


def _terms(block: Block, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Mask | None, Tensor | None]:
    """What may be seen, and what is added to scores."""
    if is_causal:
        return masks.causal("top_left"), None
    if attn_mask is None:
        return None, None
    torchs = block.kind.joined is None
    if torchs and attn_mask.dtype == torch.bool:  # which open_clip adds, as 0 and 1
        attn_mask = attn_mask.to(x.dtype)
    mask = _mask(attn_mask, False) if traced(x) or attn_mask.is_inference() else _known_mask(block.seen, attn_mask)
    if mask is not None:
        return mask, None
    if attn_mask.dim() == 3 and torchs:  # (B H, L, L)
        attn_mask = attn_mask.unflatten(0, (x.shape[0], -1))
    bias = attn_mask[(None,) * (4 - attn_mask.dim())]
    return None, bias.to(x.dtype if autocast_dtype(x) is None else torch.float32)


def _mask(attn_mask: Tensor, readable: bool) -> Mask | None:
    """Of bools, and of floats of which the host may see that they are the causal mask."""
    if attn_mask.dtype == torch.bool:
        return masks.dense(attn_mask)
    return masks.causal("top_left") if readable and causal_by_looks(attn_mask, None) else None


def _known_mask(seen: Seen, attn_mask: Tensor) -> Mask | None:
    """Made, and floats read, once for all blocks, and again only of another tensor or after a write."""
    last = seen.last
    if last is None or last[1] != attn_mask._version or _place(last[0]) != _place(attn_mask):
        seen.last = last = attn_mask.detach(), attn_mask._version, _mask(attn_mask, True)
    return last[2]


def _place(x: Tensor) -> tuple:
    """A slice of a buffer is another tensor in each call."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


# How a block is computed


def computed(kind: Kind, block: Any, x: Tensor, mask: Mask | None, bias: Tensor | None) -> Tensor:
    """A block's output, (B, L, C) as x."""
    first, second = (getattr(block, name) for name in kind.norms)
    up, activation, down = (getattr(block.mlp, name) for name in kind.mlp[1])
    after, hidden, last = (0.0,) * 3 if kind.dropouts is None else (rate(_part(block, path)) for path in kind.dropouts)
    training = block.training and not torch.is_grad_enabled() and not traced(x)
    with nothing_kept() if training else contextlib.nullcontext():
        normal = _norm_of_sum(first, x, None, 0.0)[0]
        y, dropout = _branch(kind, block, 0, _attended(kind, block, normal, mask, bias), after)
        normal, x = _norm_of_sum(second, y, x, dropout)
        name: Any = _activation(activation)
        y = ffn(normal, up.weight, up.bias, down.weight, down.bias, activation=name, dropout=hidden)
        y, dropout = _branch(kind, block, 1, y, last)
        return x + (F.dropout(y, dropout) if dropout else y)


def _attended(kind: Kind, block: Any, x: Tensor, mask: Mask | None, bias: Tensor | None) -> Tensor:
    """What attention gives each token, (B, L, C), its last product included."""
    module, out = block.attn, _part(block, kind.out)
    if kind.joined is None:
        weight, weight_bias, scale = module.in_proj_weight, module.in_proj_bias, None
        dropout = module.dropout if module.training else 0.0
    else:
        joined = _part(block, kind.joined)
        weight, weight_bias = joined.weight, joined.bias
        if getattr(module, "q_bias", None) is not None:
            weight_bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        scale = None if module.fused_attn else module.scale
        # where timm calls PyTorch's attention, it is the module around the dropout that says whether it trains
        dropout = getattr(module.attn_drop, "p", 0.0) if module.training else 0.0
        dropout = dropout if module.fused_attn else rate(module.attn_drop)
    options: Any = {"bias": bias, "scale": scale, "dropout": dropout}
    qkv = linear(x, weight, weight_bias).unflatten(-1, (3, module.num_heads, -1))
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if all(norm is None or type(norm) is nn.Identity for norm in norms):
        y = attention_qkv(qkv, mask, **options)
    else:
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, L, D) each
        y = attention(norms[0](q), norms[1](k), v, mask, **options).transpose(1, 2)  # type: ignore[misc]
    y = _through(getattr(module, "norm", None), y.flatten(-2))
    gate = getattr(module, "gate", None)
    return linear(y if gate is None else y * gate(x).sigmoid(), out.weight, out.bias)


def _branch(kind: Kind, block: nn.Module, n: int, y: Tensor, dropout: float) -> tuple[Tensor, float]:
    """What is added to the residual stream, (B, L, C), and the dropout that is still to come."""
    scale, drop_path = getattr(block, kind.scales[n], None), getattr(block, kind.drop_paths[n]) if kind.drop_paths else None
    if all(part is None or type(part) is nn.Identity for part in (scale, drop_path)):
        return y, dropout
    y = F.dropout(y, dropout) if dropout else y
    return _through(drop_path, y * scale if isinstance(scale, Tensor) else _through(scale, y)), 0.0


def _through(module: nn.Module | None, x: Tensor) -> Tensor:
    return x if module is None or type(module) is nn.Identity else module(x)


def _norm_of_sum(norm: Any, y: Tensor, x: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The norm of x + dropout(y), and the sum: by the module where it is no LayerNorm that we know, or of another dtype."""
    dtype = y.dtype if x is None else torch.promote_types(x.dtype, y.dtype)
    plain = _own(norm) in NORMS and not getattr(norm, "_fast_norm", False)
    if not plain or (norm.weight is not None and norm.weight.dtype not in (dtype, torch.float32)):
        y = F.dropout(y, dropout) if dropout else y
        total = y if x is None else x + y
        return norm(total), total
    options: Any = {"eps": norm.eps, "dropout": dropout}
    if x is None:
        return add_layer_norm(y, None, norm.weight, norm.bias, **options), y  # type: ignore[return-value]
    return add_layer_norm(y.to(dtype), x, norm.weight, norm.bias, return_sum=True, **options)  # type: ignore[return-value]


# Whether a block is what it seems


def _noted(module: nn.Module) -> tuple:
    """Modules by identity, with all that `why_not` reads. The block's own hooks and `forward` stand around what is computed."""
    found: list[Any] = [len(hooks) for hooks in GLOBAL_HOOKS]
    for part in module.modules():
        here = vars(part)
        own = None if part is module else here.get("forward")
        hooked = () if part is module else [len(here[hooks]) for hooks in HOOKS]
        numbers = [here.get(name) for name in NUMBERS]
        found += (part, type(part), type(part).forward, own, *hooked, *numbers, *map(type, part._parameters.values()))
    return tuple(found)


def why_not(block: nn.Module, kind: Kind) -> str | None:
    """Why a block cannot be computed from its weights, or None."""
    if any(GLOBAL_HOOKS):
        return "there are hooks on every module, which would not run"
    if _own(block) not in KINDS:
        return f"{type(block).__name__} is no class that is known, or its forward was replaced: it may compute anything"
    for name, part in block.named_modules():
        if part is not block and ("forward" in vars(part) or any(getattr(part, hooks) for hooks in HOOKS)):
            return f"{name} has hooks, or a forward that was set, which would not run"
        if any(p is not None and type(p) not in PLAIN for p in part._parameters.values()) and not torch.compiler.is_compiling():
            return f"{name or 'it'} has parameters that are no plain tensors"
    try:
        return _made_otherwise(block, kind)
    except AttributeError as error:
        return f"a {type(block).__name__} is made otherwise: {error}"


def _made_otherwise(block: Any, kind: Kind) -> str | None:
    mlp, (up, activation, down) = kind.mlp
    linears = kind.out, f"mlp.{up}", f"mlp.{down}", *([kind.joined] if kind.joined else [])
    dropouts = () if kind.dropouts is None else ("attn.attn_drop", *kind.dropouts)
    wanted = {"attn": (kind.attention,), "mlp": (mlp,), **dict.fromkeys(linears, LINEARS), **dict.fromkeys(dropouts, DROPOUTS)}
    for path, classes in wanted.items():
        if _own(_part(block, path)) not in classes:
            return f"{path} is a {_full(type(_part(block, path)))}, not a plain {classes[0].rpartition('.')[2]}"
    found = getattr(block.mlp, activation)
    if _activation(found) is None:
        return f"activation {type(found).__name__} is not served"
    for path in kind.absent:
        owner, _, name = path.rpartition(".")
        if getattr(_part(block, owner) if owner else block, name, None) is not None:
            return f"it has {path}, which is not served"
    if "attention" in vars(block):  # of open_clip's blocks, a method
        return "its method attention was set"
    if kind.joined is not None:
        return None if type(getattr(block.mlp, "norm", nn.Identity())) is nn.Identity else "mlp.norm is not served"
    attn = block.attn
    if not (attn.batch_first and attn._qkv_same_embed_dim) or attn.add_zero_attn:
        return "attn is not batch_first with keys and values of one size, or adds zeros"
    return None if [*block.mlp._modules] == [up, activation, down] else "mlp has other modules than those known"


def _activation(module: nn.Module) -> str | None:
    """Our name of what it computes; None: not served."""
    if type(module).__module__ in ACTIVATION_HOMES and _own(module) is not None:
        return ACTIVATION_CLASSES.get(type(module).__name__) or {"QuickGELU": "quick_gelu"}.get(type(module).__name__)
    return activation_name(module) if _own(module) is not None else None


def _part(block: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(block)


def _full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _own(module: Any) -> str | None:
    """The full name of a module's class; None where its forward is not the one that was written for it."""
    cls: Any = type(module)
    return _full(cls) if getattr(getattr(cls, "forward", None), "__module__", None) == cls.__module__ else None
