"""Attention, FFN and add + LayerNorm of encoder layers, forward and backward apart: `python -m benchmarks.ops`.

`--suite masks`: attention under structured masks instead, of 1,280 tokens of text and image. `--suite training`: attention as
models are trained, with dropout and learned biases, and the time of drawing the dropout, mode "bits".
Every provider that is installed is asked; one that refuses is a row with its own words, and none is timed before its result has
passed the accuracy gate on that very shape. On a GPU a time is that of the kernels, without the host, whose own stands beside it.
On a CPU the inputs are warm: more than 100% of the floor means its caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

import fastattn
from benchmarks import attention_providers, mask_cases, measure, refusals, results, selection, shapes, summary, training_cases
from benchmarks.budget import Budget
from fastattn import masks, testing, timing
from fastattn.activations import ACTIVATIONS
from fastattn.lowering import LoweredMask
from fastattn.ops import ffn as ffn_op
from fastattn.ops import norm as norm_op
from fastattn.ops.dropout import attention_bits

MODES = ("forward", "backward")
BITS = "bits"
SMALL = 96  # tokens of a smoke run, of whose memory nothing is to be learned
COMPILED, LIGER = "torch.compile", "Liger, after an add"
EPS = 1e-12
COLUMNS = {
    "op": "", "model": "", "mode": "", "fill": ".2f", "provider": "", "ms_median": ".4f", "host_us": ".0f",
    "ratio_vs_eager": ".2f", "ratio_vs_sdpa": ".2f", "floor_fraction": ".0%", "gbps": ".0f", "tflops": ".1f", "max_error": ".1e",
}  # fmt: skip


def attention_task(shape: shapes.AttentionShape, B: int, fill: float, dtype: torch.dtype, device: torch.device) -> measure.Task:
    H, S, D = shape.H, shape.S, shape.D
    lengths = shapes.ragged_lengths(B, S, fill).to(device) if fill < 1 else None
    full = torch.full((B,), S, device=device) if lengths is None else lengths
    real = (torch.arange(S, device=device) < full[:, None])[:, None, :, None]
    request = attention_providers.Request(B, H, S, D, shape.causal, lengths, device)
    mask = masks.causal() if shape.causal else None
    if lengths is not None:
        mask = masks.padding(lengths) if mask is None else mask & masks.padding(lengths)
    dout = torch.where(real, _normal((B, S, H, D), dtype, device, 1000).transpose(1, 2), 0)

    def yardstick(tensors: tuple[Tensor, ...]) -> testing.Yardstick:
        q, k, v = tensors
        found = testing.attention_yardstick(testing.AttentionInputs(q, k, v, dout, None, mask, D**-0.5))
        for tensors_by_name in (found.exact, found.model, found.magnitude, found.eager):  # padded queries are nobody's result
            if "out" in tensors_by_name:
                tensors_by_name["out"] = torch.where(real, tensors_by_name["out"], 0)
        return found

    inputs = functools.partial(_attention_inputs, (B, S, H, D), dtype, device)
    tokens = int(full.sum())
    fields = _fields("attention", shape.name, dtype, B, S, tokens / (B * S), tokens, hidden=H * D, heads=H, causal=shape.causal)
    work = shapes.attention_work(full.cpu(), H, D, shape.causal, dtype.itemsize)
    return measure.Task(
        fields, _attention_contenders(request), inputs, dout, "out", ("dq", "dk", "dv"), yardstick, work,
        lambda out: torch.where(real, out, 0),
    )  # fmt: skip


def mask_task(
    case: mask_cases.MaskCase, B: int, H: int, S: int, D: int, dtype: torch.dtype, device: torch.device
) -> measure.Task:
    """The mask is made once, as by a model; what its kernels need of it is made by the gate's call, before anything is timed."""
    request = attention_providers.Request(B, H, S, D, False, None, device, structure=case)
    dout = _normal((B, S, H, D), dtype, device, 1000).transpose(1, 2)

    def yardstick(tensors: tuple[Tensor, ...]) -> testing.Yardstick:
        q, k, v = tensors
        return testing.attention_yardstick(testing.AttentionInputs(q, k, v, dout, None, case.mask, D**-0.5))

    pairs = int(case.mask.pairs(S, S, device).expand(B, 1, S, S).sum())
    fields = _fields("attention", case.name, dtype, B, S, 1.0, B * S, hidden=H * D, heads=H, visible=pairs / (B * S * S))
    inputs = functools.partial(_attention_inputs, (B, S, H, D), dtype, device)
    work = shapes.pairs_work(pairs, B * S, H, D, dtype.itemsize)
    contenders = _attention_contenders(request)
    return measure.Task(fields, contenders, inputs, dout, "out", ("dq", "dk", "dv"), yardstick, work)


