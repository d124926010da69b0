"""How the CUDA kernels are built, loaded and launched, without a GPU and in the emulator, and what they say where they cannot."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import CUDA

import fastattn
from fastattn.kernels.cuda import emulator, library
from fastattn.ops.attention_plans import AttentionProblem

ROOT = Path(__file__).parent.parent
BUILT = importlib.util.find_spec("fastattn._cuda") is not None
built = pytest.mark.skipif(not BUILT, reason="the CUDA kernels are not built here")


def run(code, **environment):
    """The output of a program in an interpreter of its own; a variable set to None is removed."""
    changed = {**os.environ, **environment}
    changed = {name: value for name, value in changed.items() if value is not None}
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=300, env=changed, cwd=ROOT)


@built
def test_module_needs_no_driver_and_holds_at_most_40_kernels():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone._cuda", {library.module().__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(len(module.kernels), "torch" in sys.modules)
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    count, torch_loaded = done.stdout.split()
    assert 1 <= int(count) <= 40 and torch_loaded == "False"


@built
def test_module_links_no_cuda_library():
    needed = subprocess.run(["ldd", library.module().__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libtorch" not in needed


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a driver, the launch would be made")
def test_failed_launch_raises_with_the_kernel_s_name():
    request = library.module().ActivationBackward(dy_row=0, F=1, activation=0, sums=False, bfloat16=False, vectors=False)
    with pytest.raises(RuntimeError, match="activation_backward_kernel<Half>: .*driver"):
        request.launch(0, 1, 1, 0)


@built
def test_record_says_what_was_built():
    record = library.build_record()
    assert record["cuda"] is True and record["reason"] is None
    assert re.fullmatch(r"\d+\.\d+", record["nvcc"]) and record["archs"]


def build(tmp_path, **environment):
    """Run setup.py's build into a folder of its own, with no nvcc to be found."""
    nowhere = str(tmp_path / "nowhere")
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return run(command, CUDA_HOME=nowhere, **environment), tmp_path / "lib" / "fastattn" / "_build.json"


def test_without_nvcc_one_line_says_so_and_the_build_goes_on(tmp_path):
    done, record = build(tmp_path, FASTATTN_CUDA=None)
    assert done.returncode == 0, done.stderr
    assert "no CUDA kernels are built (nvcc was not found" in done.stdout
    found = json.loads(record.read_text())
    assert found["cuda"] is False and "nvcc was not found" in found["reason"] and found["archs"] == []


def test_kernels_can_be_declined_and_demanded(tmp_path):
    done, record = build(tmp_path / "0", FASTATTN_CUDA="0")
    assert done.returncode == 0 and json.loads(record.read_text())["reason"] == "FASTATTN_CUDA=0"
    done, record = build(tmp_path / "1", FASTATTN_CUDA="1")
    assert done.returncode != 0 and "FASTATTN_CUDA=1, but nvcc was not found" in done.stderr and not record.exists()
    done, _ = build(tmp_path / "2", FASTATTN_CUDA="2")
    assert done.returncode != 0 and "FASTATTN_CUDA must be auto, 0 or 1; got '2'" in done.stderr


