"""What both tests of the primitives need: their list, and a call of one on words per lane, in the emulator or on a GPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
from emulated import READ, WRITE, Emulated

CONFORMANCE = Path(__file__).with_name("conformance.cu")
NAMES = re.findall(r'^    entry<.*>\("(.*)"\),$', CONFORMANCE.read_text(), re.MULTILINE)


def sizes(library: ctypes.CDLL) -> dict[str, tuple[int, int]]:
    """Words in and out of a block, by primitive."""
    library.fastattn_conformance_primitives.restype = ctypes.c_char_p
    lines = library.fastattn_conformance_primitives().decode().splitlines()
    return {name: (int(read) // 4, int(written) // 4) for name, read, written in (line.rsplit(" ", 2) for line in lines)}


def call(library: ctypes.CDLL, primitive: str, source: int, words_in: int, target: int, words_out: int, stream: int = 0) -> None:
    """Run a primitive on the words at address `source`; its results go to `target`."""
    function = library.fastattn_conformance
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p, ctypes.c_size_t] * 2, ctypes.c_size_t]
    error = function(primitive.encode(), source, 4 * words_in, target, 4 * words_out, stream)
    assert error is None, error.decode()


def emulate(kernels: Emulated, primitive: str, words: np.ndarray) -> np.ndarray:
    """Results (blocks, threads, words) of a primitive on inputs of the same form."""
    blocks, threads, _ = words.shape
    read, written = sizes(kernels.library)[primitive]
    assert words[0].size == read and words.dtype == np.uint32
    words = np.ascontiguousarray(words)
    results = np.empty((blocks, threads, written // threads), np.uint32)
    kernels.watch("words", words, READ)
    kernels.watch("results", results, WRITE)
    call(kernels.library, primitive, words.ctypes.data, words.size, results.ctypes.data, results.size)
    assert kernels.finish() == []
    return results
