"""What it costs `accelerate` to be sure of itself in each call: `python -m benchmarks.guards`.

Inference of a model as it is, against the same model told that nothing has changed: neither its modules nor the weights of which
copies are kept. The two take turns. In training nothing is kept, so that nothing is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import fastattn
from benchmarks import model_cases, model_providers, results
from fastattn import kept, timing
from fastattn.integrations.accelerate_checks import Examined

SURE, TOLD = "accelerate", "told that nothing has changed"
COLUMNS = {"model": "", "batch": "", "seq": "", "fill": ".2f", "provider": "", "ms_median": ".2f", "ratio": ".3f"}


class Shape(NamedTuple):
    model: str
    batch: int
    seq: int | None
    fill: float
    layers: int | None


SHAPES = [Shape("minilm", 32, None, 1.0, None), Shape("minilm", 1, None, 1.0, None), Shape("bert-base", 8, 256, 0.5, 4)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guards", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing for each model")
    parser.add_argument("--quick", action="store_true", help="a smoke run; written only where --out says")
    parser.add_argument("--out", type=Path, help="folder of results; default benchmarks/results")
    args = parser.parse_args(argv)
    device = torch.device("cpu")  # on a GPU nothing is kept
    records: list[dict] = []
    for shape in results.progress(SHAPES[:1] if args.quick else SHAPES, "guards"):
        records += run(shape, 0.1 if args.quick else args.seconds, device)
    results.print_table(records, COLUMNS)
    if args.out or not args.quick:
        print(f"wrote {results.write(records, 'guards', device, quick=args.quick, out=args.out)}")
    return 0


def run(shape: Shape, seconds: float, device: torch.device) -> list[dict]:
    case = model_cases.load(
        shape.model, batch=shape.batch, seq=shape.seq, fill=shape.fill, layers=shape.layers, folder=None,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    model = model_providers.hugging_face("sdpa", case, "infer").module
    fastattn.accelerate(model, strict=True)
    forward: Callable = torch.no_grad()(functools.partial(model, **case.inputs))

    def told() -> None:
        with unwatched():
            forward()

    forward()  # the first call proves itself
    samples = timing.interleaved({SURE: forward, TOLD: told}, device, seconds=seconds)
    return [
        results.record(
            **case.fields(), provider=name, device=results.device_name(device), mode="infer",
            ms_median=taken.median, ms_p20=taken.quantile(0.2), ms_p80=taken.quantile(0.8), rounds=len(taken.ms),
            method=taken.method,
            ratio=timing.speedup(taken, samples[TOLD]),
        )
        for name, taken in samples.items()
    ]  # fmt: skip


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, both questions are answered with yes."""
    asked = Examined.holds, kept.unchanged
    Examined.holds = kept.unchanged = lambda *_: True  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Examined.holds, kept.unchanged = asked  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
