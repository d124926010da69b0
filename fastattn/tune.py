"""`python -m fastattn tune`: times candidates for the rows of a table of tiles on the GPU that is there, and writes the table.

Kernels compile in parallel beforehand. A candidate is timed by replays of a CUDA graph over inputs that take turns, must give
what the shipped tiles give, and wins a class by the geometric mean over its cases.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import fastattn
from fastattn import timing
from fastattn.kernels.triton import ahead, launch, tuned
from fastattn.kernels.triton.launch import GPU
from fastattn.testing import UNIT
from fastattn.tune_cases import KERNELS, Case, Choice, Class, Prepared, candidates, classes, input_bytes, launches, prepare

Call = Callable[[], object]
Timer = Callable[[Sequence[Call]], float]  # of calls in turn, the microseconds of one

LEAST_GAIN = 0.02  # less is noise: the shipped choice stays
REPLAYS, MOST_SETS, LEAST_CALLS = 7, 12, 10  # of one graph: its own start is spread over as many calls
QUICK_SECONDS, QUICK_LEAST = 120, 30  # when --quick starts no further class; how long it times at least
# For the estimate, on a machine whose cores take 3 to 10 s for a variant: the start of the processes, one variant on one core,
# one candidate on one case
START_SECONDS, VARIANT_SECONDS, TIMING_SECONDS = 15.0, 5.0, 0.2


class Outcome(NamedTuple):
    """What became of a class: microseconds of each candidate on each case, and why others were left out."""

    group: Class
    shipped: Choice
    chosen: Choice
    us: dict[Choice, list[float]]
    refused: dict[Choice, str]

    @property
    def gain(self) -> float:
        """How much less time the chosen one takes than the shipped one, as a part of it."""
        return 1 - math.exp(_log_ratio(self.us, self.chosen, self.shipped))


def looked_at(gpu: GPU) -> Path:
    """Where calls on this GPU look for a table of the user's."""
    return Path(os.environ.get("FASTATTN_TUNED") or tuned.user_folder() / tuned.file_name(str(gpu.name)))


def table_path(out: Path | None, gpu: GPU) -> Path:
    """Where the table goes: `out`, or where calls will look for it. Raises ValueError, OSError where it cannot go there."""
    path = out or looked_at(gpu)
    if path.exists():
        tuned.read(path, gpu.name)  # which refuses what is not a table of this GPU
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main(quick: bool, path: Path, kernels: Iterable[str] = KERNELS) -> int:
    """Tune for the current GPU, print a line for each class, write the table."""
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = launch.gpu_of(device)
    groups = classes(quick, kernels, gpu)
    variants, timings = size(groups, gpu)
    seconds = estimate(variants, timings, len(os.sched_getaffinity(0)))
    print(f"{gpu.name}: {variants} kernels, {timings} times to take, about {seconds:.0f} s", flush=True)
    broken = compile_all(groups, gpu)
    print(f"compiled in {time.monotonic() - start:.0f} s; {len(broken)} did not compile", flush=True)
    deadline = max(start + QUICK_SECONDS, time.monotonic() + QUICK_LEAST) if quick else math.inf
    keep = functools.partial(write, path, str(gpu.name), "python -m fastattn tune" + " --quick" * quick)
    tune_all(groups, gpu, device, functools.partial(graph_us, device), broken, deadline, keep)
    print(f"wrote {path}" + ("" if path == looked_at(gpu) else f": FASTATTN_TUNED={path} makes calls look there"))
    return 0


