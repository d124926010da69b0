"""Read what compiled GPU code holds: registers, spills, instruction counts, and the occupancy that follows from them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = {
    "local": r"\b(?:LDL|STL)\b",  # spills
    "hmma": r"\bHMMA\b",
    "hgmma": r"\bHGMMA\b",
    "tf32": r"TF32",
    "narrow": r"\bLDG\.E\.U16\b",  # loads of 2 bytes from global memory
    "clamped": r"\bVIMNMX3\.RELU\b",  # max(x, y, z, 0)
    "ldgsts": r"\bLDGSTS\.E\.BYPASS\.128\b",  # asynchronous copies of 16 bytes
}


class Multiprocessor(NamedTuple):
    """What blocks share, from the CUDA C++ Programming Guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes; a block takes 1 KB more than it asks for
    block_shared: int  # bytes that one block may ask for


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024, 163 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024, 99 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
}
REGISTERS = 65536  # of a multiprocessor, given to warps in units of 256


def extract(library: Path, folder: Path) -> list[Path]:
    """Write the cubins of a shared library's kernels into `folder`: their paths, each ending in the architecture."""
    subprocess.run([TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
    return sorted(path for path in folder.glob("*.cubin") if not path.name.startswith(library.stem.split(".")[0]))


def functions(cubin: Path) -> dict[str, dict[str, int]]:
    """For each kernel of a cubin, by its demangled name: registers, stack (bytes), and how often each of COUNTED occurs."""
    usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
    found = {
        name: {"registers": int(registers), "stack": int(stack)}
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    sections = re.split(r"^\.text\.(\S+):$", _output(TOOLS / "nvdisasm", cubin), flags=re.MULTILINE)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        found[name].update({kind: len(re.findall(pattern, text)) for kind, pattern in COUNTED.items()})
    names = _output("c++filt", *found).splitlines()
    return dict(zip(names, found.values(), strict=True))


def occupancy(sm: int, registers: int, threads: int, shared: int) -> float:
    """The share of a multiprocessor's warps that can be resident, by registers, shared memory and blocks."""
    limits = MULTIPROCESSORS[sm]
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared // (shared + 1024)
    return round(min(by_registers, by_shared, limits.blocks, limits.warps // warps) * warps / limits.warps, 3)


def _output(program: Path | str, *arguments: Path | str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
