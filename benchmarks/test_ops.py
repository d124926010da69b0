"""The same comparison under pytest-benchmark: `pytest benchmarks/test_ops.py`, a group per shape, a case per provider.

No case is timed before its result has passed the accuracy gate; a provider that refuses is a skip with its own words.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import measure, ops, shapes
from fastattn import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FEW = {"cpu": 2, "cuda": 32}[DEVICE.type]


@functools.lru_cache(maxsize=1)
def task(index: int, fill: float) -> tuple:
    """The task of one attention shape, its first inputs and its yardstick."""
    found = ops.attention_task(shapes.ATTENTION[index], FEW, fill, DTYPE, DEVICE)
    inputs = found.inputs(0)
    return found, inputs, found.yardstick(inputs)


CASES = [
    (index, fill, provider.name)
    for index, shape in enumerate(shapes.ATTENTION)
    if DEVICE.type == "cuda" or shape.S <= 128
    for fill in shape.fills
    for provider in ops.attention_providers.providers(DEVICE)
]


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize(("index", "fill", "name"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_attention(benchmark, index: int, fill: float, name: str, mode: str) -> None:
    found, inputs, yardstick = task(index, fill)
    contender = next(c for c in found.contenders if c.name == name)
    trial, refusal = measure.attempt(functools.partial(measure.trial, contender.build, found, inputs), contender.package)
    if trial is None:
        if measure.is_failure(contender.ours, refusal):
            pytest.fail(refusal)
        pytest.skip(refusal)
    run, actual = trial
    errors = measure.check(actual, found, yardstick, contender)
    benchmark.group = f"attention {found.fields['model']} fill {found.fields['fill']} {mode}"
    benchmark.extra_info.update(device=str(DEVICE), fill=found.fields["fill"], max_error=errors[mode])
    turns = measure.calls(found, run, mode, measure.input_sets(found, DEVICE), DEVICE)
    call = timing.synchronised(timing.rotate(turns), DEVICE)
    benchmark.pedantic(call, rounds=20, iterations=1, warmup_rounds=2)
