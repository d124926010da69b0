"""What the code takes from measurements on an H100 is what the result files say: which backend comes first, the ceilings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastattn
from fastattn import plans
from fastattn.ops import dispatch

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "h100"
GPU = ("triton", "cuda")


class Shape(NamedTuple):
    file: str
    model: str
    length: int
    head_dim: int
    fill: float


def measured() -> dict[Shape, dict[str, float]]:
    """Shape -> backend -> milliseconds of forward and backward, of which one choice serves both. Graph replays alone: in other
    rows the host's time may be hidden."""
    times: dict[Shape, dict[str, dict[str, float]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text())["records"]:
            backend = row.get("provider", "").removeprefix("fastattn ")  # a count of tests has none
            if row.get("op") == "attention" and row.get("method") == "graph replay" and backend in GPU and row["ms_median"]:
                shape = Shape(path.stem, row["model"], row["seq"], row["hidden"] // row["heads"], row["fill"])
                times.setdefault(shape, {}).setdefault(backend, {})[row["mode"]] = row["ms_median"]
    sums = {shape: {b: sum(modes.values()) for b, modes in found.items() if len(modes) == 2} for shape, found in times.items()}
    return {shape: found for shape, found in sums.items() if len(found) == len(GPU)}


def orders(shape: Shape, monkeypatch) -> list[tuple[str, ...]]:
    """The backends that forward and backward of such a request are offered, in order."""
    offered = []
    choose = dispatch.choose

    def recorded(op, backends, backend, *problems):
        offered.append(backends)
        return choose(op, backends, "eager", *problems)

    monkeypatch.setattr(dispatch, "choose", recorded)
    q, k, v = (torch.ones(1, 1, shape.length, shape.head_dim, requires_grad=True) for _ in range(3))
    fastattn.attention(q, k, v).sum().backward()
    return offered


def test_short_and_long_requests_were_measured():
    lengths = [shape.length for shape in measured()]
    assert min(lengths) <= 64 and max(lengths) >= 512


@pytest.mark.parametrize("shape", sorted(measured()), ids=lambda shape: f"{shape.file}-{shape.model}-{shape.fill}")
def test_the_faster_backend_comes_first(shape, monkeypatch):
    times = measured()[shape]
    offered = orders(shape, monkeypatch)
    assert len(offered) == 2
    for backends in offered:
        first = min(GPU, key=backends.index)
        assert times[first] == min(times.values()), (times, backends)


def test_ceilings_are_those_that_were_measured():
    """To the three digits that they are written with."""
    ceilings = json.loads((RESULTS / "ops.json").read_text())["ceilings"]["bfloat16"]
    assert f"{plans.PEAK:.3g}" == f"{ceilings['gemm_tflops'] * 1e12:.3g}"
    assert f"{plans.BANDWIDTH:.3g}" == f"{ceilings['copy_gbps'] * 1e9:.3g}"
