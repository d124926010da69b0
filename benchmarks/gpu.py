"""`make gpu`: the CUDA kernels are built, primitives compared with the emulator, then GPU tests and the benchmarks; in one
command of under nine minutes that installs and downloads nothing.

Leaves at most eight files in --out: result files, plots, one log, and summary.json with each step's exit status and time. A step
that fails or runs out of time does not keep the next from running; the exit status is 1 if any did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Step(NamedTuple):
    name: str
    limit: int  # seconds
    arguments: tuple[str, ...]  # of python


def steps(out: Path) -> list[Step]:
    where = ["--device", "cuda", "--out", str(out)]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of the time goes into compiling kernels
    test = ("-m", "pytest", "-m", "gpu", "--tb=short")
    return [
        Step("build", 60, ("setup.py", "build_ext", "--inplace")),
        Step("conformance", 45, (*test, "tests/emulator")),
        Step("tests", 145, (*test, "tests", "--ignore=tests/emulator", *workers)),
        Step("verify", 50, ("-m", "fastattn", "verify")),
        Step("ops", 100, ("-m", "benchmarks.ops", *where)),
        Step("masks", 55, ("-m", "benchmarks.ops", "--suite", "masks", "--budget", "35", *where)),
        Step("models", 80, ("-m", "benchmarks.models", "--budget", "55", *where)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default %(default)s)")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = []
    with (out / "log.txt").open("w") as log:
        for step in steps(out):
            summary.append(run(step, log))
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if any(row["exit"] != 0 for row in summary) else 0


def run(step: Step, log) -> dict:
    """Run one step, with its output both on the terminal and in the log."""
    command = [sys.executable, *step.arguments]
    print("==", *command, file=log, flush=True)
    start = time.monotonic()
    environment = {**os.environ, "FASTATTN_CUDA": "1"}  # a build that fails is a failure
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=step.limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + f"\nstopped after its limit of {step.limit} s\n"
    print(output, flush=True)
    print(output, file=log, flush=True)
    last = output.strip().splitlines()[-1:] or [""]
    seconds = round(time.monotonic() - start, 1)
    return {"step": step.name, "exit": process.returncode, "seconds": seconds, "last_line": last[0]}


if __name__ == "__main__":
    sys.exit(main())
