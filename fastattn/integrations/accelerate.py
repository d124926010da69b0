"""`accelerate(model)`: a Hugging Face encoder, in place and reversibly, on fastattn's ops and without its padding.

Some modules get a `forward` of their own, on the instance alone; classes, parameters and state_dict stay as they are.
`accelerate_forward` has what they do; `accelerate_layers` says which encoders there are and how their layers are made up;
`accelerate_checks`, whether they are what they seem; `accelerate_proof` compares a layer with its own code; `accelerate_heads`
knows who reads padding.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from fastattn.graphs import LIMIT, Graphs, check_limit
from fastattn.integrations.accelerate_blocks import MODELS, Block, accelerate_block, kind_of
from fastattn.integrations.accelerate_checks import look
from fastattn.integrations.accelerate_families import FAMILIES, own_class
from fastattn.integrations.accelerate_forward import (
    Encoder,
    Layer,
    Replaced,
    Report,
    encoder_forward,
    head_forward,
    layer_forward,
    model_forward,
    pooler_forward,
)  # fmt: skip
from fastattn.integrations.accelerate_graphs import EncoderGraphs
from fastattn.integrations.accelerate_heads import ENDS, reader_among, takes_labels
from fastattn.integrations.accelerate_parts import DROPOUTS, Family
from fastattn.integrations.accelerate_torch import Stack, accelerate_stack
from fastattn.kept import clear_packed
from fastattn.packing import check_sizes

UNPAD = ("auto", "always", "never")


class Handle:
    """Undoes `accelerate`; as a context manager at the end of the block."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._replaced: list[Replaced] = []
        self._encoders: list[Encoder] = []
        self._stacks: list[Stack] = []
        self._blocks: list[Block] = []

    @property
    def overflowed(self) -> bool:
        """Whether an encoder had more real tokens than `capacity` in its last call, and some were dropped. Waits for a GPU."""
        return any(bool(x.overflowed) for x in self._encoders if x.overflowed is not None)

    def restore(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        for replaced in reversed(self._replaced):
            replaced.undo()
        self._replaced.clear()
        self._drop_graphs()
        clear_packed()

    def refresh(self) -> None:
        """Forget what is known of the model: its next call looks at it and proves it again, and makes copies of weights anew.
        CUDA graphs are dropped, and their memory given back.

        Changes of weights and modules are noticed without it; see `clear_packed` for the one kind of write that is not.
        """
        for encoder in self._encoders:
            encoder.examined = None
        for stack in self._stacks:
            stack.twin = None
        for block in self._blocks:
            block.forget()
        self._drop_graphs()
        clear_packed()

    def __repr__(self) -> str:
        done, left = len(self.report.accelerated), len(self.report.left) or "none"
        state = f"{done} encoder{'' if done == 1 else 's'} accelerated, {left} left; print its report for more"
        if done and not self._replaced:
            state = "the model was restored"
        return f"<Handle of accelerate: {state}>"

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _drop_graphs(self) -> None:
        for encoder in self._encoders:
            if encoder.graphs is not None:
                encoder.graphs.drop()

    def _replace(self, module: nn.Module, function: Callable, settings: Any) -> Replaced:
        self._replaced.append(Replaced(function, module, settings))
        return self._replaced[-1]


def restore(model: nn.Module) -> None:
    """Undo `accelerate` on a model whose handle is not at hand: a copy, or one that was unpickled.

    >>> from transformers import BertConfig, BertModel
    >>> bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).eval()
    >>> handle = fastattn.accelerate(bert)
    >>> fastattn.restore(bert)
    >>> "forward" in vars(bert)
    False
    """
    for module in model.modules():
        for value in list(vars(module).values()):  # under another name where a library has put its own in front
            if isinstance(value, Replaced):
                value.undo()
                if isinstance(value.settings, Encoder) and value.settings.graphs is not None:
                    value.settings.graphs.drop()
    clear_packed()


def accelerate(
    model: nn.Module,
    strict: bool = False,
    *,
    capacity: int | None = None,
    prove: bool = True,
    unpad: str = "auto",
    cuda_graphs: bool | int = False,
) -> Handle:
    """Let the encoders inside `model` compute real tokens alone, with fused attention, FFN and add + LayerNorm.

    Serves these of transformers, alone, with any head on top, or inside another module such as a SentenceTransformer:

    {families}.
    And torch.nn.TransformerEncoder, {blocks}.

    Outputs at real tokens, losses and gradients are those of the model, up to rounding; hidden states at padding that is taken
    out are 0. What is not exactly what it seems is left to its own code: layers, attention or MLPs of other classes, a `forward`
    that was set or replaced, adapters, quantized or parametrized weights, hooks inside a layer. That is looked at in each call.
    In its first call, and after each such change, an encoder computes its layers both ways and compares.

    Args:
        model: any module; what is not served is left and named in the report. Give it whole: a head may read padding.
        strict: raise where something would be left, and where a call would have to run the model's own code.
        capacity: rows of packed batches, for static shapes: with it nothing is read on the host, so that a call can be traced by
            torch.compile or captured in a CUDA graph without padding. Tokens beyond it are dropped, and `overflowed` says so.
            None: as many as there are; a traced or captured call then keeps its padding.
        prove: False skips the comparison. A call that is traced or captured makes none: make one call before.
        unpad: "auto" leaves padding in where it is known to be read: by a head, a loss, a pooler, or distances over holes in a
            mask (docs/accelerate.md lists them). "always" is your word that it does not matter what stands at padding; "never"
            fuses and leaves it in. Hooks on a layer see (B, L, C), so that with them padding stays in always.
        cuda_graphs: True replays inference calls as CUDA graphs, each captured the first time that its shapes are seen; at most
            16 are kept, or as many as a number here says. Outputs are copies of the caller's own. Calls that cannot be captured
            run as they would without it, and `report.not_captured` counts them by reason.

    Returns:
        A handle with `report`, `overflowed`, `restore()` and `refresh()`; a context manager.

    Raises:
        TypeError, ValueError: an argument does not fit, the model is accelerated already, or `strict` and nothing is served.
        NotImplementedError: `strict` and a part of it would be left.

    `report.fallbacks` counts calls that run the model's own code, and the logger "fastattn" says so once for each reason. More,
    also of dropout and of captures: docs/accelerate.md.

    >>> from transformers import BertConfig, BertModel
    >>> bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).eval()
    >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> with fastattn.accelerate(bert) as handle, torch.no_grad():
    ...     hidden = bert(ids, attention_mask=mask).last_hidden_state  # (2, 3, 32)
    >>> hidden[1, 2].abs().max().item(), len(handle.report.accelerated), len(handle.report.fallbacks)
    (0.0, 1, 0)
    """
    _check(model, capacity, unpad)
    graphs, handle = _graphs(cuda_graphs), Handle(Report())
    _undo_on_copies(model)
    for name, module in model.named_modules():
        _accelerate_module(handle, model, name, module, graphs, capacity, unpad, {"strict": strict, "prove": prove})
    _conclude(handle, strict)
    return handle


accelerate.__doc__ = (
    (accelerate.__doc__ or "")
    .replace("{families}", textwrap.fill(", ".join(FAMILIES), 126, subsequent_indent="    "))
    .replace("{blocks}", MODELS)
)  # from the data that it goes by


def _accelerate_module(
    handle: Handle,
    model: nn.Module,
    name: str,
    module: Any,
    graphs: Graphs | None,
    capacity: int | None,
    unpad: str,
    settings: Any,
) -> None:
    """One module inside a model, if it is of a kind that is served. settings: `strict` and `prove`."""
    if own_class(module) is not None:
        encoder = _accelerate_encoder(handle, model, name, module, capacity=capacity, unpad=unpad, **settings)
        if encoder is not None and graphs is not None:
            encoder.graphs = EncoderGraphs(module, graphs)
    elif type(module) is nn.TransformerEncoder:
        accelerate_stack(handle, name, module, capacity, unpad=unpad, graphs=graphs is not None, **settings)
    elif kind_of(module) is not None:
        accelerate_block(handle, name, module, capacity, graphs=graphs is not None, **settings)


def _conclude(handle: Handle, strict: bool) -> None:
    """Raise where `strict` and something is left, and say so where there was nothing to serve."""
    report, none = (
        handle.report,
        f"no encoder that is served: one of {', '.join(FAMILIES)}, torch.nn.TransformerEncoder, {MODELS}",
    )
    if strict and (report.left or not report.accelerated):
        handle.restore()
        why = "; ".join(f"{name or 'model'}: {reason}" for name, reason in report.left.items())
        if not why:
            raise ValueError(f"model has {none}")
        raise NotImplementedError(f"strict=True, but not all of the model is served: {why}")
    if not report.accelerated and not report.left:
        report.left[""] = none


def _check(model: Any, capacity: Any, unpad: Any) -> None:
    if not isinstance(model, nn.Module):
        inner = next((name for name in ("model", "module") if isinstance(getattr(model, name, None), nn.Module)), None)
        hint = "" if inner is None else f": give it .{inner}"
        if isinstance(model, str):
            hint = f": load it first, for instance by transformers.AutoModel.from_pretrained({model!r})"
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    check_sizes(capacity=capacity)
    if unpad not in UNPAD:
        raise ValueError(f"unpad must be one of {', '.join(UNPAD)}; got {unpad!r}")


def _graphs(cuda_graphs: Any) -> Graphs | None:
    if cuda_graphs is False:
        return None
    limit = LIMIT if cuda_graphs is True else cuda_graphs
    check_limit(limit, "cuda_graphs")
    return Graphs(limit)


def _undo_on_copies(model: nn.Module) -> None:
    """A copy of an accelerated model is one, but its handle is nowhere. Raises ValueError where there is a handle."""
    for name, module in model.named_modules():
        standing = vars(module).get("forward")
        if not isinstance(standing, Replaced):
            continue
        if standing.active and not standing.copied:
            where = name or "the model"
            raise ValueError(f"{where} is accelerated already: call restore() of its handle, or fastattn.restore(model)")
        standing.undo()


def _accelerate_encoder(handle: Handle, model: nn.Module, name: str, module: nn.Module, **settings: Any) -> Encoder | None:
    """One encoder inside a model, and the heads around it that take labels; or its line in `report.left`."""
    cls: Any = own_class(module)
    family = FAMILIES[cls.__name__].of(getattr(module, "config", None))
    inputs = list(inspect.signature(cls.forward).parameters)[1:]
    refusal = look(module, family, {}).refusal or _not_told(module, family)
    if refusal is not None:
        handle.report.left[name] = refusal
        return None
    outside = [outer for outer in model.modules() if outer is not module and module in set(outer.modules())]
    reader = next((why for outer in outside if (why := reader_among(outer)) is not None), None)
    pooled = family.pooled in ("last", *ENDS) or getattr(module, "pooler", None) is not None
    pooled = pooled or any(hasattr(outer, "config") for outer in outside)
    pools = family.packs == "layers" and family.encoder is None and getattr(module, "pooler", None) is not None
    encoder = Encoder(family, name, inputs, handle.report, reader, pooled, pools, **settings)
    _replace_encoder(handle, module, encoder)
    for outer in outside if family.unpads and family.mask in inputs else ():
        if takes_labels(outer) and not isinstance(vars(outer).get("forward"), Replaced):
            handle._replace(outer, head_forward, None)
    return encoder


def _not_told(model: nn.Module, family: Family) -> str | None:
    """Why a call's batch cannot reach the layers as a keyword argument: so in other versions of transformers."""
    passing = [model] if family.hands_on == "model" else []
    if family.encoder is not None and family.hands_on != "nobody":
        passing.append(model.get_submodule(family.encoder))
    for module in passing:
        kinds = {x.kind for x in inspect.signature(type(module).forward).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return f"{type(module).__name__} hands no further keyword arguments on to its layers"
    return None


def _replace_encoder(handle: Handle, model: Any, encoder: Encoder) -> None:
    family = encoder.family
    encoder.ours[model] = handle._replace(model, model_forward, encoder)
    if family.encoder is not None:
        inner = getattr(model, family.encoder)
        encoder.ours[inner] = handle._replace(inner, encoder_forward, encoder)
    if encoder.pools:
        encoder.ours[model.pooler] = handle._replace(model.pooler, pooler_forward, encoder)
    for name, module in family.layers_of(model).items():
        layer = Layer(name, module, family, None)
        encoder.layers.append(layer)
        encoder.ours[module] = handle._replace(module, layer_forward, layer)
    encoder.examine(model)
    handle._encoders.append(encoder)
    _describe(model, encoder)


def _describe(model: Any, encoder: Encoder) -> None:
    """In the report: what is done, and what is to come."""
    family = encoder.family
    stays = encoder.found.hooked or (encoder.reader if encoder.unpad == "auto" else None)
    if not family.unpads:
        padding = ""
    elif stays is not None or encoder.unpad == "never":
        padding = f"padding stays in ({stays or 'unpad=never'}), "
    else:
        padding = "real tokens alone, "
    what = f"{type(model).__name__}, {len(encoder.layers)} layers: {padding}fused attention, FFN and norms{_dropouts(encoder)}"
    encoder.report.accelerated[encoder.name] = what
    if model.config.output_attentions:
        encoder.report.foreseen[encoder.name] = "all calls will run the model's own code: its config has output_attentions=True"


def _dropouts(encoder: Encoder) -> str:
    """Those that layers have in training."""
    layers, family = encoder.found.parts.values(), encoder.family
    rates = {
        "attention": [family.dropout_of_attention(parts.attention) for parts in layers],
        "hidden": [getattr(getattr(parts, name), "p", 0.0) for parts in layers for name in DROPOUTS],
    }
    named = [f"{name} dropout ({max(found)})" for name, found in rates.items() if max(found, default=0.0) > 0]
    return f"; {' and '.join(named)} in training" if named else ""
