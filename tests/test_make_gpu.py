"""`make gpu` with steps that fail, hang and write: their order, limits and budget, and what is left when one is cut."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parent.parent
# Started by a step that is cut: it neither listens to an interrupt nor ends with its parent.
STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(300)"
)
HANGS = f"""
import signal, subprocess, sys, time
print("as far as it came", flush=True)
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
time.sleep(300)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`gpu.main` with steps of Python code, each with its limit: (exit status, summary, log)."""
    monkeypatch.setenv("OUT", str(tmp_path))

    def run(steps, *arguments):
        made = [gpu.Step(name, limit, ("-c", code)) for name, limit, code in steps]
        monkeypatch.setattr(gpu, "steps", lambda out: made)
        status = gpu.main(["--out", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "summary.json").read_text()), (tmp_path / "log.txt").read_text()

    return run


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_fails_or_hangs_keeps_none_of_the_others_from_running(run, capfd):
    start = time.monotonic()
    status, summary, log = run(
        [("fails", 20, "print('before'); raise SystemExit('no GPU')"), ("hangs", 7, HANGS), ("passes", 20, "print('\\nlast\\n')")]
    )
    assert status == 1 and [row["step"] for row in summary] == ["fails", "hangs", "passes"]
    failed, hung, passed = summary
    assert (failed["exit"], failed["reason"], failed["last_line"]) == (1, None, "no GPU")
    assert hung["exit"] != 0 and "cut after its limit" in hung["reason"]
    assert (passed["exit"], passed["reason"], passed["last_line"]) == (0, None, "last")
    assert "before" in log and "as far as it came" in log and capfd.readouterr().out == log
    (child,) = (line for line in log.splitlines() if line.isdecimal())
    assert not alive(int(child)), "what it started is still there"
    assert time.monotonic() - start < 60


def test_all_that_pass_are_a_success(run):
    assert run([("one", 20, ""), ("two", 20, "")])[0] == 0


@pytest.fixture
def in_the_background():
    """A shell has what it starts there ignore interrupts, and what that starts inherits it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_cut_step_is_a_failure_whatever_its_exit_status(run, in_the_background):
    patient = "import time\ntry: time.sleep(300)\nexcept KeyboardInterrupt: print('12 passed', flush=True)"
    status, (row,), _ = run([("tests", 11, patient)], "--budget", "11")
    assert row["exit"] == 0 and row["last_line"] == "12 passed" and row["reason"] and status == 1


def test_output_and_results_are_on_disk_as_soon_as_they_exist(run):
    looks = """
import json, os, pathlib, sys, time
print("a line", flush=True)
out = pathlib.Path(os.environ["OUT"])
deadline = time.monotonic() + 10
while "a line" not in (out / "log.txt").read_text().splitlines():
    if time.monotonic() > deadline: sys.exit("the log does not have it")
    time.sleep(0.05)
assert [row["step"] for row in json.loads((out / "summary.json").read_text())] == ["first"]
"""
    status, summary, log = run([("first", 20, "print('first')"), ("second", 30, looks)])
    assert status == 0, log


def test_what_a_budget_leaves_no_time_for_is_not_begun(run):
    steps = [("quick", 60, ""), ("slow", 60, "import time; time.sleep(300)"), ("late", 60, "print('begun')")]
    start = time.monotonic()
    status, (quick, slow, late), log = run(steps, "--budget", "9")
    assert time.monotonic() - start < 30 and status == 1
    assert quick["exit"] == 0 and "cut" in slow["reason"] and late["exit"] is None
    assert re.search(r"late not begun: of the budget of 9 s [0-5] s were left", log) and "\nbegun" not in log
    assert late["reason"] in log


def test_steps_are_chosen_in_their_order(run):
    steps = [(name, 20, f"print('{name} ran')") for name in ("build", "verify", "ops")]
    status, summary, log = run(steps, "--steps", "ops,build")
    assert status == 0 and [row["step"] for row in summary] == ["build", "ops"] and "verify ran" not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "ops,speed"], "'speed': the steps are build, compile, conformance"),
        (["--steps", ""], "'': the steps are build"),
        (["--budget", "soon"], "'soon' is not a number of seconds"),
        (["--budget", "0"], "'0' is not a number of seconds"),
    ],
)
def test_a_mistake_is_a_sentence(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_time_left_over_goes_to_the_next(monkeypatch, tmp_path):
    limits = []

    def ran(step, limit, log):
        limits.append(limit)
        clock[0] += {"build": 10, "verify": 100, "tests": 1}[step.name]
        return {"exit": 0}

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "run", ran)
    steps = [gpu.Step("build", 40, ()), gpu.Step("verify", 50, ()), gpu.Step("tests", 60, ())]
    gpu.run_all(steps, 160, None, tmp_path)
    assert limits == [50, 90, 50]  # the last, after one that took longer than its limit, no more than there is
    limits.clear()
    clock[0] = 0.0
    gpu.run_all(steps, 1000, None, tmp_path)
    assert limits == [80, 100, 120]  # and never more than twice its own


def test_a_benchmark_is_told_what_it_may_spend(monkeypatch, tmp_path):
    code = "import sys; print('may spend', sys.argv[1])"
    for limit, budget in ((90, "75"), (30, "15"), (8, "1")):
        with (tmp_path / "log.txt").open("w") as log:
            row = gpu.run(gpu.Step("ops", 90, ("-c", code, "SECONDS")), limit, log)
        assert row["last_line"] == f"may spend {budget}"


def test_at_most_eight_files_are_left(run, tmp_path):
    (tmp_path / "mine.png").touch()
    os.utime(tmp_path / "mine.png", (0, 0))
    writes = """
import os, pathlib
folder = pathlib.Path(os.environ["OUT"]) / "h100"
folder.mkdir(exist_ok=True)
for name in ("ops.json", "masks.json", "models.json", *(f"{n}.png" for n in range(9))): (folder / name).write_text(name)
"""
    assert run([("models", 20, writes)])[0] == 0
    mine, *found = sorted((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.name != "mine.png")
    assert mine.name == "mine.png" and len(found) <= gpu.MOST_FILES == 8
    assert {"ops.json", "masks.json", "models.json"} <= {path.name for path in found}
    with zipfile.ZipFile(tmp_path / "pictures.zip") as archive:
        held = {name: archive.read(name).decode() for name in archive.namelist()}
    assert held == {f"h100/{n}.png": f"{n}.png" for n in range(9)}


def test_limits_and_order(tmp_path):
    steps = gpu.steps(tmp_path)
    names = [step.name for step in steps]
    assert names == ["build", "compile", "conformance", "verify", "ops", "models", "tests", "tune", "training", "masks"]
    assert sum(step.limit for step in steps) <= gpu.BUDGET < 9 * 60
    assert all(step.limit > gpu.START + gpu.GRACE for step in steps)
    for step in steps:
        kind, target = step.arguments[:2] if step.arguments[0] == "-m" else ("file", step.arguments[0])
        path = target.replace(".", "/")
        assert target == "pytest" or any((ROOT / p).exists() for p in (target, f"{path}.py", f"{path}/__main__.py")), kind


def test_no_gpu_test_is_in_a_file_that_is_left_out():
    paths = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "emulator"}
    others = sorted(paths - set(gpu.gpu_tests()))
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-m", "gpu", "--collect-only", *others]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 5 and "::" not in done.stdout, done.stdout[-3000:]  # no tests collected
    assert 10 < len(gpu.gpu_tests()) < len(others)
