"""`python -m fastattn bench`: a user's own shape or checkpoint, checked first and timed side by side afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import masks, testing
from fastattn.models.checkpoint import read_config
from fastattn.timing import Call, interleaved, kernels, speedup

SECONDS = 3.0


def attention(x: testing.AttentionInputs) -> int:
    """Forward of one request: PyTorch's attention with the same mask as a bool tensor, then ours.

    Padding that is given by lengths is timed with query lengths as well, as a user should give it: then no padding is computed.
    """
    B, H, M, _ = x.q.shape
    N, device = x.k.shape[2], x.q.device
    mask = masks.full() if x.mask is None else x.mask
    dense = None if x.mask is None else mask.dense(B, H, M, N, device)
    print(fastattn.explain(x.q, x.k, x.v, x.mask, scale=x.scale))
    print(f"{mask} on {_processor(device)}{_real(mask.pairs(M, N, device))}", flush=True)
    calls: dict[str, Call] = {"sdpa": lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, dense, scale=x.scale)}
    for form in _forms(mask, M, N):
        print(f"checking fastattn with {form} against fp64", flush=True)
        request = replace(x, mask=form)
        testing.assert_accurate({"out": _attention(request)}, testing.attention_yardstick(request))
        calls[f"fastattn, {form}"] = partial(_attention, request)
    _report(calls, device)
    if len(calls) > 2:
        print("the last one has query lengths too, and outputs of 0 for the padding queries, which nobody should read")
    return 0


def _attention(x: testing.AttentionInputs) -> Tensor:
    out = fastattn.attention(x.q, x.k, x.v, x.mask, scale=x.scale)
    assert isinstance(out, Tensor)
    return out


def _forms(mask: masks.Mask, M: int, N: int) -> list[masks.Mask]:
    """The mask; and, where lengths of keys alone hide padding, and queries are the keys, with the same lengths for queries."""
    if mask.key_end is None or mask.keys is not None or mask.query_end is not None or M != N:
        return [mask]
    return [mask, mask & masks.padding(mask.key_end, mask.key_end)]


def _processor(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU, {threads} thread{'s' * (threads > 1)}"


def _real(pairs: Tensor) -> str:
    """How much of a batch is no padding. pairs: as `Mask.pairs`, each dimension its size or 1."""
    if not pairs.numel():
        return ""
    keys, visible = pairs.any(-2).double().mean(), pairs.double().mean()
    return f": {keys:.0%} of the keys are real, {visible:.0%} of the pairs visible"


def load(directory: Path, device: str) -> dict[str, torch.nn.Module]:
    """A BERT or CLIP checkpoint in each implementation, in fp32.

    Raises OSError, ValueError, NotImplementedError or, from PyTorch, RuntimeError where it is none that is served.
    """
    if not directory.is_dir():
        raise NotADirectoryError("this is not a directory" if directory.exists() else "there is no such directory")
    try:
        config = read_config(directory)
    except ValueError as error:
        raise ValueError(f"config.json cannot be read: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("bert", "clip"):
        raise ValueError(f"config.json says model_type {kind!r}; bench serves 'bert' and 'clip'")
    print(f"loading {directory} three times", flush=True)
    return {name: _load(kind, directory, name).to(device, torch.float32) for name in ("eager", "sdpa", "fastattn")}


def checkpoint(models: dict[str, torch.nn.Module], batch: int, length: int) -> int:
    """The models of `load`, on random tokens (and pixels) without padding."""
    device = next(models["eager"].parameters()).device
    inputs = _inputs(models["eager"].config, batch, length, device)
    calls: dict[str, Call] = {name: _call(model, inputs) for name, model in models.items()}
    outputs = {name: call() for name, call in calls.items()}
    error = max(float((outputs[name] - outputs["eager"]).abs().max()) for name in outputs)  # type: ignore[operator]
    shape = " x ".join(map(str, inputs["input_ids"].shape))
    print(f"{type(models['eager']).__name__} on {_processor(device)}, {shape} tokens, no padding among them")
    print(f"largest difference from eager {error:.1e}")
    if not error <= 1e-3 * float(outputs["eager"].abs().max()):  # type: ignore[attr-defined]
        print("the implementations disagree: nothing is timed")
        return 1
    _report(calls, device)
    return 0


def _load(kind: str, directory: Path, implementation: str) -> torch.nn.Module:
    from safetensors import SafetensorError

    from fastattn.models.bert import BertModel
    from fastattn.models.clip import CLIPModel

    model = BertModel if kind == "bert" else CLIPModel
    try:
        return model.from_pretrained(directory, implementation=implementation)
    except SafetensorError as error:
        raise ValueError(f"model.safetensors cannot be read: {error}") from error


def _inputs(config, batch: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = getattr(config, "text_config", config)
    length = min(length, text.max_position_embeddings)
    tokens = torch.randint(0, text.vocab_size, (batch, length), generator=generator)
    if text is config:
        return {"input_ids": tokens.to(device)}
    vision = config.vision_config
    pixels = torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": tokens.to(device), "pixel_values": pixels.to(device)}


def _call(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            output = model(**inputs)
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits_per_image

    return run


def _report(calls: dict[str, Call], device: torch.device) -> None:
    print(f"timing {len(calls)} calls in turns, as called from Python, for {SECONDS:g} s or five rounds", flush=True)
    with torch.no_grad():
        samples = interleaved(calls, device, seconds=SECONDS)
        graphs = kernels({name: [call] for name, call in calls.items()}, device, seconds=1.0) if device.type == "cuda" else {}
    width = max(map(len, calls))
    print(f"{'':{width}} {'median':>9}      times as fast: median of each round's quotient")
    for name, sample in samples.items():
        print(f"{name:{width}} {sample.median:9.3f} ms   {speedup(sample, samples['sdpa']):5.2f}x sdpa")
    for name, taken in graphs.items():
        time = (
            f"{taken.median:9.3f} ms   without the host: {taken.method}"
            if taken.ms
            else f"  no time without the host: {taken.reason}"
        )
        print(f"{name:{width}} {time}")
