"""Whole models, a forward pass or a training step, through everything that is installed: `python -m benchmarks.models`.

MiniLM reads ragged English sentences and the digits CLIP handwritten digits, with trained weights; BERT and CLIP of the known
sizes have random ones, which cost the same time. Every provider's output is held against an fp64 run of the same weights first.
Times are those of a call from Python; on a GPU that of a CUDA graph of the same forward pass stands beside it.

The most telling cases come first, and each has its share of the budget. When all have had theirs, those who compile or export a
model first have what is left.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import (
    answers,
    budget,
    interpreter,
    measure,
    model_cases,
    model_measure,
    model_providers,
    plots,
    results,
    selection,
    shapes,
    summary,
)
from benchmarks.model_providers import Provider
from benchmarks.ops import complain, pick_device, pick_dtype
from fastattn import timing

MODES = ("infer", "train")
TRAINED = ("minilm", "digits-clip")
COLUMNS = {
    "model": "", "layers": "", "mode": "", "dtype": "", "batch": "", "seq": "", "fill": ".2f", "provider": "", "ms_median": ".2f",
    "ms_p20": ".2f", "ms_p80": ".2f", "tokens_per_s": ".0f", "ratio_vs_eager": ".2f", "ratio_vs_sdpa": ".2f",
    "floor_fraction": ".0%", "max_error": ".1e",
}  # fmt: skip
IMPATIENT = "not run: less than"
INTERPRETED = 5  # seconds that the interpreter needs at least
GPU_COLUMNS = {**COLUMNS, "host_us": ".0f", "captured_ms": ".2f", "captured_ratio_vs_sdpa": ".2f"}
TELLING = (  # (model, mode, fill): what comes first, because a run may be cut
    ("minilm", "infer", None), ("bert-base", "infer", 0.5), ("bert-base", "train", 0.5), ("clip-vit-b-32", "infer", 0.5),
)  # fmt: skip


class Defaults(NamedTuple):
    """What a run measures where the command line does not say.

    A model that is absent has all layers, 32 sequences, fills 1.0 and 0.5 in inference. Training steps have a fill of 0.5, and
    those of torch-encoder, which runs where it is asked for, both.
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
    {"minilm": 32, "digits-clip": 300, **dict.fromkeys(FEW, 8)}, dict.fromkeys(("bert-base", "bert-large", "torch-encoder"), 256),
    {**BERT_FILLS, "clip-vit-b-32": (0.5,)}, 6.0, 190.0,
)  # fmt: skip
GPU = Defaults(
    ("minilm", "digits-clip", "bert-base", "clip-vit-b-32", "clip-vit-l-14"),
    {},
    {"minilm": 64, "digits-clip": 300},
    {},
    BERT_FILLS,
    1.0,
    70.0,
)
QUICK = Defaults(
    ("minilm", "bert-base"),
    dict.fromkeys(FEW, 1),
    {**dict.fromkeys(shapes.MODELS, 2), "minilm": 16},
    {"bert-base": 32, "torch-encoder": 32},
    {},
    0.2,
    25.0,
)


class Request(NamedTuple):
    model: str
    mode: str
    dtype: torch.dtype
    fill: float

    @property
    def name(self) -> str:
        fill = "" if self.model in TRAINED else f" fill {self.fill}"
        return f"{self.model} {self.mode} {str(self.dtype).removeprefix('torch.')}{fill}"


class Done(NamedTuple):
    """What is known of one request; `lines` are for the screen."""

    rows: list[dict]
    lines: list[str]


