"""One op on one shape through every provider: gate, then forward and backward apart, as records."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks import gate, results
from fastattn import timing
from fastattn.testing import Yardstick

Result = TypeVar("Result")


class Contender(NamedTuple):
    """`build()` gives run(*inputs) -> output, or raises; `package` must be importable for it."""

    name: str
    build: Callable[[], Callable[..., Tensor]]
    ours: bool = False
    package: str | None = None


class Task(NamedTuple):
    """`inputs(seed)` gives the run's arguments, of which the first `leaves` take gradients, named in order by `gradients`."""

    fields: dict  # of the record: model, heads, batch, ...
    contenders: list[Contender]
    inputs: Callable[[int], tuple[Tensor, ...]]
    cotangent: Tensor
    output: str
    gradients: tuple[str, ...]
    yardstick: Callable[[tuple[Tensor, ...]], Yardstick]
    work: dict[str, tuple[float, float]]  # mode -> useful (FLOPs, bytes)
    trim: Callable[[Tensor], Tensor] = lambda out: out  # zeroes what a provider may leave undefined


def words(error: BaseException, caught: list[warnings.WarningMessage]) -> str:
    """A refusal in the provider's own words: the error's first line, and what it warned of, where PyTorch hides its reasons."""
    lines = str(error).strip().splitlines() or [""]
    reasons = [str(item.message).strip().splitlines()[0].split(" (Triggered internally")[0] for item in caught]
    return " | ".join([f"{type(error).__name__}: {lines[0]}", *dict.fromkeys(reasons)])[:600]


def attempt(build: Callable[[], Result], package: str | None = None) -> tuple[Result | None, str]:
    """(result, ""), or (None, the words of whoever refused)."""
    if package is not None and importlib.util.find_spec(package) is None:
        return None, f"{package} is not installed"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return build(), ""
        except Exception as error:  # noqa: BLE001  (whatever a third party raises is its answer; see `is_failure` for ours)
            return None, words(error, caught)


def is_failure(contender_is_ours: bool, refusal: str) -> bool:
    """fastattn refuses with NotImplementedError; anything else that it raises is a fault, and fails the run."""
    return contender_is_ours and not refusal.startswith("NotImplementedError")


def measure(task: Task, device: torch.device, *, seconds: float, modes: tuple[str, ...]) -> list[dict]:
    inputs = task.inputs(0)
    yardstick = task.yardstick(inputs)
    accepted: dict[str, Callable[..., Tensor]] = {}
    errors: dict[str, dict[str, float]] = {}
    rows = []
    for contender in task.contenders:
        answer, refusal = attempt(functools.partial(trial, contender.build, task, inputs), contender.package)
        wrong = ""
        if answer is not None:
            run, actual = answer
            try:
                errors[contender.name] = check(actual, task, yardstick, contender)
                accepted[contender.name] = run
            except AssertionError as error:
                wrong = str(error)
        elif is_failure(contender.ours, refusal):
            refusal, wrong = "", refusal
        if refusal or wrong:
            rows += [_row(task, contender.name, device, mode, refusal=refusal or None, wrong=wrong or None) for mode in modes]
    for mode in modes:
        rows += _time(task, accepted, errors, mode, device, seconds)
    return rows


def trial(
    build: Callable[[], Callable[..., Tensor]], task: Task, inputs: tuple[Tensor, ...]
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The run, and its output and gradients on these inputs."""
    run = build()
    leaves = [x.detach().requires_grad_() for x in inputs[: len(task.gradients)]]
    out = run(*leaves, *inputs[len(leaves) :])
    grads = torch.autograd.grad(out, leaves, task.cotangent)
    return run, {task.output: task.trim(out.detach()), **dict(zip(task.gradients, grads, strict=True))}


def check(actual: dict[str, Tensor], task: Task, yardstick: Yardstick, contender: Contender) -> dict[str, float]:
    grads = {name: actual[name] for name in task.gradients}
    rule = {"ours": contender.ours, "cpu_half_gradients": contender.name == "fastattn cpu"}
    return {
        "forward": gate.check({task.output: actual[task.output]}, yardstick, **rule),
        "backward": gate.check(grads, yardstick, **rule),
    }


def _time(task, accepted, errors, mode: str, device, seconds: float) -> list[dict]:
    calls = {name: call(task, run, mode, device) for name, run in accepted.items()}
    samples = timing.interleaved(calls, device, seconds=seconds)
    flops, moved = task.work[mode]
    rows = []
    for name, taken in samples.items():
        ms = taken.median
        row = _row(
            task, name, device, mode,
            ms_median=ms, ms_p20=taken.quantile(0.2), ms_p80=taken.quantile(0.8), rounds=len(taken.ms),
            tokens_per_s=task.fields["tokens"] / ms * 1e3, peak_bytes=peak_bytes(calls[name], device), host_us=taken.host_us,
            ratio_vs_eager=timing.speedup(taken, samples["eager"]) if "eager" in samples else None,
            ratio_vs_sdpa=timing.speedup(taken, samples["SDPA"]) if "SDPA" in samples else None,
            useful_flops=flops, useful_bytes=moved, tflops=flops / ms * 1e-9, gbps=moved / ms * 1e-6,
            max_error=errors[name][mode],
        )  # fmt: skip
        rows.append(row)
    return rows


def call(task: Task, run: Callable[..., Tensor], mode: str, device: torch.device) -> timing.Call:
    """Inputs take turns so that a GPU finds none of them in its L2; backward alone runs on graphs built beforehand."""
    first = task.inputs(0)
    count = timing.copies(sum(x.numel() * x.element_size() for x in first), device)
    sets = [first, *(task.inputs(seed) for seed in range(1, count))]
    if mode == "forward":
        return timing.rotate(torch.no_grad()(run), sets)
    graphs = []
    for args in sets:
        leaves = [x.detach().requires_grad_() for x in args[: len(task.gradients)]]
        graphs.append((run(*leaves, *args[len(leaves) :]), leaves))
    return timing.rotate(lambda out, leaves: torch.autograd.grad(out, leaves, task.cotangent, retain_graph=True), graphs)


def peak_bytes(call: timing.Call, device: torch.device) -> int | None:
    """On a GPU, what one call allocates at its peak beyond what was there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _row(task: Task, provider: str, device: torch.device, mode: str, **fields) -> dict:
    return results.record(**task.fields, provider=provider, device=results.device_name(device), mode=mode, **fields)
