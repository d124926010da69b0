"""Hugging Face transformers: importing this module registers attn_implementation="fastattn".

    import fastattn.integrations.transformers
    model = AutoModel.from_pretrained(path, attn_implementation="fastattn")

Two functions are registered: the attention, and the mask function without which transformers would drop padding silently.
A model whose attention layers do not look their function up in transformers' AttentionInterface is refused when it is
constructed; `check` does the same for a model that exists.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastattn import masks
from fastattn.integrations.keywords import HARMLESS, NOT_SERVED
from fastattn.masks import Mask
from fastattn.ops.attention import attention
from fastattn.ops.varlen import varlen_attention
from fastattn.packing import Packing

NAME = "fastattn"
WINDOWED = ("modernbert",)  # model types whose layers hand their window to attention; of others the mask of pairs holds it

_INSTEAD = 'load the model with attn_implementation="sdpa" or "eager" for that'


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, M, D), key and value (B, Hkv, N, D), any strides -> (B, M, H, D), None.

    attention_mask is None, a bool (B, H or 1, M or 1, N) that says everything, floats of such a shape, which are added to the
    scores and say everything too, or a bool (B, N) of real keys. Beside this and None causality is `is_causal`, else the
    module's, and a key is hidden whose distance is sliding_window or more, as in transformers' flash attention. A causal (B, N)
    is aligned at the bottom right (the queries are the last tokens of a cache), a causal None at the top left, as in
    transformers' own "sdpa". position_bias, (B or 1, H or 1, M or 1, N or 1), is added to the scores, and like a float
    attention_mask has a gradient. The weights that dropout drops are drawn anew in each call, as by `fastattn.attention`.

    With cu_seq_lens_q and max_length_q, as DataCollatorWithFlattening gives them, B is 1 and sequences lie end to end: they are
    told apart by their offsets, and attention_mask is not looked at. Those of the keys are the queries' own by default.

    Raises:
        NotImplementedError: for every argument that changes the result and is not served, in a sentence that names it.
        ValueError, TypeError: an argument does not fit.
    """
    M, N, packed = query.shape[2], key.shape[2], cu_seq_lens_q is not None
    rows = None if packed or attention_mask is None or attention_mask.dim() != 4 else attention_mask.shape[2]
    if packed or rows == M:
        kwargs.pop("seq_idx", None)  # sequences are told apart already
    _check_keywords(kwargs)
    if rows is not None and rows != M:
        _check_window(sliding_window, M, N)
    if cu_seq_lens_q is not None:
        if position_bias is not None:
            raise NotImplementedError(f"fastattn does not serve position_bias beside cu_seq_lens_q: {_INSTEAD}")
        packing = _packing(cu_seq_lens_q, max_length_q, query)
        same = cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q
        key_packing = packing if same else _packing(cu_seq_lens_k, max_length_k, key)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        pattern = _pattern(_causal(module, is_causal), sliding_window, M, N, "bottom_right")
        out = varlen_attention(q, k, v, packing, pattern, key_packing=key_packing, scale=scaling, dropout=dropout)
        return out[None], None
    mask, bias = None, position_bias
    if attention_mask is not None and attention_mask.is_floating_point():
        bias = _bias(attention_mask, position_bias)
    else:
        mask = _mask(module, attention_mask, is_causal, sliding_window, M, N)
    out = attention(query, key, value, mask, bias=bias, scale=scaling, dropout=dropout)
    return out.transpose(1, 2), None


