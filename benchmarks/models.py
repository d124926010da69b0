"""Whole models, a forward pass or a training step, through everything that is installed: `python -m benchmarks.models`.

MiniLM reads ragged English sentences and the digits CLIP handwritten digits, with trained weights; BERT and CLIP of the known
sizes have random ones, which cost the same time. Every provider's output is held against an fp64 run of the same weights first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import answers, interpreter, model_cases, model_measure, model_providers, plots, results, shapes
from benchmarks.ops import pick_device, pick_dtype
from fastattn import timing

MODES = ("infer", "train")
TRAINED = ("minilm", "digits-clip")
COLUMNS = {
    "model": "", "layers": "", "mode": "", "dtype": "", "batch": "", "seq": "", "fill": ".2f", "provider": "", "ms_median": ".2f",
    "ms_p20": ".2f", "ms_p80": ".2f", "tokens_per_s": ".0f", "ratio_vs_eager": ".2f", "ratio_vs_sdpa": ".2f",
    "floor_fraction": ".0%", "max_error": ".1e",
}  # fmt: skip


class Defaults(NamedTuple):
    """What a run measures where the command line does not say.

    A model that is absent has all layers, 32 sequences, fills 1.0 and 0.5 in inference. Training steps have a fill of 0.5.
    """

    models: tuple[str, ...]
    layers: dict[str, int]
    batch: dict[str, int]
    seq: dict[str, int]
    fills: dict[str, tuple[float, ...]]  # of forward passes
    seconds: float  # of timing per case
    budget: float  # of the whole run


FEW = dict.fromkeys(shapes.CONFIGS, 2)  # the others are like them
BERT_FILLS: dict[str, tuple[float, ...]] = {"bert-base": (1.0, 0.75, 0.5)}
CPU = Defaults(
    ("minilm", "digits-clip", "bert-base", "clip-vit-b-32"), FEW,
    {"minilm": 32, "digits-clip": 300, **dict.fromkeys(FEW, 8)}, {"bert-base": 256, "bert-large": 256},
    {**BERT_FILLS, "clip-vit-b-32": (0.5,)}, 4.0, 190.0,
)  # fmt: skip
GPU = Defaults(
    ("minilm", "digits-clip", "bert-base", "clip-vit-b-32", "clip-vit-l-14"),
    {},
    {"minilm": 64, "digits-clip": 300},
    {},
    BERT_FILLS,
    1.0,
    110.0,
)
QUICK = Defaults(
    ("minilm", "bert-base"),
    dict.fromkeys(FEW, 1),
    {**dict.fromkeys(shapes.MODELS, 2), "minilm": 16},
    {"bert-base": 32},
    {},
    0.2,
    25.0,
)


class Request(NamedTuple):
    model: str
    mode: str
    dtype: torch.dtype
    fill: float


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    defaults = QUICK if args.quick else GPU if device.type == "cuda" else CPU
    start, budget = time.monotonic(), args.budget or defaults.budget
    dtypes = [pick_dtype(name, device) for name in args.dtype.split(",")] if args.dtype else [pick_dtype(None, device)]
    ceilings = {dtype: timing.ceilings(device, dtype) for dtype in dtypes}
    records: list[dict] = []
    said: list[str] = []
    for request in results.progress(requests(args, defaults, dtypes), "models"):
        rows, lines = run(request, args, defaults, device, start, budget)
        records += rows
        said += lines
    ceilings = {dtype: found.better(timing.ceilings(device, dtype)) for dtype, found in ceilings.items()}
    results.add_floor(records, ceilings)
    results.print_table(records, COLUMNS)
    print("\n".join(["", *said]))
    interpreted = interpret(args.models or list(defaults.models)) if device.type == "cpu" else []
    print("\n".join(["", "fastattn's GPU kernels in Triton's interpreter:", *interpreted]) if interpreted else "")
    if args.out or not args.quick:
        save(records, args, device, ceilings, interpreter=interpreted, notes=said)
    wrong = results.failures(records)
    for row in wrong:
        print(
            f"WRONG: {row['model']} {row['mode']} {row['dtype']} {row['fill']}, {row['provider']}: {row['wrong']}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=names(shapes.MODELS), help=f"comma-separated, of {','.join(shapes.MODELS)}")
    parser.add_argument("--weights", type=Path, help="folder with config.json and model.safetensors for the one model asked for")
    parser.add_argument("--batch", type=int, help="sequences, or images")
    parser.add_argument("--seq", type=int, help="positions of a sequence; real sentences are cut there")
    parser.add_argument("--layers", type=int, help="layers of each tower at most; on a CPU 2 for BERT and CLIP")
    parser.add_argument(
        "--fill",
        help="shares of real tokens, comma-separated; default 1.0,0.5; 0.75 as well for bert-base, 0.5 alone to train and for\n"
        "CLIP on a CPU; MiniLM and digits have their own",
    )
    parser.add_argument("--mode", type=names(MODES), help="infer,train")
    parser.add_argument("--dtype", help="float32,bfloat16,float16; default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--budget", type=float, help="seconds after which cases, and four fifths of it after which slow providers, are left out"
    )
    parser.add_argument("--suite", default="models", help="name of the result file")
    parser.add_argument("--quick", action="store_true", help="a smoke run; written only where --out says")
    parser.add_argument("--out", type=Path, help="folder of results and the picture; default benchmarks/results and docs")
    parser.add_argument("--plots", type=Path, help="folder of the picture alone")
    args = parser.parse_args(argv)
    if args.weights is not None and len(args.models or ()) != 1:
        parser.error("--weights needs exactly one model in --models")
    return args


def names(known: tuple[str, ...]):
    def read(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return found

    return read


def requests(args: argparse.Namespace, defaults: Defaults, dtypes: list[torch.dtype]) -> list[Request]:
    """All forward passes, then the training steps: by default those of BERT and CLIP on a ragged batch alone."""
    found = []
    for mode, model in itertools.product(args.mode or MODES, args.models or defaults.models):
        if args.mode is None and mode == "train" and model in TRAINED:
            continue
        fills = (0.5,) if mode == "train" else defaults.fills.get(model, (1.0, 0.5))
        if args.fill:
            fills = tuple(float(text) for text in args.fill.split(","))
        if model in TRAINED:
            fills = fills[:1]  # their input is what it is
        found += [Request(model, mode, dtype, fill) for dtype, fill in itertools.product(dtypes, fills)]
    return found


def run(request: Request, args, defaults: Defaults, device, start: float, budget: float) -> tuple[list[dict], list[str]]:
    """(records, lines to print). Slow providers are over in four fifths of the budget, so that every case has its turn."""
    name = request.model
    what = f"{name} {request.mode} {request.dtype} fill {request.fill}"
    if time.monotonic() > start + budget:
        return [], [f"not run: {what}: the time budget was spent; --budget SECONDS sets another"]
    try:
        case = model_cases.load(
            name, batch=args.batch or defaults.batch.get(name, 32), seq=args.seq or defaults.seq.get(name), fill=request.fill,
            layers=args.layers or defaults.layers.get(name), folder=args.weights, dtype=request.dtype, device=device,
        )  # fmt: skip
    except ModuleNotFoundError as error:
        return [], [f"not run: {what}: {error}"]
    measured = model_measure.run(
        case, request.mode, model_providers.providers(device), seconds=defaults.seconds, deadline=start + budget * 4 / 5
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured.rows, answers.lines(case, measured.outputs) if request.mode == "infer" else []


def interpret(models: list[str]) -> list[str]:
    available = []
    for name in models:
        try:
            model_cases.read_config(name)
            available.append(name)
        except ModuleNotFoundError:
            continue  # it has a line of its own already
    return interpreter.run(available)


def save(records: list[dict], args, device: torch.device, ceilings: dict, **extra) -> None:
    path = results.write(records, args.suite, device, quick=args.quick, out=args.out, ceilings=ceilings, **extra)
    print(f"wrote {path}")
    folder = args.plots or args.out or results.ROOT.parent / "docs"
    picture = folder / f"{args.suite}-{results.device_slug(device)}.png"
    print(
        plots.draw(
            records, picture, f"{results.device_name(device)}: milliseconds, shorter is better; x = times faster than eager"
        )
    )


if __name__ == "__main__":
    sys.exit(main())