def tune_all(
    groups: dict[Class, list[Case]], gpu: GPU, device: torch.device, timer: Timer, broken: dict[tuple, str], deadline: float,
    keep: Callable[[Sequence[Outcome]], None],
) -> list[Outcome]:  # fmt: skip
    """Of the classes that are begun before the deadline, with a line for each. What there is is kept after each of them."""
    begun, outcomes = time.monotonic(), list[Outcome]()
    for group, cases in groups.items():
        if time.monotonic() > deadline:
            break
        try:
            outcomes.append(tune(group, cases, gpu, device, timer, broken, outcomes))
        except Exception as error:  # of the shipped choice, which there is nothing to compare with then; the others go on
            print(f"{group}: not tuned: {ahead.words(error)}", flush=True)
        else:
            print(line(outcomes[-1]), flush=True)
            keep(outcomes)
    done = sum(len(us) for outcome in outcomes for us in outcome.us.values())
    took, left = time.monotonic() - begun, len(groups) - len(outcomes)
    print(f"{done} times taken in {took:.1f} s, {done / max(took, 1e-9):.1f} a second; {left} classes not tuned")
    return outcomes


def graph_us(device: torch.device, calls: Sequence[Call]) -> float:
    return statistics.median(timing.replay_us(calls, device, replays=REPLAYS))


def size(groups: dict[Class, list[Case]], gpu: GPU) -> tuple[int, int]:
    """Variants to compile and times to take."""
    variants, timings = set(), 0
    for group, cases in groups.items():
        choices = candidates(group, gpu)
        timings += len(cases) * len(choices)
        variants |= {_variant(group, case, choice) for case in cases for choice in choices if isinstance(choice, tuple)}
    return len(variants), timings


def estimate(variants: int, timings: int, cores: int) -> float:
    return START_SECONDS + variants * VARIANT_SECONDS / cores + timings * TIMING_SECONDS


def _variant(group: Class, case: Case, choice: Choice) -> tuple:
    """Cases that differ in lengths alone share a compiled kernel."""
    return group.kernel, group.fields, case.dtype, case.mask, choice


def compile_all(groups: dict[Class, list[Case]], gpu: GPU, processes: int | None = None) -> dict[tuple, str]:
    """Compile every candidate; the variants that failed, with what went wrong."""
    jobs: dict[tuple, ahead.Job] = {}
    for group, cases in groups.items():
        choices = tuple(choice for choice in candidates(group, gpu) if isinstance(choice, tuple))
        for case in cases:
            for choice in choices:
                jobs.setdefault(_variant(group, case, choice), functools.partial(launches, group, case, (choice,), gpu))
    variants = {id(job): variant for variant, job in jobs.items()}
    compiled = ahead.compile_ahead(list(jobs.values()), gpu.sm, processes=processes)
    return {variants[id(failure.job)]: failure.error for failure in compiled.failures}


def tune(
    group: Class, cases: list[Case], gpu: GPU, device: torch.device, timer: Timer, broken: dict[tuple, str],
    before: Sequence[Outcome] = (),
) -> Outcome:  # fmt: skip
    """Time all candidates of a class. `before`: the classes that are done, for the two kernels that one competes with."""
    shipped, *others = choices = candidates(group, gpu)
    us: dict[Choice, list[float]] = {choice: [] for choice in choices}
    refused: dict[Choice, str] = {}
    for index, case in enumerate(cases):
        sets = [prepare(group, case, device, gpu) for _ in range(min(MOST_SETS, timing.copies(input_bytes(group, case), device)))]
        ready = [make(shipped) for make in sets]
        expected = _results(ready[0])
        us[shipped].append(timer(_turns(ready)))
        for choice in others:
            if choice in refused:
                continue
            try:
                if (variant := _variant(group, case, choice)) in broken:
                    raise RuntimeError(broken[variant])
                ready = [make(choice) for make in sets]
                compare(_results(ready[0]), expected)
                us[choice].append(timer(_turns(ready)))
            except Exception as error:  # a candidate that does not run is no candidate; the line of its class says so
                refused[choice] = ahead.words(error)
        if group.kernel == tuned.ONE_KERNEL and None in us:
            two = [found for found in before if found.group[1:] == group[1:] and found.group.kernel in PAIR]
            if len(two) == len(PAIR) and None not in refused:  # with the tiles that they get
                us[None][-1] = sum(found.us[found.chosen][index] for found in two)
    complete = {choice: found for choice, found in us.items() if choice not in refused}
    return Outcome(group, shipped, choose(complete, shipped), complete, refused)


