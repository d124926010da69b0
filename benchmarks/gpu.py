"""`make gpu`: everything that needs a GPU, in one command of under nine minutes that installs and downloads nothing.

The CUDA kernels are built and the Triton kernels compiled, in parallel; then instructions are compared with the emulator, ops
with the specification, kernels and models timed, the GPU tests run, tiles tuned, training and masks timed: the verdict first, in
an order by what a cut run would miss most.

--out gets at most eight files, each as soon as there is something to write: log.txt with every line of output, summary.json with
each step's exit status and time, failures.txt of the tests, result files, pictures, the tuned tiles. A step that fails or is cut
keeps none of the others from running; the exit status is 0 if every step that was asked for ran and passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 535  # seconds, of nine minutes
LEAST = 5  # seconds that are worth beginning a step
MOST = 2  # times its own limit that a step may take of time left over: one that hangs does not take all
START = 15  # seconds of a benchmark's limit that are for starting and ending, beside its own budget
MOST_FILES = 8
GRACE = 5  # seconds to end after an interrupt


class Step(NamedTuple):
    """`arguments` are Python's; SECONDS in them is what a benchmark may spend. `limit` includes GRACE."""

    name: str
    limit: int  # seconds that are its own; what steps before it have left over comes on top
    arguments: tuple[str, ...]


def steps(out: Path) -> list[Step]:
    """Limits by what an H100's machine took. On 16 slow cores the build takes over 40 s, the tests on 14 workers 180 s where
    nothing is compiled before."""
    cores = len(os.sched_getaffinity(0))
    workers = ("-n", str(max(1, min(14, cores - 2)))) if importlib.util.find_spec("xdist") else ()
    test = ("-m", "pytest", "-m", "gpu", "--tb=short", "--continue-on-collection-errors", "--failures", str(out / "failures.txt"))
    timed = ("--device", "cuda", "--out", str(out), "--budget", "SECONDS")
    return [
        Step("build", 75, ("setup.py", "build_ext", "--inplace")),
        Step("compile", 55, ("-m", "benchmarks.ahead")),
        Step("conformance", 30, (*test, "tests/emulator")),
        Step("verify", 45, ("-m", "fastattn", "verify", "--quick")),
        Step("ops", 70, ("-m", "benchmarks.ops", *timed)),
        Step("models", 60, ("-m", "benchmarks.models", *timed)),
        Step("tests", 95, (*test, *gpu_tests(), *workers)),
        Step("tune", 40, ("-m", "fastattn", "tune", "--quick", "--out", str(out / "tiles.json"))),
        Step("training", 40, ("-m", "benchmarks.ops", "--suite", "training", *timed)),
        Step("masks", 25, ("-m", "benchmarks.ops", "--suite", "masks", *timed)),
    ]


def gpu_tests() -> list[str]:
    """The files that can have tests for a GPU: to collect all others too takes each worker long."""
    texts = {f"tests/{path.name}": path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    return [name for name, text in texts.items() if "from backends import" in text or "mark.gpu" in text]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "failures.txt").unlink(missing_ok=True)
    chosen = [step for step in steps(out) if args.steps is None or step.name in args.steps]
    with (out / "log.txt").open("w") as log:
        summary = run_all(chosen, args.budget, log, out)
    return 0 if all(row["exit"] == 0 and row["reason"] is None for row in summary) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = [step.name for step in steps(Path())]

    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: the steps are {', '.join(known)}")
        return text.split(",")

    def seconds(text: str) -> float:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
        return float(text)

    parser = argparse.ArgumentParser("benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default %(default)s)")
    parser.add_argument("--steps", type=names, metavar="NAME,...", help=f"of {', '.join(known)}; in this order (default all)")
    parser.add_argument(
        "--budget", type=seconds, default=BUDGET, metavar="SECONDS", help="for all steps together (default %(default)s)"
    )
    return parser.parse_args(argv)


def run_all(chosen: list[Step], budget: float, log: TextIO, out: Path) -> list[dict[str, Any]]:
    """Each step within its limit, what those before it have left over, and the budget; the summary is written after each."""
    began, end, summary = time.time(), time.monotonic() + budget, []
    for index, step in enumerate(chosen):
        left = end - time.monotonic()
        spare = left - sum(later.limit for later in chosen[index:])
        if left < LEAST:
            reason = f"not begun: of the budget of {budget:.0f} s {max(0.0, left):.0f} s were left"
            row = {"step": step.name, "exit": None, "seconds": 0.0, "reason": reason, "last_line": ""}
            _say(f"== {step.name} {reason}", log)
        else:
            row = run(step, min(left, step.limit + max(0.0, spare), MOST * step.limit), log)
        summary.append(row)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        bundle(out, began)
    return summary


def bundle(out: Path, began: float) -> None:
    """Pictures go into one archive where this run has left more than eight files."""
    written = [path for path in out.rglob("*") if path.is_file() and path.stat().st_mtime >= began]
    pictures = [path for path in written if path.suffix == ".png"]
    if len(written) > MOST_FILES and pictures:
        with zipfile.ZipFile(out / "pictures.zip", "a") as archive:
            for path in pictures:
                archive.write(path, path.relative_to(out))
                path.unlink()


def run(step: Step, limit: float, log: TextIO) -> dict[str, Any]:
    """One step, its output on the terminal and in the log line by line. It and all that it has started end with it."""
    budget = max(1, int(min(step.limit, limit)) - START)
    command = [sys.executable, *(str(budget) if word == "SECONDS" else word for word in step.arguments)]
    _say(f"== {step.name}, at most {limit:.0f} s: {' '.join(command)}", log)
    environment = {**architecture(), **os.environ, "FASTATTN_CUDA": "1", "PYTHONUNBUFFERED": "1"}  # a build must not fail
    start, last = time.monotonic(), [""]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=_copy, args=(process.stdout, log, last), daemon=True)
    reader.start()
    try:
        cut = not _ended(process, limit)
    finally:
        with contextlib.suppress(ProcessLookupError):  # where nothing of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(GRACE)  # not for ever: what has left the group may still hold the pipe
    reason = f"cut after its limit of {limit:.0f} s" if cut else None
    if reason is not None:
        _say(f"== {step.name} {reason}", log)
    seconds = round(time.monotonic() - start, 1)
    return {"step": step.name, "exit": process.wait(), "seconds": seconds, "reason": reason, "last_line": last[0]}


def architecture() -> dict[str, str]:
    """That of the GPU that is here, for a build of its kernels alone, which takes half as long; nothing where none is."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=GRACE).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"FASTATTN_CUDA_ARCHS": found[0].replace(".", "")} if found else {}


def _ended(process: subprocess.Popen, limit: float) -> bool:
    """Whether it ended by itself. One that did not is interrupted, so that a test run says how far it came."""
    try:
        process.wait(max(0.0, limit - GRACE))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return False
    return True


def _copy(lines: TextIO, log: TextIO, last: list[str]) -> None:
    for line in lines:
        _say(line.rstrip("\n"), log)
        last[0] = line.strip() or last[0]


def _say(line: str, log: TextIO) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


if __name__ == "__main__":
    sys.exit(main())
