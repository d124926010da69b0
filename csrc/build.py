"""Compile the C++ sources for CPUs, and the CUDA C++ sources: by nvcc for GPUs, or by g++ together with the emulator.

All are ninja builds, the latter two of the same files; `setup.py` makes what is installed. Only the standard library is used, and
pybind11's and Python's headers: no torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
MODULE = (*sorted(CSRC.glob("*/*.cu")), CSRC / "bindings.cpp")  # the sources of the Python module `_cuda`
CPU = tuple(sorted((CSRC / "cpu").glob("*.cpp")))  # and of `_cpu`
EMULATOR = tuple(sorted((CSRC / "emulator").glob("*.cpp")))
ARCHS = ("80", "90")  # sm_80's code also runs on 86 and 89; the PTX of the last one is for what comes after it
CUDA_FLAGS = ("-std=c++17", "-O3", "-lineinfo", f"-I{CSRC}", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# without the builtins, copies of a constant size are calls that the emulator sees, as it sees loads and stores
EMULATED_FLAGS = ("-O1", "-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset")


class BuildError(RuntimeError):
    """A compiler or ninja is missing, or refused; the message holds what it said."""


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def nvcc_problem(archs: Sequence[str] = ARCHS) -> str | None:
    """Why CUDA code cannot be compiled here, found by compiling an empty kernel: nvcc may lack a host compiler, or be too old."""
    compiler = nvcc()
    if compiler is None:
        return "nvcc was not found: set CUDA_HOME or PATH"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("__global__ void empty() {}\n")
        return _failure([compiler, *CUDA_FLAGS, *_codes(archs), "-c", str(source), "-o", str(source.with_suffix(".o"))], folder)


def nvcc_version() -> str:
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


def cuda(output: Path, folder: Path, archs: Sequence[str] = ARCHS, sources: Sequence[Path] = MODULE) -> None:
    """Build `output`, a shared library with kernels for `archs`, like "80" or "90a"; objects are kept in `folder`."""
    rules = {
        ".cu": f"{nvcc()} {' '.join((*CUDA_FLAGS, *_codes(archs)))} -MD -MF $out.d -c $in -o $out",
        ".cpp": f"g++ -std=c++17 -O2 -fPIC -fvisibility=hidden {_includes()} -MD -MF $out.d -c $in -o $out",
        "link": f"{nvcc()} -shared -cudart static -Xcompiler -fPIC $in -o $out",
    }
    _ninja(output, sources, folder, rules)


def cpu(output: Path, folder: Path, sources: Sequence[Path] = CPU) -> None:
    """Build `output`, a shared library that any processor of this kind runs; in a process its threads are PyTorch's, by the one
    OpenMP that is loaded."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler was found: set CXX or PATH")
    rules = {
        ".cpp": f"{compiler} -std=c++17 -O3 -fopenmp -fPIC -fvisibility=hidden {_includes()} -MD -MF $out.d -c $in -o $out",
        "link": f"{compiler} -shared -fopenmp $in -o $out",
    }
    _ninja(output, sources, folder, rules)


def emulated(output: Path, folder: Path, sources: Sequence[Path] = MODULE) -> None:
    """Build `output`, a shared library of `sources` and the emulator.

    Kernels are compiled with the thread sanitizer's instrumentation and linked without its runtime: the functions that are called
    then are the emulator's, which so sees every load and store.
    """
    flags = f"-std=c++17 -g -fPIC -fvisibility=hidden -I{CSRC}"
    rules = {
        ".cu": f"g++ {flags} {' '.join(EMULATED_FLAGS)} -MD -MF $out.d -x c++ -c $in -o $out",
        ".cpp": f"g++ {flags} -O2 {_includes()} -MD -MF $out.d -c $in -o $out",
        "link": "g++ -shared $in -o $out",
    }
    _ninja(output, (*sources, *EMULATOR), folder, rules)


def _codes(archs: Sequence[str]) -> list[str]:
    """What nvcc is to generate: machine code for each of `archs`, and the last one's PTX."""
    newest = archs[-1].rstrip("af")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def _includes() -> str:
    python = sysconfig.get_path("include")
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        return f"-I{python}"
    return f"-I{python} -I{Path(spec.origin).parent / 'include'}"


def _ninja(output: Path, sources: Sequence[Path], folder: Path, rules: dict[str, str]) -> None:
    """Write build.ninja for one object per source and one library of them, and run it."""
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ["ninja_required_version = 1.3"]
    for name, command in rules.items():
        lines += [f"rule {name.strip('.')}", f"  command = {command}"]
        lines += [] if name == "link" else ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sources:
        objects.append(_escaped(folder / f"{source.parent.name}_{source.name}.o"))
        lines.append(f"build {objects[-1]}: {source.suffix.strip('.')} {_escaped(source)}")
    lines.append(f"build {_escaped(output)}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [_ninja_program(), "-C", str(folder)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    problem = _failure(command, folder)
    if problem is not None:
        raise BuildError(problem)


def _ninja_program() -> str:
    spec = importlib.util.find_spec("ninja")  # the package's program is not on PATH where an environment is not activated
    if spec is not None and spec.origin is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found: pip install ninja")
    return found


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _failure(command: list[str], folder: Path | str) -> str | None:
    """What a failed command said, or None if it succeeded."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"{' '.join(command)}: {(done.stdout + done.stderr).strip()[-4000:]}"