PAIR = ("attention_dq", "attention_dkdv")


def _turns(ready: list[Prepared]) -> list[Call]:
    return [one.call for one in ready] * math.ceil(LEAST_CALLS / len(ready))


def _results(ready: Prepared) -> dict[str, Tensor]:
    """Of one call, in memory that held NaN before."""
    if ready.launch is not None:
        for tensor in ready.results().values():
            tensor.fill_(math.nan)
    ready.call()
    return {name: tensor.clone() for name, tensor in ready.results().items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless both are the same sums, added up in another order and rounded elsewhere."""
    for name, right in expected.items():
        wide, right = found[name].double(), right.double()
        live = torch.isfinite(right)
        if not torch.equal(live, torch.isfinite(wide)):
            raise ValueError(f"{name} is finite elsewhere than with the shipped tiles")
        bound = 4 * max(UNIT[torch.float16], UNIT[found[name].dtype]) * float(right[live].norm())
        error = float((wide - right)[live].norm())
        if error > bound:
            raise ValueError(f"{name} differs from what the shipped tiles give by {error:.2e}, more than {bound:.2e}")


def choose(us: dict[Choice, list[float]], shipped: Choice) -> Choice:
    """The fastest by the geometric mean over cases; the shipped one if what it would gain is noise."""
    best = min(us, key=lambda choice: _log_ratio(us, choice, shipped))
    return best if 1 - math.exp(_log_ratio(us, best, shipped)) >= LEAST_GAIN else shipped


def _log_ratio(us: dict[Choice, list[float]], choice: Choice, other: Choice) -> float:
    return statistics.mean(math.log(a / b) for a, b in zip(us[choice], us[other], strict=True))


def line(outcome: Outcome) -> str:
    """For people: what is chosen, against what is shipped."""
    times = {choice: sum(us) / len(us) for choice, us in outcome.us.items()}
    text = f"{outcome.group}: {words(outcome.chosen)}, {times[outcome.chosen]:.1f} us"
    if outcome.chosen == outcome.shipped:
        text += f", as shipped, of {len(times)} candidates"
    else:
        text += f" against {times[outcome.shipped]:.1f} of {words(outcome.shipped)} as shipped: {outcome.gain:.0%} less"
    return "\n".join([text, *(f"  left out: {words(choice)}: {reason}" for choice, reason in outcome.refused.items())])


def words(choice: Choice) -> str:
    if choice is None:
        return "two kernels"
    if isinstance(choice, str):
        return choice
    *tiles, warps, stages = choice
    return f"{' x '.join(map(str, tiles))} with {warps} warps, {stages} stages"


def rows(outcomes: Iterable[Outcome], source: str) -> list[dict[str, Any]]:
    """Rows of a table. Where PyTorch's product wins, the best tiles follow it, for requests that it does not serve."""
    found = []
    for outcome in outcomes:
        chosen = [outcome.chosen]
        if isinstance(outcome.chosen, str):
            tiles = {choice: us for choice, us in outcome.us.items() if not isinstance(choice, str)}
            chosen.append(min(tiles, key=lambda choice: sum(map(math.log, tiles[choice]))))
        found += [{**outcome.group.row(choice), "by": "measured", "source": source} for choice in chosen]
    return found


def write(path: Path, device: str, command: str, outcomes: Sequence[Outcome]) -> None:
    """Rows of kernels that were not tuned stay as the file has them."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    found = rows(outcomes, f"{device}, {command}, {today}")
    tuned_now = {row["kernel"] for row in found}
    kept = []
    if path.exists():
        kept = [row for row in json.loads(path.read_text())["rows"] if row["kernel"] not in tuned_now]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    head = {"device": device, "date": today, "command": command, "versions": {"fastattn": fastattn.__version__, **versions}}
    lines = ",\n  ".join(json.dumps(row) for row in [*found, *kept])
    whole = path.with_suffix(".new")  # so that nobody reads half a table, and a run that is cut leaves none
    whole.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')
    tuned.read(whole, device)
    whole.replace(path)
