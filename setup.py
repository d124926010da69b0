"""Packaging is declared in pyproject.toml; here the CUDA kernels join it. It needs no torch, and no compiler unless asked.

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


class BuildCuda(build_ext):
    """Runs the ninja build in place of setuptools' compilers."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        archs = [arch.strip() for arch in os.environ.get("FASTATTN_CUDA_ARCHS", ";".join(build.ARCHS)).split(";") if arch.strip()]
        reason = refusal(archs)
        if reason is None:
            tag = f"{sys.implementation.cache_tag}-{'-'.join(archs)}"
            build.cuda(output, ROOT / "build" / f"cuda-{tag}", archs)
            record = {"cuda": True, "reason": None, "nvcc": build.nvcc_version(), "archs": archs}
        else:
            output.unlink(missing_ok=True)  # of an earlier build
            print(f"fastattn: no CUDA kernels are built ({reason})")
            record = {"cuda": False, "reason": reason, "nvcc": None, "archs": []}
        (output.parent / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        output = Path(self.get_ext_fullpath("fastattn._cuda")).resolve()
        output.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib) / "fastattn" / RECORD, output.parent / RECORD)


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


setup(ext_modules=[Extension("fastattn._cuda", sources=[], optional=True)], cmdclass={"build_ext": BuildCuda})