def test_nvcc_that_cannot_compile_is_no_compiler(tmp_path):
    """nvcc may be there and its host compiler missing: what counts is an empty kernel."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'Failed to preprocess host compiler properties' >&2\nexit 1\n")
    compiler.chmod(0o755)
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = run(command, CUDA_HOME=str(tmp_path), FASTATTN_CUDA=None)
    assert done.returncode == 0 and "Failed to preprocess host compiler properties" in done.stdout


@built
@pytest.mark.parametrize(("archs", "words"), [("12", "compute_12"), (" ; ", "FASTATTN_CUDA_ARCHS names no architecture")])
def test_architectures_that_nvcc_does_not_know(tmp_path, archs, words):
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = run(command, FASTATTN_CUDA="1", FASTATTN_CUDA_ARCHS=archs)
    assert done.returncode != 0 and words in done.stderr
    done = run(command, FASTATTN_CUDA="auto", FASTATTN_CUDA_ARCHS=archs)
    assert done.returncode == 0 and words in done.stdout


def problem(**changes):
    request = {"device": "cpu", "dtype": torch.float16, "B": 1, "H": 1, "M": 8, "N": 8, "D": 64, "Hkv": 1, "Dv": 64}
    return AttentionProblem(**{**request, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "float32 is not served"),
        ({"D": 40}, "head dimension 40 is not 32, 64 or 128"),
        ({"Dv": 32}, "v has head dimension 32 and q 64"),
        ({"device": "meta"}, "tensors are on meta"),
        ({"M": 2**31}, "a size is beyond"),
    ],
)
def test_refusals_name_their_reason(changes, words):
    from fastattn.kernels.cuda.attention import unsupported

    assert any(words in reason for reason in unsupported(problem(**changes)))


def test_emulator_is_asked_for_by_name_only(monkeypatch):
    q = torch.zeros(1, 1, 4, 64, dtype=torch.float16)
    assert fastattn.explain(q, q, q).backend == "cpu"
    monkeypatch.setenv("FASTATTN_EMULATE", "0")
    assert library.problems("cpu") == ["tensors are on cpu, and FASTATTN_EMULATE=1 is not set"]


def test_emulator_needs_a_checkout_and_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_EMULATE", "1")
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    assert "g++, which was not found" in library.problems("cpu")[0]
    monkeypatch.setattr(emulator, "ROOT", tmp_path)
    assert "built from a checkout" in library.problems("cpu")[0]


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be damaged by what this does")
def test_emulator_s_findings_are_raised(backend):
    """A launch that is told of more rows than there are."""
    dy, sums = torch.zeros(3, 8, dtype=torch.float16), torch.zeros(1, 8)
    request = emulator.module().ActivationBackward(dy_row=8, F=8, activation=0, sums=True, bfloat16=False, vectors=True)
    kernel = library.Kernel("activation_backward", request, dy.device, ("dy", "sums"), ("sums",))
    with pytest.raises(emulator.EmulatorError, match="activation_backward: (.|\n)*out of bounds.*(dy|vectors.cuh)"):
        library.launch(kernel, [dy, sums], 4, 1)
    library.launch(kernel, [dy, sums], 3, 1)
    with pytest.raises(TypeError, match="takes 4 integers and 1 more, got 4 in all"):
        library.launch(kernel, [dy, sums], 3)
    with pytest.raises(emulator.EmulatorError, match="unwritten output"):
        library.launch(kernel._replace(written=("dy", "sums")), [dy, sums], 3, 1)


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [torch.device("cuda", 1)])])
def test_launch_goes_to_the_device_and_the_stream_of_its_tensors(monkeypatch, current, entered):
    """With PyTorch's guard where another device is current; no GPU is asked."""
    guards, launches = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: guards.append(device) or nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    request = SimpleNamespace(launch=lambda *integers: launches.append(integers))
    kernel = library.Kernel("kernel", request, torch.device("cuda", 1), ("out",), ("out",))
    out = torch.zeros(1)
    library.launch(kernel, [out], 3)
    assert guards == entered and launches == [(out.data_ptr(), 3, 71)]


@built
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="capture needs a GPU")
def test_first_launch_inside_a_capture_raises():
    code = """
import torch, fastattn
q = torch.zeros(1, 1, 8, 64, dtype=torch.float16, device="cuda")
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        fastattn.attention(q, q, q, backend="cuda")
except RuntimeError as error:
    print(error)
"""
    words = "attention_forward_resident_kernel<Half, 64, 128>: the first launch on a device cannot be captured"
    assert words in run(["-c", code]).stdout


def test_only_ptx_cuh_knows_of_the_emulator():
    """Kernels are one source: no other file asks which compiler reads it."""
    csrc = ROOT / "csrc"
    sources = [
        path for path in csrc.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp") and path.parent != csrc / "emulator"
    ]
    question = re.compile(r"^\s*#\s*(?:el)?if.*(?:__CUDA|__SANITIZE|EMULAT)", re.MULTILINE)
    asking = [path.name for path in sources if question.search(path.read_text())]
    assert len(sources) > 5 and asking == ["ptx.cuh"]
    assert not [path.name for path in sources if re.search(r"\basm\b", path.read_text()) and path.name != "ptx.cuh"]