def training_task(recipe: training_cases.Recipe, B: int, dtype: torch.dtype, device: torch.device) -> measure.Task:
    """Attention with dropout and a bias: fastattn by the accuracy rule with the weights that its seed drops."""
    H, S, D = recipe.H, recipe.S, recipe.D
    request, size = recipe.request(B, device), recipe.learned()
    full = torch.full((B,), S, device=device) if request.lengths is None else request.lengths
    real = (torch.arange(S, device=device) < full[:, None])[:, None, :, None]
    dout = torch.where(real, _normal((B, S, H, D), dtype, device, 1000).transpose(1, 2), 0)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        tensors = _attention_inputs((B, S, H, D), dtype, device, seed)
        return tensors if size is None else (*tensors, _normal(size, dtype, device, 2000 + seed))

    def given(tensors: tuple[Tensor, ...], dropout: float) -> testing.AttentionInputs:
        q, k, v, *learned = tensors
        bias = request.bias_of(learned[0]) if learned else None
        return testing.AttentionInputs(q, k, v, dout, None, request.mask(), D**-0.5, bias, dropout, request.seed)

    def yardstick(tensors: tuple[Tensor, ...], dropout: float = recipe.dropout) -> testing.Yardstick:
        return testing.attention_yardstick(given(tensors, dropout))

    pairs, tokens = training_cases.visible_pairs(request)
    extra = {"visible": pairs / (B * S * S)} if recipe.rows else {}
    fields = _fields(
        "attention", recipe.name, dtype, B, S, tokens / (B * S), tokens, hidden=H * D, heads=H, causal=recipe.causal,
        dropout=recipe.dropout, bias=recipe.bias, **extra,
    )  # fmt: skip
    work = shapes.pairs_work(pairs, tokens, H, D, dtype.itemsize) | {BITS: (0.0, B * H * S * -(-S // 32) * 4.0)}
    names = ("dq", "dk", "dv", *(["dbias"] if size is not None else []))
    task = measure.Task(
        fields, [], inputs, dout, "out", names, yardstick, work, lambda out: torch.where(real, out, 0), cpu_memory=S > SMALL
    )
    if not recipe.dropout:
        return task._replace(contenders=_attention_contenders(request))

    @functools.cache
    def without_dropout() -> tuple[tuple[Tensor, ...], testing.Yardstick]:
        return inputs(0), yardstick(inputs(0), 0.0)

    def random_gate(provider: attention_providers.Provider, run: attention_providers.Run) -> dict[str, float]:
        tensors, expected = without_dropout()
        build = functools.partial(provider.build, dataclasses.replace(request, dropout=0.0))
        _, actual = measure.trial(build, task, tensors)
        errors = measure.check(actual, task, expected, measure.Contender(provider.name, build))
        training_cases.check_rate(run, given(tensors, recipe.dropout), real)
        return errors

    contenders = _attention_contenders(request)
    for index, provider in enumerate(attention_providers.providers(device)):
        if not provider.ours:
            gate = functools.partial(random_gate, provider)
            seed_on_host = "" if provider.name == "eager" else training_cases.SEED_ON_HOST
            contenders[index] = contenders[index]._replace(gate=gate, gate_words=training_cases.GATE, uncapturable=seed_on_host)
    return task._replace(contenders=contenders, parts=_bits_parts(request))


def _bits_parts(request: attention_providers.Request) -> tuple[measure.Part, ...]:
    """Drawing the dropout alone, as each backend does it in a call."""
    seed, B, H, S = torch.tensor([request.seed], device=request.device), request.B, request.H, request.S
    mask = request.mask()
    lowered = LoweredMask() if mask is None else mask.lower(S, S, request.device)

    def build(backend: str) -> Callable[[], Tensor]:
        return lambda: attention_bits(seed, S, B, H, S, S, request.dropout, lowered, backend)

    ours = [provider.name for provider in attention_providers.providers(request.device) if provider.ours]
    return tuple(measure.Part(name, BITS, functools.partial(build, name.removeprefix("fastattn "))) for name in ours)


def _attention_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """q, k and v, (B, H, S, D) in memory of `size` (B, S, H, D)."""
    return tuple(_normal(size, dtype, device, 3 * seed + n).transpose(1, 2) for n in range(3))


def _attention_contenders(request: attention_providers.Request) -> list[measure.Contender]:
    return [
        measure.Contender(p.name, functools.partial(p.build, request), p.ours, p.package, p.main, p.slow)
        for p in attention_providers.providers(request.device)
    ]


def feed_forward_task(shape: shapes.FeedForwardShape, tokens: int, dtype: torch.dtype, device: torch.device) -> measure.Task:
    d, hidden = shape.d, shape.F
    sizes = ((tokens, d), (hidden, d), (d, hidden), (hidden,), (d,))
    scales = (1.0, d**-0.5, hidden**-0.5, 0.1, 0.1)
    dy = _normal((tokens, d), dtype, device, 1000)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        return tuple(
            _normal(size, dtype, device, 5 * seed + n) * scale for n, (size, scale) in enumerate(zip(sizes, scales, strict=True))
        )

    def eager(x, w1, w2, b1, b2):
        return F.linear(ACTIVATIONS[shape.activation][0](F.linear(x, w1, b1)), w2, b2)

    def own(backend: str):
        return lambda x, w1, w2, b1, b2: fastattn.ffn(x, w1, b1, w2, b2, activation=shape.activation, backend=backend)

    def yardstick(t: tuple[Tensor, ...]) -> testing.Yardstick:
        return testing.ffn_yardstick(t[0], t[1], t[3], t[2], t[4], dy, shape.activation)

    contenders = _pointwise_contenders(eager, own, ffn_op.BACKENDS, device)
    fields = _fields("ffn", shape.name, dtype, None, None, 1.0, tokens, hidden=d, activation=shape.activation)
    work = shapes.feed_forward_work(shape, tokens, dtype.itemsize)
    return measure.Task(fields, contenders, inputs, dy, "y", ("dx", "dw1", "dw2"), yardstick, work)


def norm_task(shape: shapes.FeedForwardShape, tokens: int, dtype: torch.dtype, device: torch.device) -> measure.Task:
    d = shape.d
    dy = _normal((tokens, d), dtype, device, 1000)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        x, residual = (_normal((tokens, d), dtype, device, 4 * seed + n) for n in range(2))
        weight, bias = (_normal((d,), dtype, device, 4 * seed + 2 + n) * 0.1 for n in range(2))
        return x, residual, weight + 1, bias

    def eager(x, residual, weight, bias):
        return F.layer_norm(x + residual, (d,), weight, bias, EPS)

    def own(backend: str):
        return lambda x, residual, weight, bias: fastattn.add_layer_norm(x, residual, weight, bias, eps=EPS, backend=backend)

    def liger():
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, residual, weight, bias: LigerLayerNormFunction.apply(x + residual, weight, bias, EPS)

    def yardstick(t: tuple[Tensor, ...]) -> testing.Yardstick:
        return testing.norm_yardstick(t[0], t[1], t[2], t[3], dy, None, EPS)

    contenders = _pointwise_contenders(eager, own, norm_op.BACKENDS, device)
    if device.type == "cuda":
        contenders.insert(-1, measure.Contender(LIGER, liger, package="liger_kernel"))
    fields = _fields("add_layer_norm", shape.name, dtype, None, None, 1.0, tokens, hidden=d)
    work = shapes.norm_work(d, tokens, dtype.itemsize)
    return measure.Task(fields, contenders, inputs, dy, "y", ("dx",), yardstick, work)


def _pointwise_contenders(eager, own, backends: tuple[str, ...], device: torch.device) -> list[measure.Contender]:
    compiled = measure.Contender(COMPILED, lambda: torch.compile(eager, dynamic=False), slow=True)
    ours = [
        measure.Contender(f"fastattn {name}", functools.partial(own, name), True, main=True)
        for name in _backends_of(backends, device)
    ]
    return [measure.Contender("eager", lambda: eager, main=True), *([compiled] if device.type == "cuda" else []), *ours]


def _backends_of(backends: tuple[str, ...], device: torch.device) -> list[str]:
    return [name for name in backends if name != "eager" and (device.type == "cuda") != (name == "cpu")] or ["eager"]


def _fields(op: str, name: str, dtype, B, S, fill: float, tokens: int, **extra) -> dict:
    return {
        "op": op, "model": name, "input_source": "seeded normal numbers", "dtype": str(dtype).removeprefix("torch."), "batch": B,
        "seq": S, "fill": round(fill, 3), "tokens": tokens, **extra,
    }  # fmt: skip


def _normal(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device).to(dtype)


class Case(NamedTuple):
    """`make` is called when the case's turn comes, so that the tensors of one shape live at a time."""

    name: str
    make: Callable[[], measure.Task]


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    """In the order of a run, which may be cut: BERT's, and of attention the ragged batch first."""
    gpu = device.type == "cuda"
    found: list[Case] = []
    for shape in shapes.ATTENTION[:1] if quick else shapes.ATTENTION:
        B = 2 if quick else shape.batch if gpu else shape.cpu_batch
        found += [
            Case(f"attention {shape.name} fill {fill}", functools.partial(attention_task, shape, B, fill, dtype, device))
            for fill in sorted(shape.fills)
        ]
    for layer in shapes.FEED_FORWARD[:1] if quick else shapes.FEED_FORWARD:
        tokens = 64 if quick else layer.tokens if gpu else layer.cpu_tokens
        for op, make in (("ffn", feed_forward_task), ("add_layer_norm", norm_task)):
            found.append(Case(f"{op} {layer.name}", functools.partial(make, layer, tokens, dtype, device)))
    return sorted(found, key=lambda case: " bert" not in case.name)


def masked_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    layout = mask_cases.TINY if quick else mask_cases.FULL
    B, H = (32, 12) if device.type == "cuda" and not quick else (2, 8)
    return [
        Case(f"attention {case.name}", functools.partial(mask_task, case, B, H, layout.S, 64, dtype, device))
        for case in mask_cases.cases(layout, B, device)
    ]


def training_cases_of(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    found = []
    for recipe in training_cases.RECIPES:
        recipe = recipe.small() if quick else recipe
        B = recipe.batch if device.type == "cuda" else recipe.cpu_batch
        make = functools.partial(training_task, recipe, B, dtype, device)
        found.append(Case(f"attention {recipe.name} fill {recipe.fill}", make))
    return found


SUITES = {"ops": cases, "masks": masked_cases, "training": training_cases_of}


def pick_device(name: str) -> torch.device:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *["cuda"] * bool(gpus), *gpus]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in known:
        raise SystemExit(f"--device {name}: here there are {', '.join(known)}")
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise SystemExit(f"--dtype must be float32, bfloat16 or float16, got {name}")
    return getattr(torch, name)


def ask(device: torch.device, dtype: torch.dtype) -> list[dict]:
    """The answers to the request of encoder training, printed as well."""
    asked = refusals.ask(device, torch.float32 if device.type == "cpu" else dtype)
    print(f"\n{refusals.REQUEST_WORDS}")
    for row in asked:
        print(f"  {row['provider']:24} {row['answer']}")
    return asked


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--suite", default="ops", choices=SUITES, help="what is measured, and the name of the result file")
    parser.add_argument("--rows", help="cases whose name contains this, such as bert, 'fill 0.5' or ffn")
    selection.add_providers(parser)
    parser.add_argument("--slow", action="store_true", help="FlexAttention and torch.compile too: ten seconds for each case")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds, dealt out to the cases; default 90 on a GPU, as many as it takes on a CPU. In a case that begins the\n"
        "baselines and fastattn are timed, however long they take",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; written only where --out says")
    parser.add_argument("--out", type=Path, help="folder of results; default benchmarks/results")
    return parser.parse_args(argv)


def select(found: list[Case], rows: str | None) -> list[Case]:
    selected = [case for case in found if rows is None or rows in case.name]
    if not selected:
        raise SystemExit(f"--rows: {rows!r} is in none of {'; '.join(case.name for case in found)}")
    return selected


def known_providers(device: torch.device) -> list[str]:
    """Of every op."""
    attention = [provider.name for provider in attention_providers.providers(device)]
    pointwise = _backends_of(ffn_op.BACKENDS, device) + _backends_of(norm_op.BACKENDS, device)
    return [*attention, *(f"fastattn {name}" for name in pointwise), *([COMPILED, LIGER] if device.type == "cuda" else [])]


def only(task: measure.Task, providers: list[str] | None) -> measure.Task:
    if providers is None:
        return task
    kept = [one for one in task.contenders if one.name in (*providers, "eager", "SDPA")]
    return task._replace(contenders=kept)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    providers = args.providers and selection.chosen(args.providers, known_providers(device), "--providers")
    selected = select(SUITES[args.suite](device, dtype, args.quick), args.rows)
    unsaid = 90.0 if device.type == "cuda" else float("inf")
    budget = Budget(unsaid if args.budget is None else args.budget)
    functorch_config.donated_buffer = False  # a compiled backward must survive being run again and again
    print(f"{results.device_name(device)}: {len(selected)} cases{budget.words}", flush=True)
    ceilings = timing.ceilings(device, dtype)
    records, left_out = run(selected, providers, args, device, {dtype: ceilings}, budget)
    ceilings = ceilings.better(timing.ceilings(device, dtype))
    extra = {"refusals": ask(device, dtype)} if args.suite == "training" and not args.rows else {}
    path = save(records, args, device, {dtype: ceilings}, complete=True, left_out=left_out, **extra)
    results.print_table(records, {**COLUMNS, "method": ""} if device.type == "cuda" else COLUMNS)
    print("\n".join(["", *([f"wrote {path}"] if path else []), *summary.lines(records, "fastattn", left_out)]))
    return complain(records)


def run(
    selected: list[Case],
    providers: list[str] | None,
    args: argparse.Namespace,
    device: torch.device,
    ceilings: dict,
    budget: Budget,
) -> tuple[list[dict], list[str]]:
    """(the records, the names of cases that time or memory left out). What is done is on disk before the next case begins."""
    seconds = 0.2 if args.quick else 0.6 if device.type == "cuda" else 1.5
    records: list[dict] = []
    left_out = []
    for index, case in enumerate(selected):
        if budget.left <= 0:
            print(f"not run: {case.name}: the time budget was spent; --budget SECONDS sets another")
            left_out.append(case.name)
            continue
        share = budget.share(len(selected) - index)
        try:
            rows = measure.measure(
                only(case.make(), providers), device, seconds=seconds, modes=MODES, slow=args.slow, share=share
            )
        except torch.OutOfMemoryError as error:
            print(f"not run: {case.name}: {measure.words(error, [])}")
            left_out.append(f"{case.name} (memory)")
        else:
            records += rows
            print(progress(index, len(selected), budget, case.name, rows), flush=True)
            save(records, args, device, ceilings, complete=False)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return records, left_out


def progress(index: int, count: int, budget: Budget, name: str, rows: list[dict]) -> str:
    """A line for a case that is done: who took how long."""
    timed = [f"{row['provider']} {row['ms_median']:.3g}" for row in rows if row["mode"] == rows[0]["mode"] and row["ms_median"]]
    return f"[{index + 1}/{count}, {budget.used:.0f} s] {name}: {rows[0]['mode']}, ms: {', '.join(timed) or 'none'}"


def save(records: list[dict], args: argparse.Namespace, device: torch.device, ceilings: dict, **extra) -> Path | None:
    """A part of the suite replaces no file that holds the whole, where no folder is named for it."""
    results.add_floor(records, ceilings)
    if (args.quick or args.rows or args.providers) and not args.out:
        return None
    return results.write(records, args.suite, device, quick=args.quick, out=args.out, ceilings=ceilings, **extra)


def complain(records: list[dict]) -> int:
    wrong = results.failures(records)
    for row in wrong:
        print(f"WRONG: {summary.case_name(row)}, {row['provider']}: {row['wrong']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
