"""`convert`: torch.nn's attention and transformer layers inside a model become fastattn's, with the same parameters, and back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastattn.activations import quick_gelu
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.decoder import DecoderLayer
from fastattn.nn.encoder import Encoder, EncoderLayer
from fastattn.nn.feed_forward import activation_name
from fastattn.nn.plain import LINEAR, has_hooks

logger = logging.getLogger("fastattn")
FUNCTIONS: dict[str, Callable] = {  # what torch.nn's layers take for our names
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def convert(module: nn.Module, *, for_export: bool = False, backend: str = "auto") -> nn.Module:
    """Put fastattn's layers in the place of torch.nn's, everywhere inside a model; or with `for_export` torch.nn's in theirs.

    MultiheadAttention, TransformerEncoderLayer, TransformerEncoder and TransformerDecoderLayer, exactly of these classes and
    without hooks, are replaced by layers that hold the very same parameters: optimizers and the state dict know no difference.
    The logger "fastattn" names what is left, and why.

    Args:
        module: changed in place. Where it is itself such a layer, its replacement is returned.
        for_export: back to torch.nn's own layers, and `accelerate`d encoders to their own code, of which exporters to ONNX and
            others know the parts. Options that torch.nn has not are refused.
        backend: of the layers that are put in.

    Returns:
        The module, or what stands for it.

    Raises:
        TypeError: it is no module. NotImplementedError: `for_export` of a layer with options of fastattn's own.

    >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), num_layers=2)
    >>> model = fastattn.nn.convert(model)
    >>> type(model.layers[1]).__name__
    'EncoderLayer'
    >>> type(fastattn.nn.convert(model, for_export=True).layers[1]).__name__
    'TransformerEncoderLayer'
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not for_export:
        return _converted(module, THERE, {"backend": backend}, "", {})
    from fastattn.integrations.accelerate import restore  # which is above this, and would be imported in a circle

    restore(module)
    return _converted(module, BACK, {}, "", {})


def _converted(module: nn.Module, makers: dict[type, Callable], options: dict[str, Any], path: str, made: dict) -> nn.Module:
    """What stands in the place of a module. made: by module, for one that is there under several names."""
    if module in made:
        return made[module]
    made[module] = module
    if type(module) in makers:
        why = why_not(module)
        if why is not None:
            return _left(module, path, why)
        made[module] = makers[type(module)](module, options)
        return made[module]
    if isinstance(module, FAST):
        return _left(module, path, f"a {type(module).__name__} may compute anything")
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _converted(child, makers, options, f"{path}.{name}".lstrip("."), made)
    return module


def _left(module: nn.Module, path: str, why: str) -> nn.Module:
    """With all that is in it: torch.nn's fast path reads the weights past its parts, or gives them nested tensors."""
    logger.warning("%s is left as it is: %s", path or type(module).__name__, why)
    return module


def why_not(module: nn.Module) -> str | None:
    """Why one of these layers cannot be computed from its parameters and numbers, or None."""
    whole = isinstance(module, (nn.TransformerEncoder, Encoder))
    if whole and not len(module.layers):  # type: ignore[arg-type]
        return "it has no layers"
    for name, part in module.named_modules():
        what, last = name or "it", name.rpartition(".")[2]
        if has_hooks(part):
            return f"{what} has hooks"
        replaced = [method for method in METHODS if method in vars(part)]
        if replaced:
            return f"a {replaced[0]} was set on {what}"
        if "activation" in name.split(".") or (whole and name.startswith("norm")):
            continue  # the name of the one is looked for below; the other is called
        if name and type(part) not in _classes(last):
            return f"{what} is a {type(part).__name__}, which may compute anything"
        if {*part._parameters, *part._buffers} - OWN.get(type(part), {"weight", "bias"}):
            return f"{what} has parameters or buffers of its own"
        own = all(x is None or type(x) is nn.Parameter for x in part._parameters.values())
        if not own and not torch.compiler.is_compiling():  # torch.export has others in their places
            return f"{what} has parameters that are no plain ones"
        if hasattr(part, "activation"):
            try:
                activation_name(part.activation)
            except ValueError as error:
                return str(error)
    return None


def _classes(name: str) -> tuple[type, ...]:
    """Those that a part of that name may be of."""
    return LAYERS if name.isdigit() else next((classes for start, classes in PARTS.items() if name.startswith(start)), ())


# Either library's class has the other's constructor, so that one function goes both ways. New modules have no memory of their
# own: parameters, linears, norms and dropouts are the old ones.


