"""Every custom kernel once, in Triton's interpreter on the CPU, on a shape of each model: errors, no times.

`python -m benchmarks.interpreter MODEL...` prints one JSON object; `run` calls it in a process of its own, because Triton reads
TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from benchmarks import model_cases, shapes
from fastattn import testing

LONGEST = 80  # positions of a tower that are run: the interpreter takes seconds for hundreds
TIMEOUT = 60


def run(models: list[str], timeout: float = TIMEOUT) -> list[str]:
    """Lines to print: the error of each kernel on each shape, or why the interpreter did not run."""
    command = [sys.executable, "-m", "benchmarks.interpreter", *models]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return [f"the interpreter was stopped after {timeout:.0f} s"]
    if done.returncode:
        return [f"the interpreter did not run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    return json.loads(done.stdout)


def lines(models: list[str]) -> list[str]:
    """One line per distinct shape: attention forward and backward, held against fp64 by the project's accuracy rule."""
    found: dict[tuple[int, int, bool], str] = {}
    for model in models:
        for tower in shapes.towers(model_cases.read_config(model)):
            S, D = min(tower.positions, LONGEST), tower.hidden // tower.heads
            found.setdefault((S, D, tower.causal), model)
    result = []
    for (S, D, causal), model in found.items():
        mask = "causal_padding" if causal else "padding"
        x = testing.attention_inputs(2, 1, S, S, D, torch.float32, mask=mask)
        actual = testing.run_attention(x, "triton")
        yardstick = testing.attention_yardstick(x)
        testing.assert_accurate(actual, yardstick)
        errors = " ".join(
            f"{name} {float((actual[name] - yardstick.exact[name]).abs().max()):.1e}" for name in ("out", "dq", "dk", "dv")
        )
        result.append(f"attention of {model}, S={S} D={D} {mask}: max error {errors}")
    return result


if __name__ == "__main__":
    print(json.dumps(lines(sys.argv[1:])))
