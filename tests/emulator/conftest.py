"""Libraries with the emulator in them, built once: the primitives, and kernels with seeded bugs."""

from pathlib import Path

import pytest
from emulated import Emulated

from fastattn.kernels.cuda import emulator


def emulated(source, folder):
    problems = emulator.problems()
    if problems:
        pytest.skip("; ".join(problems))
    emulator.csrc_build().emulated(folder / "library.so", folder, [Path(__file__).with_name(source)])
    return Emulated(folder / "library.so")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return emulated("conformance.cu", tmp_path_factory.mktemp("conformance"))


@pytest.fixture(scope="session")
def bugs(tmp_path_factory):
    return emulated("bugs.cu", tmp_path_factory.mktemp("bugs"))
