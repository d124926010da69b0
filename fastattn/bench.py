"""`python -m fastattn bench`: a user's own shape or checkpoint, checked first and timed side by side afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import fastattn
from fastattn import testing
from fastattn.models.checkpoint import read_config
from fastattn.timing import Call, interleaved, speedup

SECONDS = 3.0


def attention(x: testing.AttentionInputs) -> int:
    """Forward of one request: PyTorch's attention with the same mask as a bool tensor, then ours."""
    yardstick = testing.attention_yardstick(x)
    B, H, M, _ = x.q.shape
    N = x.k.shape[2]
    dense = None if x.mask is None else x.mask.dense(B, H, M, N, x.q.device)
    testing.assert_accurate({"out": fastattn.attention(x.q, x.k, x.v, x.mask, scale=x.scale)}, yardstick)
    print(fastattn.explain(x.q, x.k, x.v, x.mask, scale=x.scale))
    calls: dict[str, Call] = {
        "sdpa": lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, dense, scale=x.scale),
        "fastattn": lambda: fastattn.attention(x.q, x.k, x.v, x.mask, scale=x.scale),
    }
    return _report(calls, x.q.device)


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
    return {name: _load(kind, directory, name).to(device, torch.float32) for name in ("eager", "sdpa", "fastattn")}


def checkpoint(models: dict[str, torch.nn.Module], batch: int, length: int) -> int:
    """The models of `load`, on random tokens (and pixels) without padding."""
    device = next(models["eager"].parameters()).device
    inputs = _inputs(models["eager"].config, batch, length, device)
    calls: dict[str, Call] = {name: _call(model, inputs) for name, model in models.items()}
    outputs = {name: call() for name, call in calls.items()}
    error = max(float((outputs[name] - outputs["eager"]).abs().max()) for name in outputs)  # type: ignore[operator]
    print(f"{type(models['eager']).__name__}, batch {batch}, largest difference from eager {error:.1e}")
    if not error <= 1e-3 * float(outputs["eager"].abs().max()):  # type: ignore[attr-defined]
        print("the implementations disagree: nothing is timed")
        return 1
    return _report(calls, device)


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


def _report(calls: dict[str, Call], device: torch.device) -> int:
    with torch.no_grad():
        samples = interleaved(calls, device, seconds=SECONDS)
    for name, sample in samples.items():
        print(f"{name:9} {sample.median:9.3f} ms   {speedup(sample, samples['sdpa']):5.2f}x sdpa")
    return 0
