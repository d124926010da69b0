"""Before two threads compute the first exp of a process, one has: Intel's library finds out the processor without a lock."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"

# The library's own function begins with `mov eax, [rip + offset]`: it returns the type of processor, -1 until that is known.
PROCESSOR = """
import ctypes, torch
begin = ctypes.cast(ctypes.CDLL(LIBRARY).mkl_vml_serv_cpu_detect, ctypes.c_void_p).value
opcode, offset = ctypes.string_at(begin, 2), ctypes.c_int32.from_address(begin + 2).value
assert opcode == bytes.fromhex("8b05"), opcode.hex()
processor = ctypes.c_int32.from_address(begin + 6 + offset)
"""


def known(code: str) -> list[bool]:
    """Whether the library knows the processor: after torch's import, and after `code`."""
    code = f"LIBRARY = {str(LIBRARY)!r}{PROCESSOR}print(processor.value != -1)\n{code}\nprint(processor.value != -1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line == "True" for line in done.stdout.split()]


def inside() -> bool:
    """Whether PyTorch's own library holds Intel's, as its wheels for x86 do."""
    return LIBRARY.exists() and hasattr(ctypes.CDLL(str(LIBRARY)), "mkl_vml_serv_cpu_detect")


@pytest.mark.skipif(not inside(), reason="PyTorch has no MKL inside")
def test_import_settles_the_processor_type():
    assert known("torch.randn(8, 8) @ torch.randn(8, 8)") == [False, False]  # what the check sees where nothing is settled
    assert known("import fastattn") == [False, True]
