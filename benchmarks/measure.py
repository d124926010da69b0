"""One op on one shape through every provider: gate, then forward and backward apart, as records."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks import budget, gate, results
from fastattn import timing
from fastattn.testing import Yardstick

Result = TypeVar("Result")


class Contender(NamedTuple):
    """`build()` gives run(*inputs) -> output, or raises; `package` must be importable for it.

    Main ones have their turn in any budget, slow ones only when they are asked for. One whose results are random has a gate of
    its own: it raises AssertionError or gives the errors of each mode, and `gate_words` say what it holds them to. `uncapturable`
    says why its backward pass must not be captured without its forward pass.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    ours: bool = False
    package: str | None = None
    main: bool = False
    slow: bool = False
    gate: Callable[[Callable[..., Tensor]], dict[str, float]] | None = None
    gate_words: str = ""
    uncapturable: str = ""


class Part(NamedTuple):
    """What a provider computes on the way, timed alone, under a mode of its own."""

    provider: str
    mode: str
    build: Callable[[], timing.Call]
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
    parts: tuple[Part, ...] = ()
    cpu_memory: bool = False  # on a GPU a call's peak is always known; here by a profiler, whose start takes seconds


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


def measure(
    task: Task, device: torch.device, *, seconds: float, modes: tuple[str, ...], slow: bool = False,
    share: budget.Share | None = None,
) -> list[dict]:  # fmt: skip
    share = share or budget.Share(math.inf)
    inputs = task.inputs(0)
    yardstick = task.yardstick(inputs)
    accepted: dict[str, Accepted] = {}
    rows = []
    for contender in sorted(task.contenders, key=lambda one: not one.main):
        answer, refusal, wrong = _ask(contender, task, inputs, yardstick, slow, share)
        if answer is not None:
            accepted[contender.name] = answer
        else:
            rows += [_row(task, contender.name, device, mode, refusal=refusal or None, wrong=wrong or None) for mode in modes]
    sets = input_sets(task, device)
    for index, mode in enumerate(modes):
        rows += _time(task, accepted, sets, mode, device, share.timing(seconds * (len(modes) - index)) / (len(modes) - index))
    order = [contender.name for contender in task.contenders]
    rows.sort(key=lambda row: (modes.index(row["mode"]), order.index(row["provider"])))
    return rows + [_time_part(task, part, device, share.timing(seconds)) for part in task.parts if part.provider in accepted]


class Accepted(NamedTuple):
    """Who passed the gate, with which errors."""

    contender: Contender
    run: Callable[..., Tensor]
    errors: dict[str, float]  # of each mode


def _ask(
    contender: Contender, task: Task, inputs: tuple[Tensor, ...], yardstick: Yardstick, slow: bool, share: budget.Share
) -> tuple[Accepted | None, str, str]:
    """(whom the gate let through, "", ""), or (None, the refusal, what is wrong) with one of the two empty."""
    if contender.slow and not slow:
        return None, budget.SLOW, ""
    if not contender.main and not share.open:
        return None, budget.SPENT, ""
    answer, refusal = attempt(functools.partial(trial, contender.build, task, inputs), contender.package)
    if answer is None:
        return (None, "", refusal) if is_failure(contender.ours, refusal) else (None, refusal, "")
    run, actual = answer
    try:
        errors = contender.gate(run) if contender.gate else check(actual, task, yardstick, contender)
        return Accepted(contender, run, errors), "", ""
    except AssertionError as error:
        return None, "", str(error)


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


