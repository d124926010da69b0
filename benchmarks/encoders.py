"""The encoders that `accelerate` knows, as a table: from the data that it goes by."""

from __future__ import annotations

from fastattn.integrations.accelerate_blocks import MODELS
from fastattn.integrations.accelerate_families import FAMILIES
from fastattn.integrations.accelerate_parts import BEYOND_PLAIN, Family

HEAD = ["transformers' classes", "a layer", "padding", "on a GPU"]
NAMES = [f"served by `accelerate`: torch.nn.TransformerEncoder, {MODELS}, and whole encoders of transformers"]
ENDS = ("Model", "Encoder", "Stack")
WORDS = {  # of parts beyond those that all layers have
    "joined": "query, key and value as one",
    "gate": "gated FFN",
    "relative": "bias of distances",
    "position_bias": "bias of patches",
    "first_scale": "layer scale",
    "drop_path": "drop path",
}


def rows() -> list[list[str]]:
    """A line for each way of computing a layer and of treating padding."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, family in FAMILIES.items():
        alike.setdefault((_layer(family), _padding(family), _on_a_gpu(family)), []).append(f"`{name}`")
    return [[", ".join(names), *described] for described, names in alike.items()]


def names() -> list[list[str]]:
    """One line of all, without what the names of models end in."""
    return [[", ".join(name.removesuffix(next((end for end in ENDS if name.endswith(end)), "")) for name in FAMILIES)]]


def _parts(family: Family) -> set[str]:
    more = (part for variant in family.variants for part in variant)
    return {*family.parts, *more, *(part for part, _ in (*family.optional, *family.shared))}


def _layer(family: Family) -> str:
    order = f"post-norm, pre-norm by its config's `{family.stable}`" if family.stable else ""
    words = [order or ("pre-norm" if family.pre_norm else "post-norm")]
    words += ["RMSNorm"] if family.rms else []
    words += ["causal"] if family.causal else []
    words += [words_of for part, words_of in WORDS.items() if part in _parts(family)]
    words += ["gated FFN"] if family.gated else []
    words += ["bias of pairs"] if family.pair_bias and "position_bias" not in _parts(family) else []
    words += ["rotary positions"] if family.rotary else []
    words += ["windows"] if family.window else []
    words += ["grouped heads"] if family.grouped else []
    return ", ".join(words)


def _padding(family: Family) -> str:
    if family.unpads:
        return "taken out"
    return "none" if family.mask is None else "stays in, masked"


def _on_a_gpu(family: Family) -> str:
    return "launches" if family.plain and not _parts(family) & {*BEYOND_PLAIN} else "functions"
