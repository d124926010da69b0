"""Libraries with the emulator in them, built once: the kernels of csrc, and those with seeded bugs."""

from pathlib import Path

import pytest
from emulated import Emulated

from fastattn.kernels.cuda import emulator


def skip_where_there_is_no_emulator():
    problems = emulator.problems()
    if problems:
        pytest.skip("; ".join(problems))


@pytest.fixture(scope="session")
def kernels():
    skip_where_there_is_no_emulator()
    return Emulated(emulator.build())


@pytest.fixture(scope="session")
def bugs(tmp_path_factory):
    skip_where_there_is_no_emulator()
    folder = tmp_path_factory.mktemp("bugs")
    emulator.csrc_build().emulated(folder / "bugs.so", [Path(__file__).with_name("bugs.cu")], folder)
    return Emulated(folder / "bugs.so")