def _time(
    task: Task, accepted: dict[str, Accepted], sets: list[tuple[Tensor, ...]], mode: str, device: torch.device, seconds: float
) -> list[dict]:
    turns: dict[str, list[timing.Call]] = {}
    rows = []
    for name, (contender, run, _) in accepted.items():
        found, refusal = attempt(functools.partial(calls, task, run, mode, sets, device))  # where memory may run out
        if found is not None:
            turns[name] = found
        else:
            failed = is_failure(contender.ours, refusal)
            rows.append(_row(task, name, device, mode, **{"wrong" if failed else "refusal": refusal}))
    served = accepted.items() if mode == "backward" else ()
    uncapturable = {name: one.contender.uncapturable for name, one in served if one.contender.uncapturable}
    samples = timing.kernels(dict(turns), device, seconds=seconds, uncapturable=uncapturable)
    for name, taken in samples.items():
        how = {"method": taken.method, "method_reason": taken.reason, "host_us": taken.host_us}
        if taken.ms:
            contender, _, errors = accepted[name]
            times = _times(task, mode, taken, samples) | ({"gate": contender.gate_words} if contender.gate else {})
            on_cpu = task.cpu_memory and device.type != "cuda"
            peak = cpu_peak_bytes(turns[name][0]) if on_cpu else peak_bytes(turns[name][0], device)
            rows.append(_row(task, name, device, mode, **times, **how, peak_bytes=peak, max_error=errors[mode]))
        else:
            rows.append(_row(task, name, device, mode, **how, refusal=f"not timed: {taken.reason}"))
    return rows


def _time_part(task: Task, part: Part, device: torch.device, seconds: float) -> dict:
    call, refusal = attempt(part.build, part.package)
    if call is None:
        return _row(task, part.provider, device, part.mode, refusal=refusal)
    samples = timing.kernels({part.provider: [call]}, device, seconds=seconds)
    taken = samples[part.provider]
    how = {"method": taken.method, "method_reason": taken.reason, "host_us": taken.host_us}
    if not taken.ms:
        return _row(task, part.provider, device, part.mode, **how, refusal=f"not timed: {taken.reason}")
    return _row(task, part.provider, device, part.mode, **_times(task, part.mode, taken, samples), **how)


def _times(task: Task, mode: str, taken: timing.Samples, samples: dict[str, timing.Samples]) -> dict:
    ms = taken.median
    flops, moved = task.work[mode]
    ratios = {
        field: timing.speedup(taken, samples[name]) if name in samples and samples[name].ms else None
        for field, name in (("ratio_vs_eager", "eager"), ("ratio_vs_sdpa", "SDPA"))
    }
    return {
        "ms_median": ms, "ms_p20": taken.quantile(0.2), "ms_p80": taken.quantile(0.8), "rounds": len(taken.ms),
        "tokens_per_s": task.fields["tokens"] / ms * 1e3, **ratios,
        "useful_flops": flops, "useful_bytes": moved, "tflops": flops / ms * 1e-9, "gbps": moved / ms * 1e-6,
    }  # fmt: skip


def input_sets(task: Task, device: torch.device) -> list[tuple[Tensor, ...]]:
    """As many as must take turns so that a GPU finds none of them in its L2."""
    first = task.inputs(0)
    count = timing.copies(sum(x.numel() * x.element_size() for x in first), device)
    return [first, *(task.inputs(seed) for seed in range(1, count))]


def calls(
    task: Task, run: Callable[..., Tensor], mode: str, sets: list[tuple[Tensor, ...]], device: torch.device
) -> list[timing.Call]:
    """The same work on each set of inputs. Backward alone runs on graphs built beforehand."""
    if mode == "forward":
        return [functools.partial(torch.no_grad()(run), *args) for args in sets]
    found: list[timing.Call] = []
    with timing.capturing(device):
        for args in sets:
            leaves = [x.detach().requires_grad_() for x in args[: len(task.gradients)]]
            out = run(*leaves, *args[len(leaves) :])
            found.append(functools.partial(torch.autograd.grad, out, leaves, task.cotangent, retain_graph=True))
    return found


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


def cpu_peak_bytes(call: timing.Call) -> int | None:
    """From the profiler's record of each allocation; None where this PyTorch gives none."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = call()  # held until the record ends
        events = list(profiled.profiler.kineto_results.experimental_event_tree())
        kind = torch._C._profiler._EventType.Allocation
    except (AttributeError, RuntimeError):
        return None
    found = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == kind and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    del result
    return max(itertools.accumulate((size for _, size in sorted(found)), initial=0))


def _row(task: Task, provider: str, device: torch.device, mode: str, **fields) -> dict:
    return results.record(**task.fields, provider=provider, device=results.device_name(device), mode=mode, **fields)