def padding_or_pairs(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # an int, or a tensor from a static cache
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: the padding mask alone where the rest of the pattern needs no tensor, else every pair.

    Returns None or a bool (batch_size, kv_length) where the pattern is bidirectional, or causal with the queries at the end
    of the keys, or the window of a bidirectional model of WINDOWED; else, and where transformers asks for a full mask, a bool
    (batch_size, 1, q_length, kv_length).
    """
    windowed = kwargs.get("local_size") is not None and getattr(kwargs.get("config"), "model_type", None) in WINDOWED
    bidirectional = mask_function is bidirectional_mask_function or windowed
    plain = kv_offset == 0 and not use_vmap and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
    if bidirectional:
        plain = plain and allow_is_bidirectional_skip
    else:  # a static cache holds keys beyond the last query
        last = mask_function is causal_mask_function and isinstance(q_offset, int) and q_offset + q_length == kv_length
        plain = plain and allow_is_causal_skip and last
    square = bidirectional or q_length == 1 or q_length == kv_length  # beside None, causal is aligned at the top left
    if plain and attention_mask is None and square:
        return None
    if plain and attention_mask is not None:
        # Reading the mask's values would break a traced graph, and would be frozen into it.
        all_real = square and not is_tracing(attention_mask) and bool(attention_mask.all())
        return None if all_real else attention_mask
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": use_vmap},
    )  # fmt: skip


def check(model: PreTrainedModel) -> None:
    """Raise unless every part of the model that has attn_implementation="fastattn" really calls fastattn.

    Raises:
        NotImplementedError: the attention layers of a part do not use transformers' AttentionInterface.
        ValueError: no part of the model has attn_implementation="fastattn".
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    parts = [part for part in parts if part.config._attn_implementation == NAME]
    for part in parts:
        _check_class(type(part))
    if not parts:
        _check_class(type(model))
        raise ValueError(f'{type(model).__name__} does not use fastattn: call model.set_attn_implementation("{NAME}") first')


def _packing(cu_seqlens: Tensor | None, max_length: int | None, x: Tensor) -> Packing:
    """Offsets are validated where the host can read them without waiting."""
    if cu_seqlens is None or max_length is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k need max_length_q and max_length_k")
    if x.shape[0] != 1:
        raise ValueError(f"with cu_seq_lens_q the batch size must be 1, got {x.shape[0]}")
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    return Packing.from_cu_seqlens(cu_seqlens, int(max_length), validate=readable, capacity=x.shape[2])


def _check_keywords(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in HARMLESS or value is None:
            continue
        if name not in NOT_SERVED:
            raise NotImplementedError(f"fastattn does not know {name}, which may change the result of attention: {_INSTEAD}")
        if value is not False:
            raise NotImplementedError(f"fastattn does not serve {name}, {NOT_SERVED[name]}: {_INSTEAD}")


def _check_window(sliding_window: int | None, M: int, N: int) -> None:
    """A mask of pairs holds the window already; beside one row for all queries it must be too wide to hide anything."""
    if sliding_window is not None and _hides(sliding_window, M, N):
        raise NotImplementedError(
            f"fastattn serves a window beside a mask (B, N), or as part of a mask (B, 1, M, N), but sliding_window="
            f"{sliding_window} came with one row for all queries: {_INSTEAD}"
        )


def _hides(sliding_window: int, M: int, N: int) -> bool:
    if not isinstance(sliding_window, int) or sliding_window < 1:
        raise NotImplementedError(f"fastattn serves a window of at least one key, got sliding_window={sliding_window}")
    return sliding_window < max(M, N)


def _bias(attention_mask: Tensor, position_bias: Tensor | None) -> Tensor:
    if attention_mask.dim() != 4:
        shape = tuple(attention_mask.shape)
        raise ValueError(
            f"attention_mask of {attention_mask.dtype}, added to the scores, must be (B, H, M, N), got shape {shape}"
        )
    return attention_mask if position_bias is None else position_bias + attention_mask


def _mask(
    module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None, sliding_window: int | None, M: int, N: int
) -> Mask | Tensor | None:
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be bool (True = may attend) or of floating point, got {attention_mask.dtype}")
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, N) or (B, H, M, N), got shape {tuple(attention_mask.shape)}")
    last = attention_mask is not None or M == 1  # the queries are the last tokens
    pattern = _pattern(M > 1 and _causal(module, is_causal), sliding_window, M, N, "bottom_right" if last else "top_left")
    if attention_mask is None:
        return pattern
    padding = masks.key_padding(attention_mask)
    return padding if pattern is None else padding & pattern


def _pattern(causal: bool, sliding_window: int | None, M: int, N: int, align: str) -> Mask | None:
    """Which keys a query sees by distance alone."""
    if sliding_window is not None and _hides(sliding_window, M, N):
        return masks.window(sliding_window - 1, 0 if causal else sliding_window - 1, align)
    return masks.causal(align) if causal else None


def _causal(module: nn.Module, is_causal: bool | None) -> bool:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        raise NotImplementedError(
            f"{type(module).__name__} does not say whether it is causal, and fastattn needs is_causal to be an argument or "
            'an attribute of it: load the model with attn_implementation="eager"'
        )
    return bool(is_causal)


def _check_class(cls: type) -> None:
    """Raise unless the module that defines a model class looks attention up in the interface, or defines no attention."""
    namespace = list(vars(sys.modules[cls.__module__]).values())
    if any(isinstance(item, AttentionInterface) for item in namespace):
        return
    own = [item for item in namespace if isinstance(item, type) and item.__module__ == cls.__module__]
    if any(issubclass(item, nn.Module) and "Attention" in item.__name__ for item in own):
        raise NotImplementedError(
            f"{cls.__name__} computes attention itself and does not use transformers' AttentionInterface, so fastattn cannot "
            'serve it: load it with attn_implementation="eager"'
        )


def _refuse_at_construction() -> None:
    """Let PreTrainedModel's check of the requested attention, run by every model's __init__, refuse what `check` would.

    transformers accepts any registered name for any class; some classes would then add our bool mask to their scores.
    """
    accepts = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(accepts)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention == NAME:
            _check_class(type(self))
        return accepts(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_or_pairs)
_refuse_at_construction()
