"""The arguments that can reach attention, from transformers' own sources: each is served, refused in words, or harmless.

A new version of transformers that adds one fails here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

transformers = pytest.importorskip("transformers")

from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs  # noqa: E402
from transformers.integrations.flash_attention import flash_attention_forward  # noqa: E402
from transformers.integrations.flex_attention import flex_attention_forward  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.loss.loss_utils import LOSS_MAPPING  # noqa: E402
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults  # noqa: E402

from fastattn.integrations import transformers as integration  # noqa: E402

SERVED = set(inspect.signature(integration.attention_forward).parameters) - {"kwargs"}


@functools.cache
def modeling_files() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")]


def found(pattern: str) -> list[str]:
    """The last group of every match in a modeling file. Statements begin and end at one indentation there."""
    matches = [match for text in modeling_files() for match in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]
    assert matches, pattern
    return [match if isinstance(match, str) else match[-1] for match in matches]


def fields_of_typed_dicts() -> set[str]:
    own = "".join(found(r"^class \w+\([^)\n]*(?:TypedDict|TransformersKwargs|FlashAttentionKwargs)[^)\n]*\):\n(.*?)^(?=\S)"))
    fields = set(re.findall(r"^    (\w+): ", own, re.MULTILINE))
    return fields | TransformersKwargs.__annotations__.keys() | PagedAttentionArgs.__annotations__.keys()


def keywords_of_attention_calls() -> set[str]:
    bodies = found(r"^( *)[^\n]*\battention_interface\(\n(.*?)^\1\)")
    assert len(bodies) > 300
    return {keyword.arg for body in bodies for keyword in ast.parse(f"f({body})", mode="eval").body.keywords if keyword.arg}


def parameters_of_attention_functions() -> set[str]:
    bodies = found(r"^def \w*attention_forward\(\n(.*?)^\)")
    assert len(bodies) > 300
    functions = (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names = names.union(*(re.findall(r"^    (\w+)\b", body, re.MULTILINE) for body in bodies))
    return names - {"kwargs", "query_states", "key_states", "value_states"}  # some call query, key and value that


def defaults_of_losses() -> set[str]:
    """The arguments that are left to the caller: the others are a model's labels and outputs."""
    outputs = re.compile(r"(enc|encoder|outputs)_\w+|denoising_meta_values|predicted_corners|initial_reference_points")
    parameters = [p for loss in LOSS_MAPPING.values() for p in inspect.signature(loss).parameters.values()]
    return {p.name for p in parameters if p.default is not p.empty and not outputs.fullmatch(p.name)}


def flags_of_recorded_outputs() -> set[str]:
    recorded = found(r"^    _can_record_outputs = (\{.*?\})")
    return {f"output_{name}" for body in recorded for name in re.findall(r'"(\w+)": ', body)}


def defaults_from_the_config() -> set[str]:
    class Everything:
        def __getattr__(self, name: str) -> str:
            return "default"

    names = merge_with_config_defaults(lambda self, **kwargs: set(kwargs))(SimpleNamespace(config=Everything()))
    assert "use_cache" in names
    return names


@pytest.mark.parametrize(
    "source",
    [fields_of_typed_dicts, keywords_of_attention_calls, parameters_of_attention_functions, defaults_of_losses,
     flags_of_recorded_outputs, defaults_from_the_config],
)  # fmt: skip
def test_every_keyword_of_transformers_is_known(source):
    names = source()
    assert len(names) > 3
    assert not names - SERVED - integration.HARMLESS - integration.NOT_SERVED.keys()


def test_no_attention_function_of_transformers_reads_what_is_harmless():
    assert not parameters_of_attention_functions() & integration.HARMLESS
    assert not integration.HARMLESS & (integration.NOT_SERVED.keys() | SERVED) and not integration.NOT_SERVED.keys() & SERVED
