"""What a user gets: import arrows, imports without triton, an sdist and a wheel that hold everything."""

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastattn"


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_is_light():
    loaded = run("import sys, fastattn; print(*(m for m in ('triton', 'transformers', 'sklearn') if m in sys.modules))")
    assert loaded == ""


def test_works_with_triton_blocked():
    code = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Block())
import torch, fastattn
q = torch.randn(1, 2, 5, 16, requires_grad=True)
fastattn.attention(q, q, q, fastattn.masks.causal()).sum().backward()
print(fastattn.explain(q, q, q).rejected["triton"])
"""
    assert "triton is not installed" in run(code)


def imported(path):
    """The modules of fastattn that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastattn"):
            names |= {node.module} if node.module != "fastattn" else {f"fastattn.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("fastattn")}
    return names


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ("lowering.py", ()),
        ("packing.py", ()),
        ("terms.py", ("packing",)),
        ("masks.py", ("lowering", "packing", "terms")),
        ("activations.py", ()),
        ("dropout.py", ("lowering",)),
        ("biases.py", ("lowering", "masks", "packing")),
        ("kept.py", ()),
        ("watched.py", ()),
        ("graphs.py", ("kept", "watched")),
        ("batching.py", ()),
        ("plans.py", ("lowering",)),
        ("planned.py", ()),
        ("reference.py", ("lowering", "activations", "biases", "dropout")),
        ("ops/*.py", ("masks", "biases", "packing", "lowering", "planned", "plans", "activations", "dropout", "ops")),
        ("nn/*.py", ("masks", "biases", "packing", "planned", "activations", "dropout", "ops", "nn", "integrations.accelerate")),
        ("kernels/eager/*.py", ("lowering", "activations", "dropout", "reference")),
        ("kernels/cpu/*.py", ("lowering", "activations", "dropout", "reference", "kept", "kernels.cpu")),
        ("kernels/triton/*.py", ("lowering", "planned", "plans", "activations", "dropout", "kernels.triton")),
        ("kernels/cuda/*.py", ("lowering", "plans", "reference", "kernels.cuda")),
    ],
)
def test_imports_never_point_upwards(files, allowed):
    paths = list(PACKAGE.glob(files))
    assert paths
    for path in paths:
        for name in imported(path):
            tail = name.removeprefix("fastattn.")
            assert any(tail == a or tail.startswith(f"{a}.") for a in allowed), f"{path.name} imports {name}"


@pytest.mark.slow
def test_pins_suit_the_oldest_python():
    """A pin without a marker stands for every Python: what is installed by it tells whether it may."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    installed = {found.metadata["Name"].lower().replace("_", "-"): found for found in metadata.distributions()}
    unmarked = [(pin, installed.get(pin.name.lower().replace("_", "-"))) for pin in pins if pin.marker is None]
    told = [(pin, found) for pin, found in unmarked if found is not None and pin.specifier.contains(found.version)]
    wrong = [str(pin) for pin, found in told if not SpecifierSet(found.metadata["Requires-Python"] or "").contains("3.10.0")]
    assert told and not wrong


def test_sdist_and_wheel_are_complete(tmp_path):
    """Built with no compiler on PATH; the wheel imports, and answers, in a clean interpreter."""
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent), "CC": "false", "CXX": "false"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        archive.extractall(tmp_path / "wheel")
    tracked = subprocess.run(["git", "ls-files", "fastattn"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if name not in inside]
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    everything = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in everything if name not in names and not name.startswith(".")]
    code = (
        "import fastattn, torch; q = torch.ones(1, 1, 2, 16); print(fastattn.__file__, fastattn.attention(q, q, q).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "wheel")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    path, total = done.stdout.split()
    assert path.startswith(str(tmp_path)) and float(total) == 32.0
