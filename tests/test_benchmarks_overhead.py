"""`python -m benchmarks.overhead`: what it writes, how it makes a figure, what it compiles, and that our kernels are timed."""

# ruff: noqa: E402  (without triton nothing below can be imported)
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
from benchmarks import overhead, overhead_calls
from benchmarks.overhead_calls import DRY, Case, cases, figures_of_layers, layered, ops
from fastattn.kernels.triton import ahead
from fastattn.kernels.triton.launch import GPU, dry, recorded

ROOT = Path(__file__).parent.parent
PROMISED = {
    "attention", "linear gelu", "add_layer_norm", "ffn", "attention forward + backward",
    "BERT layer", "BERT layer training", "BERT layer, Hugging Face", "BERT layer training, Hugging Face",
}  # fmt: skip


def names() -> set[str]:
    both = [f"{name}{kind}" for name in ops(DRY) for kind in ("", " forward + backward")]
    theirs = [f"{name}, PyTorch" for name in both if not name.startswith("varlen")]
    parts = [f"part: {name}" for name in ("key", "allocation", "launch", "boundary", "autograd", "registered op")]
    return {*both, *theirs, *parts, *(name for name, _ in figures_of_layers())}


def quick_run(tmp_path, *arguments: str) -> tuple[dict, str]:
    """What a process of its own writes and says, with Triton's own kernels and not interpreted ones."""
    path, environment = tmp_path / "figures.json", {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--json", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text()), done.stdout


def check(figures: dict, said: str) -> None:
    assert set(figures) == names() >= PROMISED
    for name, units in figures.items():
        assert type(units) is float and 0 < units < math.inf, (name, units)
        assert sum(line.startswith(f"{name}  ") for line in said.splitlines()) == 1, name


def test_a_dry_run_writes_every_figure(tmp_path):
    figures, said = quick_run(tmp_path, "--dry", "--no-compile")
    check(figures, said)
    assert "launches replaced by nothing" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_writes_every_figure(tmp_path):
    figures, said = quick_run(tmp_path)
    check(figures, said)
    assert torch.cuda.get_device_name() in said


def test_figures_are_least_means_in_units(monkeypatch):
    """On a clock that moves by what the calls say; the first of a sample is not timed."""
    now, durations = [0.0], {}

    def call(name):
        now[0] += durations[name].pop(0)

    warming = [1.0] * 8  # of which the number of calls of a sample is made: 1
    durations.update({"slow": [*warming, 0.1, 5.0, 0.1, 3.0, 9.0, 4.0], overhead.UNIT: [*warming, 9.0, 0.5, 0.1, 2.0, 0.1, 1.0]})
    monkeypatch.setattr(overhead.time, "process_time", lambda: now[0])
    calls = {name: Case(lambda name=name: call(name)) for name in durations}
    best = overhead.least(calls, 3, DRY, None)
    assert best == {"slow": 3.0, overhead.UNIT: 0.5} and not any(durations.values())
    layers = {layered(name, count): 0.25 + count * 1.5 for name, _ in figures_of_layers() for count in (2, 10)}
    found = overhead.in_units({**best, **layers})
    assert found == {"slow": 6.0} | {name: 3.0 for name, _ in figures_of_layers()}


def test_a_sample_is_of_many_calls_and_the_context_is_not_timed(monkeypatch):
    now, made = [0.0], []

    def call():
        now[0] += 1e-4
        made.append(torch.is_grad_enabled())

    class Slow(torch.no_grad):
        def __enter__(self):
            now[0] += 1.0
            return super().__enter__()

    monkeypatch.setattr(overhead.time, "process_time", lambda: now[0])
    assert overhead.least({"call": Case(call, Slow)}, 1, DRY, None) == {"call": pytest.approx(1e-4)}
    assert len(made) >= 8 + 20 and not any(made)


def test_what_launches_nothing_is_not_timed():
    with overhead.dry_or_real(DRY) as made:
        overhead.least({"attention": cases(DRY)["attention"]}, 1, DRY, made)
        nothing = Case(lambda: torch.zeros(2), launches=True)
        with pytest.raises(RuntimeError, match="attention of old launches nothing"):
            overhead.least({"attention of old": nothing}, 1, DRY, made)


def test_all_that_is_launched_is_compiled(monkeypatch):
    """Jobs that another process can run; both directions of every op, and what layers of BERT launch, padding taken out."""
    jobs = pickle.loads(pickle.dumps(overhead.jobs(DRY)))
    launches = {job.args[1]: job() for job in jobs}
    launched = {name: {launch.kernel.__name__ for launch in found} for name, found in launches.items()}
    ours = {f"{name}{kind}" for name in ops(DRY) for kind in ("", " forward + backward")} | {"part: launch"}
    ours |= {layered(name, count) for name, is_ours in figures_of_layers() if is_ours for count in (2, 10)}
    assert set(launched) == ours and all(launched.values())
    of_a_layer = {"_attention_forward_kernel", "_linear_forward_kernel", "_norm_forward_kernel"}
    assert launched["BERT layer, 2 layers"] == launched["BERT layer, padded, 2 layers"] == of_a_layer
    assert launched["BERT layer training, 2 layers"] > of_a_layer
    for name, packed in (("BERT layer, 2 layers", False), ("BERT layer, padded, 2 layers", True)):
        attention = [x.arguments for x in launches[name] if x.kernel.__name__ == "_attention_forward_kernel"]
        assert [arguments["query_starts"] is not None for arguments in attention] == [packed] * 2, name
    given = []

    def compile_ahead(jobs, sm):
        given.extend([len(jobs), sm])
        return ahead.Compiled(len(jobs) - 1, [ahead.Failure(jobs[0], 0, "out of registers")])

    monkeypatch.setattr(ahead, "compile_ahead", compile_ahead)
    with pytest.raises(SystemExit, match="1 kernels do not compile for sm_90"):
        overhead.compile_all(DRY)
    assert given == [len(jobs), 90]


def test_a_part_that_was_recorded_for_compiling_is_launched_after_that():
    with dry(GPU(90)) as made:
        launch = overhead_calls.parts(DRY)["part: launch"]
        with recorded(GPU(90)) as launches:
            launch.call()
        launch.call()
    assert len(launches) == 1 and made.launches == 1
