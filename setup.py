"""Packaging is declared in pyproject.toml; here the compiled parts join it. It needs no torch, and no compiler unless asked.

What CPUs compute in C++ is built wherever there is a C++ compiler (CXX, else g++), and does without where there is none.
FASTATTN_CUDA: auto (default) builds them where nvcc works, 0 never, 1 always and fails where it cannot. FASTATTN_CUDA_ARCHS: the
architectures, "80;90" by default. MAX_JOBS: compilers at a time. What was decided is written to fastattn/_build.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402

RECORD = "_build.json"


class Build(build_ext):
    """Runs the ninja builds in place of setuptools' compilers."""

    record: dict

    def run(self) -> None:
        self.record = {}
        super().run()

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.record |= build_cpu(output) if extension.name == "fastattn._cpu" else build_cuda(output)
        (output.parent / RECORD).write_text(json.dumps(self.record, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib) / "fastattn" / RECORD, output.parent / RECORD)


def build_cpu(output: Path) -> dict:
    output.unlink(missing_ok=True)  # of an earlier build
    try:
        build.cpu(output, ROOT / "build" / f"cpu-{sys.implementation.cache_tag}")
    except build.BuildError as error:
        print(f"fastattn: nothing is built for CPUs ({error})")
        return {"cpu": False, "cpu_reason": str(error)}
    return {"cpu": True, "cpu_reason": None}


def build_cuda(output: Path) -> dict:
    """Raises RuntimeError where the kernels must be built and cannot."""
    archs = [arch.strip() for arch in os.environ.get("FASTATTN_CUDA_ARCHS", ";".join(build.ARCHS)).split(";") if arch.strip()]
    reason = refusal(archs)
    if reason is None:
        build.cuda(output, ROOT / "build" / f"cuda-{sys.implementation.cache_tag}-{'-'.join(archs)}", archs)
        return {"cuda": True, "reason": None, "nvcc": build.nvcc_version(), "archs": archs}
    output.unlink(missing_ok=True)
    print(f"fastattn: no CUDA kernels are built ({reason})")
    return {"cuda": False, "reason": reason, "nvcc": None, "archs": []}


def refusal(archs: list[str]) -> str | None:
    """Why the kernels are not to be built, or None. Raises RuntimeError where they must be built and cannot."""
    wish = os.environ.get("FASTATTN_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise RuntimeError(f"FASTATTN_CUDA must be auto, 0 or 1; got {wish!r}")
    if wish == "0":
        return "FASTATTN_CUDA=0"
    problem = build.nvcc_problem(archs) if archs else "FASTATTN_CUDA_ARCHS names no architecture"
    if problem is not None and wish == "1":
        raise RuntimeError(f"FASTATTN_CUDA=1, but {problem}")
    return problem


EXTENSIONS = [Extension(name, sources=[], optional=True) for name in ("fastattn._cuda", "fastattn._cpu")]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": Build})
