"""What every compiled kernel holds, seen without a GPU: registers, spills, shared memory, tensor-core instructions, occupancy.

A program: `python tests/gates.py` (`make gates`) compiles every variant of the CUDA and Triton kernels for each architecture, in
minutes, and writes the table gates.json. With `sample` it reads the CUDA kernels that are built, compiles at most 60 variants of
the Triton kernels, and prints them. test_gates.py holds the table to the present sources and to limits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import aot
import sass
import triton

from fastattn.kernels.cuda import emulator, library

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("gates.json")
SOURCES = {
    "cuda": ("csrc/attention/*", "csrc/ffn/*", "csrc/common/*"),
    "triton": ("fastattn/kernels/triton/*.py", "fastattn/data/tiles/*.json", "fastattn/launches.py", "tests/aot.py"),
}
Row = dict[str, Any]


def source_hash(backend: str) -> str:
    """Of everything that a backend's rows depend on, but for the compiler."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES[backend] for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compilers() -> dict[str, str | None]:
    compiler = emulator.csrc_build()
    return {"cuda": compiler.nvcc_version() if compiler.nvcc() else None, "triton": triton.__version__}


def cuda_rows(sms: Iterable[int]) -> Iterator[Row]:
    """A row per CUDA kernel and architecture, compiled."""
    build = emulator.csrc_build()
    for source in sorted(path for pattern in SOURCES["cuda"] for path in ROOT.glob(f"{pattern}.cu")):
        for sm in sms:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernels.cubin"
                command = [build.nvcc(), *build.CUDA_FLAGS, f"-arch=sm_{sm}", "-cubin", source, "-o", cubin]
                subprocess.run(command, check=True)
                yield from _kernels(cubin, sm)


def built_rows() -> Iterator[Row]:
    """The same of the library that is built, for the architectures that it holds."""
    with tempfile.TemporaryDirectory() as folder:
        for cubin in sass.extract(Path(library.module().__file__), Path(folder)):
            yield from _kernels(cubin, int(cubin.stem.split("sm_")[1]))


def _kernels(cubin: Path, sm: int) -> Iterator[Row]:
    kernels = library.module().kernels
    for signature, held in sorted(sass.functions(cubin).items()):
        name = next(name for name in kernels if name in signature.replace("fastattn::", ""))
        row = _row("cuda", name, "", sm, *kernels[name], held)
        yield {**row, "multiplies": "activation" not in name}


def triton_rows(variants: Iterable[aot.Variant]) -> Iterator[Row]:
    """A row per variant of a Triton kernel."""
    for variant in variants:
        kernel = aot.compile_launch(variant.launch, variant.sm)
        threads = 32 * variant.launch.config.num_warps
        row = _row(
            "triton",
            variant.kernel,
            f"{variant.dtype} {variant.case}",
            variant.sm,
            threads,
            kernel.metadata.shared,
            aot.held(kernel),
        )
        yield {**row, "multiplies": variant.multiplies, "block_m": variant.launch.config.BLOCK_M}


def _row(backend: str, kernel: str, case: str, sm: int, threads: int, shared: int, held: dict[str, int]) -> Row:
    row = {"backend": backend, "kernel": kernel, "case": case, "sm": sm, "threads": threads, "shared": shared, **held}
    fits = shared <= sass.MULTIPROCESSORS[sm].block_shared
    return {**row, "fits": fits, "occupancy": sass.occupancy(sm, held["registers"], threads, shared)}


def head() -> dict[str, Any]:
    return {"sources": {backend: source_hash(backend) for backend in SOURCES}, "compilers": compilers()}


def sample() -> Iterator[Row]:
    """Every CUDA kernel where they are built, and at most 60 variants of Triton's, among them each kernel."""
    if emulator.csrc_build().nvcc():
        yield from built_rows()
    yield from triton_rows(aot.sampled())


def write_table() -> None:
    """A process for each core."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        cuda = pool.submit(_cuda_table)
        rows = []
        for row in pool.map(_shipped_row, range(len(_shipped())), chunksize=4):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)} variants", end="", file=sys.stderr)
    lines = ",\n  ".join(json.dumps(row) for row in (*cuda.result(), *rows))
    TABLE.write_text(json.dumps(head(), indent=1)[:-2] + ',\n "rows": [\n  ' + lines + "\n ]\n}\n")


def _cuda_table() -> list[Row]:
    return list(cuda_rows(aot.CAPABILITIES))


@functools.cache
def _shipped() -> list[aot.Variant]:
    return list(aot.shipped())


def _shipped_row(index: int) -> Row:
    return next(triton_rows([_shipped()[index]]))


if __name__ == "__main__":
    if sys.argv[1:] == ["sample"]:
        print(json.dumps({**head(), "rows": list(sample())}))
    else:
        write_table()
