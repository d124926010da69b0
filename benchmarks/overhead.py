"""Host time of calls: `python -m benchmarks.overhead`, on one thread, in units of `x.new_empty(B, L, H, D)` of the same run.

With `--dry`, and where there is no GPU, launches do nothing: tensors lie on the CPU, a call does what it does on an H100 up to
the launch itself, and results hold nothing. PyTorch's own operations beside it do compute there, on sizes so small that their
arithmetic does not count. On a GPU the launches are real, and what is timed is how long the host takes to issue them.

A figure is the least of many rounds, in which all calls take turns, each as the mean of many. Of a layer of BERT it is the
difference of two models' calls over the layers that one has more. A dry run counts the processor's time, so that other work of
the machine disturbs it little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import results
from benchmarks.overhead_calls import DRY, FEW, MANY, REAL, Case, Setting, cases, figures_of_layers, layered

if TYPE_CHECKING:
    from fastattn.kernels.triton.launch import Dry, Launch

HOPPER = 90
UNIT = "x.new_empty"
ROUNDS, QUICK_ROUNDS = 80, 5
SAMPLE_S = 2e-3  # of calls in a round; on a GPU few enough that its queue of about a thousand launches never fills


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="replace launches by nothing, on tensors of the CPU, GPU or not")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--no-compile", action="store_true", help="do not compile first what the dry calls would launch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write {name: units}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    setting = REAL if torch.cuda.is_available() and not args.dry else DRY
    if setting is REAL and args.no_compile:
        parser.error("--no-compile is for dry runs: kernels that are launched are compiled by their first call")
    if setting is DRY and not args.no_compile:
        compile_all(setting)
    best = timed(setting, QUICK_ROUNDS if args.quick else ROUNDS)
    print_table(best, setting)
    if args.json:
        args.json.write_text(json.dumps(in_units(best), indent=1, allow_nan=False) + "\n")
    return 0


# Compiling


def compile_all(setting: Setting) -> None:
    """Compile what will be launched, so that it is known to compile. Raises SystemExit with the words of what did not."""
    from fastattn.kernels.triton.ahead import compile_ahead

    compiled = compile_ahead(jobs(setting), HOPPER)
    for failure in compiled.failures:
        print(f"{failure.job}: {failure.error}", file=sys.stderr)
    if compiled.failures:
        raise SystemExit(f"{len(compiled.failures)} kernels do not compile for sm_{HOPPER}")
    print(f"{compiled.variants} kernels are compiled for sm_{HOPPER}")


def jobs(setting: Setting) -> list[Callable[[], list[Launch]]]:
    """For `compile_ahead`: the launches of each call of ours."""
    with dry_or_real(setting):
        names = [name for name, case in cases(setting).items() if case.launches]
    return [functools.partial(launches_of_case, setting, name) for name in names]


def launches_of_case(setting: Setting, name: str) -> list[Launch]:
    from fastattn.launches import HOPPER as gpu
    from fastattn.launches import launches_of

    with dry_or_real(setting):
        case = cases(setting)[name]
        with case.context():
            return launches_of(case.call, gpu)


def dry_or_real(setting: Setting) -> contextlib.AbstractContextManager[Dry | None]:
    if setting.device != "cpu":
        return contextlib.nullcontext()
    from fastattn.kernels.triton.launch import GPU, dry

    return dry(GPU(HOPPER))


# Timing


def timed(setting: Setting, rounds: int) -> dict[str, float]:
    """Seconds by the name of a case, and of the unit."""
    x = setting.tensor(1)
    unit = Case(functools.partial(x.new_empty, setting.B, setting.L, setting.H, setting.D))
    with dry_or_real(setting) as made:
        return least({UNIT: unit, **cases(setting)}, rounds, setting, made)


def least(calls: dict[str, Case], rounds: int, setting: Setting, made: Dry | None) -> dict[str, float]:
    """The least mean of each case over the rounds, in which they take turns."""
    # Without a GPU to wait for, the processor's time: what else the machine does in between does not count.
    clock = time.process_time if setting.device == "cpu" else time.perf_counter
    counts = {name: _count(name, case, made, clock) for name, case in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    for _ in results.progress(list(range(rounds)), "overhead"):
        for name, case in calls.items():
            if setting.device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], _mean(case, counts[name], clock))
    return best


def _count(name: str, case: Case, made: Dry | None, clock: Callable[[], float]) -> int:
    """Warm up, then the number of calls of a sample. Raises RuntimeError where something else than our kernels answers."""
    before = 0 if made is None else made.launches
    _mean(case, 3, clock)
    if case.launches and made is not None and made.launches == before:
        raise RuntimeError(f"{name} launches nothing: this would time something else")
    return max(1, int(SAMPLE_S / _mean(case, 3, clock)))


def _mean(case: Case, calls: int, clock: Callable[[], float]) -> float:
    """Seconds of a call, after one that is not timed, without the collector of garbage."""
    with case.context():
        case.call()
        gc.disable()
        try:
            start = clock()
            for _ in range(calls):
                case.call()
            return (clock() - start) / calls
        finally:
            gc.enable()


# Figures


def in_seconds(best: dict[str, float]) -> dict[str, float]:
    """By the name of a figure: a layer is what a model of MANY layers takes beyond one of FEW, for each."""
    layers = {}
    for name, _ in figures_of_layers():
        many, few = (best[layered(name, count)] for count in (MANY, FEW))
        layers[name] = (many - few) / (MANY - FEW)
    whole = {layered(name, count) for name in layers for count in (FEW, MANY)} | {UNIT}
    return {name: seconds for name, seconds in best.items() if name not in whole} | layers


def in_units(best: dict[str, float]) -> dict[str, float]:
    return {name: seconds / best[UNIT] for name, seconds in in_seconds(best).items()}


def print_table(best: dict[str, float], setting: Setting) -> None:
    how = "launches replaced by nothing" if setting.device == "cpu" else f"real launches, {torch.cuda.get_device_name()}"
    print(f"host time of a call, {how}; a unit is {UNIT}, {best[UNIT] * 1e6:.2f} us")
    units = in_units(best)
    width = max(map(len, units))
    for name, seconds in in_seconds(best).items():
        print(f"{name:{width}}  {seconds * 1e6:8.1f} us  {units[name]:6.1f} units")


if __name__ == "__main__":
    sys.exit(main())