def _attention(old: Any, options: dict[str, Any], cls: type) -> Any:
    if cls is nn.MultiheadAttention:
        own = {"num_kv_heads": old.num_kv_heads != old.num_heads, "rotary": old.rotary, "alibi": old.alibi}
        if any(own.values()):
            names = ", ".join(name for name, has in own.items() if has)
            raise NotImplementedError(f"for_export: torch.nn.MultiheadAttention has no {names}")
    given = old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, old.bias_k is not None
    new = cls(*given, old.add_zero_attn, old.kdim, old.vdim, old.batch_first, device="meta", **options)
    for name in (*WEIGHTS, "out_proj"):
        setattr(new, name, getattr(old, name))
    return _in_mode(new, old)


def _layer(old: Any, options: dict[str, Any], cls: type, inner: type) -> Any:
    """Of an encoder or a decoder. inner: the class of its attentions."""
    activation: Any = activation_name(old.activation)
    if inner is nn.MultiheadAttention:
        if activation not in FUNCTIONS:
            raise NotImplementedError(f"for_export: torch.nn's layers have no activation {activation!r}")
        activation = FUNCTIONS[activation]
    numbers = {"batch_first": old.self_attn.batch_first, "norm_first": old.norm_first, "device": "meta"}
    new = cls(old.self_attn.embed_dim, old.self_attn.num_heads, 1, activation=activation, **numbers, **options)
    for name, part in old.named_children():
        if name != "activation":  # a name here, a function there
            setattr(new, name, _attention(part, options, inner) if name in ATTENTIONS else part)
    return _in_mode(new, old)


def _encoder(old: Any, options: dict[str, Any], cls: type, layer: type, inner: type) -> Any:
    made: dict[nn.Module, nn.Module] = {}  # one layer may stand in several places
    for one in old.layers:
        if one not in made:
            made[one] = _layer(one, options, layer, inner)
    layers = [made[one] for one in old.layers]
    new = cls(layers[0], 0, old.norm, old.enable_nested_tensor)
    new.layers, new.num_layers = _in_mode(nn.ModuleList(layers), old.layers), old.num_layers
    return _in_mode(new, old)


def _in_mode(new: nn.Module, old: nn.Module) -> nn.Module:
    """Training or not, and nothing inside, which has modes of its own."""
    new.training = old.training
    return new


FAST = nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention


def convert_encoder(module: nn.TransformerEncoder, backend: str = "auto") -> Encoder:
    """One that has the very same parts; `why_not` has nothing against it."""
    return _encoder(module, {"backend": backend}, Encoder, EncoderLayer, MultiHeadAttention)


ATTENTIONS = "self_attn", "multihead_attn"
METHODS = ("forward", "_sa_block", "_ff_block", "_mha_block")
WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
OWN: dict[type, set[str]] = {  # the classes that are replaced, and what they hold themselves
    **dict.fromkeys((nn.MultiheadAttention, MultiHeadAttention), {*WEIGHTS}),
    **dict.fromkeys((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, EncoderLayer, DecoderLayer), set()),
    **dict.fromkeys((nn.TransformerEncoder, Encoder), set()),
}
LAYERS = nn.TransformerEncoderLayer, EncoderLayer  # of an encoder
PARTS: dict[str, tuple[type, ...]] = {  # by how their names begin
    "layers": (nn.ModuleList,),
    **dict.fromkeys(ATTENTIONS, (nn.MultiheadAttention, MultiHeadAttention)),
    "linear": LINEAR,
    "out_proj": LINEAR,
    "norm": (nn.LayerNorm,),
    "dropout": (nn.Dropout,),
}
THERE: dict[type, Callable] = {
    nn.MultiheadAttention: functools.partial(_attention, cls=MultiHeadAttention),
    nn.TransformerEncoderLayer: functools.partial(_layer, cls=EncoderLayer, inner=MultiHeadAttention),
    nn.TransformerDecoderLayer: functools.partial(_layer, cls=DecoderLayer, inner=MultiHeadAttention),
    nn.TransformerEncoder: functools.partial(_encoder, cls=Encoder, layer=EncoderLayer, inner=MultiHeadAttention),
}
BACK: dict[type, Callable] = {
    MultiHeadAttention: functools.partial(_attention, cls=nn.MultiheadAttention),
    EncoderLayer: functools.partial(_layer, cls=nn.TransformerEncoderLayer, inner=nn.MultiheadAttention),
    DecoderLayer: functools.partial(_layer, cls=nn.TransformerDecoderLayer, inner=nn.MultiheadAttention),
    Encoder: functools.partial(
        _encoder, cls=nn.TransformerEncoder, layer=nn.TransformerEncoderLayer, inner=nn.MultiheadAttention
    ),
}