class Run:
    """One run of the command: what it measures, how, and what it has so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.defaults = QUICK if args.quick else GPU if self.device.type == "cuda" else CPU
        models = args.models or self.defaults.models
        self.providers = select({model: model_providers.of(model, self.device) for model in models}, args.providers)
        self.budget = budget.Budget(self.defaults.budget if args.budget is None else args.budget)
        self.dtypes = [pick_dtype(name, self.device) for name in (args.dtype.split(",") if args.dtype else [None])]
        self.ceilings = {dtype: timing.ceilings(self.device, dtype) for dtype in self.dtypes}
        self.done: dict[Request, Done] = {}
        self.left_out: list[str] = []
        self.interpreted: list[str] = []

    @property
    def records(self) -> list[dict]:
        return [row for done in self.done.values() for row in done.rows]

    @property
    def lines(self) -> list[str]:
        return [line for done in self.done.values() for line in done.lines]

    def all(self) -> None:
        asked = requests(self.args, self.defaults, self.dtypes)
        name = results.device_name(self.device)
        print(f"{name}: {len(asked)} cases{self.budget.words}; training steps without dropout", flush=True)
        for index, request in enumerate(asked):
            self.case(request, self.budget.share(len(asked) - index + (self.device.type == "cpu")))
            self.tell(index, len(asked), request)
        if self.device.type == "cpu":
            self.interpreted = interpret(self.args.models or list(self.defaults.models), self.budget.left)
        for index, request in enumerate(list(self.done)):
            slow = self.slow_providers(request)
            if slow:
                self.tell(index, len(asked), request, slow)

    def case(self, request: Request, share: budget.Share) -> None:
        """Every provider but the slow ones."""
        if self.budget.left <= 0:
            self.leave_out(request, "the time budget was spent; --budget SECONDS sets another")
            return
        try:
            case = self.load(request)
        except ModuleNotFoundError as error:
            self.leave_out(request, str(error))
            return

        def refuse(provider: Provider) -> str | None:
            if provider.patience:
                return self.no_patience(provider)
            return None if provider.main or share.open else budget.SPENT

        try:
            measured = model_measure.run(
                case, request.mode, self.providers[request.model], seconds=self.defaults.seconds, share=share, refuse=refuse
            )
        except torch.OutOfMemoryError as error:
            self.leave_out(request, measure.words(error, []))
        else:
            self.keep(request, measured.rows, self.answers(case, request, measured))
        if self.device.type == "cuda":
            gc.collect()  # an accelerated model holds on to itself
            torch.cuda.empty_cache()

    def slow_providers(self, request: Request) -> list[str]:
        """Those of one case for which there is time, beside the baselines. Their names."""
        rows = self.done[request].rows
        waiting = {row["provider"] for row in rows if (row["refusal"] or "").startswith(IMPATIENT)}
        known = self.providers[request.model]
        slow = [one for one in known if one.name in waiting and self.budget.left > one.patience]
        if not slow:
            return []
        case = self.load(request)
        baselines = [one for one in known if one.name in baseline_names(known)]
        measured = model_measure.run(
            case, request.mode, [*baselines, *slow], seconds=self.defaults.seconds,
            refuse=lambda one: self.no_patience(one) if self.budget.left <= one.patience else None,
        )  # fmt: skip
        names = [one.name for one in slow]
        found = {row["provider"]: row for row in measured.rows if row["provider"] in names}
        theirs = measured._replace(outputs={name: x for name, x in measured.outputs.items() if name in names})
        lines = self.done[request].lines + self.answers(case, request, theirs)
        self.keep(request, [found.get(row["provider"], row) for row in rows], lines)
        return names

    def no_patience(self, provider: Provider) -> str:
        if self.device.type == "cuda" and not self.args.slow:
            return budget.SLOW
        return f"{IMPATIENT} {provider.patience:.0f} s of the time budget were left"

    def load(self, request: Request) -> model_cases.Case:
        args, defaults, name = self.args, self.defaults, request.model
        return model_cases.load(
            name, batch=args.batch or defaults.batch.get(name, 32), seq=args.seq or defaults.seq.get(name), fill=request.fill,
            layers=args.layers or defaults.layers.get(name), folder=args.weights, dtype=request.dtype, device=self.device,
        )  # fmt: skip

    def answers(self, case: model_cases.Case, request: Request, measured: model_measure.Measured) -> list[str]:
        return answers.lines(case, measured.outputs) if request.mode == "infer" else []

    def keep(self, request: Request, rows: list[dict], lines: list[str]) -> None:
        """On disk as well, before the next case begins."""
        self.done[request] = Done(rows, lines)
        self.save(complete=False)

    def leave_out(self, request: Request, why: str) -> None:
        self.done[request] = Done([], [f"not run: {request.name}: {why}"])
        self.left_out.append(request.name)

    def tell(self, index: int, count: int, request: Request, names: list[str] | None = None) -> None:
        """A line for what has just been done, of all providers or of some."""
        done = self.done[request]
        rows = [row for row in done.rows if row["ms_median"] is not None and (names is None or row["provider"] in names)]
        timed = [f"{row['provider']} {row['ms_median']:.3g}" for row in rows]
        words = f"{request.name}, ms: {', '.join(timed) or 'none'}" if done.rows else done.lines[0]
        print(f"[{index + 1}/{count}, {self.budget.used:.0f} s] {words}", flush=True)

    def save(self, complete: bool) -> Path | None:
        """A part of the providers replaces no file that holds all, where no folder is named for it."""
        args = self.args
        results.add_floor(self.records, self.ceilings)
        if (args.quick or args.providers) and not args.out:
            return None
        return results.write(
            self.records, args.suite, self.device, quick=args.quick, out=args.out, ceilings=self.ceilings, complete=complete,
            left_out=self.left_out, interpreter=self.interpreted, notes=self.lines,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    run = Run(parse(argv))
    run.all()
    run.ceilings = {dtype: found.better(timing.ceilings(run.device, dtype)) for dtype, found in run.ceilings.items()}
    path = run.save(complete=True)
    results.print_table(run.records, GPU_COLUMNS if run.device.type == "cuda" else COLUMNS)
    print("\n".join(["", *run.lines]))
    if run.interpreted:
        print("\n".join(["", "fastattn's GPU kernels in Triton's interpreter:", *run.interpreted]))
    if path:
        print(f"\nwrote {path}\n{picture(run)}")
    ours = {one.name: None for found in run.providers.values() for one in found if one.ours and one.main}
    print("\n".join(["", *summary.lines(run.records, tuple(ours) or "fastattn", run.left_out)]))
    return complain(run.records)


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
    selection.add_providers(parser)
    parser.add_argument("--slow", action="store_true", help="on a GPU torch.compile too: ten seconds and more for each case")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds, dealt out to the cases; default 190 on a CPU, 70 on a GPU. In a case that begins the baselines and\n"
        "accelerate are timed, however long they take",
    )
    parser.add_argument("--suite", default="models", help="name of the result file")
    parser.add_argument("--quick", action="store_true", help="a smoke run; written only where --out says")
    parser.add_argument("--out", type=Path, help="folder of results and the picture; default benchmarks/results and docs")
    parser.add_argument("--plots", type=Path, help="folder of the picture alone")
    args = parser.parse_args(argv)
    if args.weights is not None and len(args.models or ()) != 1:
        parser.error("--weights needs exactly one model in --models")
    if args.weights is not None and args.models == ["torch-encoder"]:
        parser.error("--weights: torch-encoder takes none")
    if args.weights is not None and not args.weights.is_dir():
        parser.error(f"--weights: there is no folder {args.weights}")
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
    """By default of training steps those of BERT and CLIP on a ragged batch alone. The most telling first, of each dtype."""
    found = []
    for mode, model in itertools.product(args.mode or MODES, args.models or defaults.models):
        if args.mode is None and mode == "train" and model in TRAINED:
            continue
        alone = mode == "train" and model != "torch-encoder"
        fills = [0.5] if alone else sorted(defaults.fills.get(model, (1.0, 0.5)))
        if args.fill:
            fills = [float(text) for text in args.fill.split(",")]
        if model in TRAINED:
            fills = fills[:1]  # their input is what it is
        found += [Request(model, mode, dtype, fill) for dtype, fill in itertools.product(dtypes, fills)]
    return sorted(found, key=lambda one: (dtypes.index(one.dtype), rank(one)))


def rank(request: Request) -> float:
    """Small for what comes first: what is TELLING, ragged batches, full ones, and digits, which are little work."""
    for place, (model, mode, fill) in enumerate(TELLING):
        if (request.model, request.mode) == (model, mode) and fill in (None, request.fill):
            return place
    return len(TELLING) + (3 if request.model == "digits-clip" else request.fill)


def select(found: dict[str, list[Provider]], asked: str | None) -> dict[str, list[Provider]]:
    """Of each model those asked for, and the baselines, without which there is neither a gate nor a ratio."""
    if asked is None:
        return found
    kept = selection.chosen(asked, (one.name for some in found.values() for one in some), "--providers")
    return {model: [one for one in some if one.name in (*kept, *baseline_names(some))] for model, some in found.items()}


def baseline_names(found: list[Provider]) -> list[str]:
    names = [one.name for one in found]
    return [name for kind in ("eager", "SDPA") if (name := model_providers.baseline(names, kind))]


def interpret(models: list[str], seconds: float) -> list[str]:
    """Half of what is left is for those who come after."""
    available = []
    for name in models:
        try:
            model_cases.read_config(name)
            available.append(name)
        except ModuleNotFoundError:
            continue  # it has a line of its own already
    limit = min(interpreter.TIMEOUT, seconds / 2)
    if limit < INTERPRETED:
        return [f"not run: less than {2 * INTERPRETED} s of the time budget were left"]
    return interpreter.run(available, limit)


def picture(run: Run) -> str:
    folder = run.args.plots or run.args.out or results.ROOT.parent / "docs"
    path = folder / f"{run.args.suite}-{results.device_slug(run.device)}.png"
    return plots.draw(run.records, path, "models")


if __name__ == "__main__":
    sys.exit(main())
