"""Reading and writing model directories in Hugging Face's layout: `config.json` beside `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def read_config(directory: str | Path) -> dict[str, Any]:
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"there is no folder {directory}: models are read from folders, nothing is downloaded")
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json")
    return json.loads(path.read_text())


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = Path(directory) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no model.safetensors (sharded and pickled weights are not served)")
    return load_file(path)


def settings(config: Any, expected: str) -> dict[str, Any]:
    """The keys of a config given as a mapping, or as an object with `to_dict` such as Hugging Face's, for one model type."""
    raw = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    if raw.get("model_type", expected) != expected:
        raise NotImplementedError(f"model_type is {raw['model_type']!r}, but these are the mathematics of {expected!r}")
    return raw


def known(config_class: type, raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that a config dataclass has a field for; the others do not change the mathematics or were refused before."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in raw.items() if name in names}


def check_heads(config: Any) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )


def assign_weights(model: nn.Module, stored: dict[str, Tensor], body: tuple[str, ...]) -> None:
    """Make the stored tensors the model's parameters, in the dtype they are stored in. Tied parameters need one of their names.

    Raises ValueError naming every parameter that the file lacks, and every weight under the prefixes `body` that the model
    has no place for (its config describes another model). Weights elsewhere, the heads of other tasks, are left out, and so
    are saved position and token type ids. RuntimeError, from PyTorch, for another shape.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    state: dict[str, nn.Parameter] = {}
    missing = []
    for names in names_of.values():
        found = next((name for name in names if name in stored), None)
        if found is None:
            missing.append(names[0])
        else:
            state.update(dict.fromkeys(names, nn.Parameter(stored[found])))
    if missing:
        raise ValueError(f"model.safetensors lacks weights of the model: {', '.join(missing)}")
    buffers = ("position_ids", "token_type_ids")
    unexpected = [name for name in stored if name not in state and name.startswith(body) and not name.endswith(buffers)]
    if unexpected:
        raise ValueError(f"model.safetensors has weights that the model of this config lacks: {', '.join(unexpected)}")
    model.load_state_dict(state, assign=True)


def save(model: nn.Module, config: dict[str, Any], directory: str | Path) -> None:
    """Write both files; of tied parameters one name is stored."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
