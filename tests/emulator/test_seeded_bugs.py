"""The emulator must fail on wrong kernels: each seeded bug is reported by its checker at its line, the correction is not."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from emulated import READ, READ_AND_WRITE, WRITE, WRITE_SOME, Emulated

pytestmark = [pytest.mark.emulator, pytest.mark.xdist_group("bugs")]  # a library of their own, compiled once

SOURCE = Path(__file__).with_name("bugs.cu")
THREADS, INPUTS, ROW, STRIDE = 64, 70, 8, 12

KINDS = {
    "out_of_bounds_read": "out of bounds",
    "wild_read": "out of bounds",
    "wild_write": "out of bounds",
    "write_into_gap": "out of bounds",
    "memcpy_past_end": "out of bounds",
    "write_to_input": "read-only",
    "write_to_host_variable": "out of bounds",
    "write_to_constant": "out of bounds",
    "beyond_shared_memory": "out of bounds",
    "uninitialised_shared": "uninitialised read",
    "uninitialised_output": "uninitialised read",
    "unwritten_output": "unwritten output",
    "read_after_write": "race",
    "write_after_read": "race",
    "write_after_write": "race",
    "missing_warp_barrier": "race",
    "ldmatrix_without_barrier": "race",
    "write_after_ldmatrix": "race",
    "write_after_two_reads": "race",
    "copy_read_too_early": "in flight",
    "copy_written_over": "in flight",
    "copy_never_waited_for": "in flight",
    "copy_into_what_others_read": "race",
    "copy_past_end": "out of bounds",
    "divergent_shuffle": "divergent",
    "divergent_block_barrier": "divergent",
    "lanes_have_left": "divergent",
    "lanes_left_before": "divergent",
    "deadlock": "deadlock",
    "misaligned_load": "misaligned",
    "misaligned_store": "misaligned",
    "misaligned_scalar": "misaligned",
    "misaligned_row": "misaligned",
    "misaligned_copy": "misaligned",
    "barrier_thread_count": "barrier",
    "barrier_number": "barrier",
    "barrier_arrived_at_twice": "barrier",
    "barrier_left_incomplete": "barrier",
    "pipeline_overruns": "race",
    "arrival_does_not_wait": "race",
    "blocks_overlap": "race",
    "warp_leaves_early": "race",
}


def run(bugs, name, bug, threads=THREADS, access=WRITE):
    """The reports of one launch."""
    rows = np.full((ROW, STRIDE), 0xFFFFFFFF, np.uint32)
    output = rows[:, :ROW]
    values = np.arange(INPUTS, dtype=np.uint32)
    bugs.watch("input", values, READ)
    bugs.watch("output", output, access)
    bugs.library.run.restype = ctypes.c_char_p
    error = bugs.library.run(
        name.encode(), bug, values.ctypes.data_as(ctypes.c_void_p), output.ctypes.data_as(ctypes.c_void_p), threads
    )
    if error is not None:
        raise ValueError(error.decode())
    return bugs.finish()


def place_of(name):
    """File and line that are marked with a kernel's name."""
    marked = [
        f"{path}:{number}"
        for path in SOURCE.parent.glob("bugs_*.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.rstrip().endswith(f"// {name}")
    ]
    assert len(marked) == 1
    return marked[0]


@pytest.mark.parametrize("name", KINDS)
def test_bug_is_reported(bugs, name):
    reports = run(bugs, name, True)
    if name == "unwritten_output":
        assert reports == ["unwritten output: 1 elements of 'output' are never written, the first at (5, 2)"]
        return
    place = f"{place_of(name)} (kernel {name}, block "
    assert any(report.startswith(f"{KINDS[name]}: ") and place in report for report in reports), reports


@pytest.mark.parametrize("name", KINDS)
def test_correction_is_not_reported(bugs, name):
    assert run(bugs, name, False) == []


def test_every_kernel_is_tested(bugs):
    entries = re.findall(r"\bENTRY\((\w+), \d\)", SOURCE.read_text())
    assert entries == list(KINDS)


def test_message_says_what_where_and_how_often(bugs):
    race = run(bugs, "missing_warp_barrier", True)
    assert race[0] == (
        f"race: byte 120 of shared memory is read after thread 30 wrote it, with no barrier between, "
        f"at {place_of('missing_warp_barrier')} (kernel missing_warp_barrier, block 0, thread 31; 64 times)"
    )


def test_out_of_bounds_says_of_what_and_by_how_much(bugs):
    assert "reads 4 bytes, up to 4 bytes past the end of 'input'" in run(bugs, "out_of_bounds_read", True)[0]
    assert "in a gap between the elements of 'output'" in run(bugs, "write_into_gap", True)[0]
    assert "which is in no tensor" in run(bugs, "wild_read", True)[0]


def test_a_session_ends_with_its_reports(bugs):
    assert run(bugs, "deadlock", True)
    assert run(bugs, "deadlock", False) == [] and bugs.finish() == []


def test_nothing_runs_after_a_launch_that_was_abandoned(bugs):
    """Later kernels of the session would only repeat what the first has spoilt; their outputs are not missed either."""
    values, output = np.zeros(INPUTS, np.uint32), np.zeros((ROW, STRIDE), np.uint32)
    bugs.watch("input", values, READ)
    bugs.watch("output", output[:, :ROW], WRITE)
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (values, output)]
    for name, bug in (("wild_write", 1), ("read_after_write", 1)):
        bugs.library.run(name.encode(), bug, *pointers, THREADS)
    reports = bugs.finish()
    assert len(reports) == 1 and "kernel wild_write" in reports[0]


def test_a_buffer_that_is_read_and_written_need_not_be_written(bugs):
    assert run(bugs, "unwritten_output", True, access=READ_AND_WRITE) == []
    assert run(bugs, "uninitialised_output", True, access=READ_AND_WRITE) == []


def test_an_output_that_may_be_written_in_part_is_read_only_where_it_was_written(bugs):
    assert run(bugs, "unwritten_output", True, access=WRITE_SOME) == []
    assert any(report.startswith("uninitialised read: ") for report in run(bugs, "uninitialised_output", True, access=WRITE_SOME))


def test_views_that_share_memory(bugs):
    """As q, k and v of one projection do: what one view does not hold another may."""
    rows = np.zeros((ROW, STRIDE), np.uint32)
    values = np.arange(INPUTS, dtype=np.uint32)
    bugs.watch("input", values, READ)
    bugs.watch("left", rows[:, :3], WRITE)
    bugs.watch("middle", rows[:, 3:5], WRITE)
    bugs.watch("right", rows[:, 5:ROW], WRITE)
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (values, rows)]
    bugs.library.run(b"unwritten_output", 1, *pointers, THREADS)
    assert bugs.finish() == ["unwritten output: 1 elements of 'left' are never written, the first at (5, 2)"]
    assert (rows[:, :ROW].ravel() == np.where(np.arange(THREADS) == 42, 0, values[:THREADS])).all()


def test_empty_views_and_absent_buffers_are_not_watched(bugs):
    bugs.watch("empty", np.zeros((3, 0), np.float32), WRITE)
    bugs.library.fastattn_emulator_watch(b"absent", None, 4, 0, None, None, WRITE)
    assert bugs.finish() == []


def test_a_view_that_cannot_be_watched_is_reported(bugs):
    bugs.watch("backwards", np.zeros(8, np.float32)[::-1], READ)
    assert bugs.finish()[0].startswith("misuse: 'backwards' is watched with a negative size or stride")


def test_a_view_with_gaps_of_gigabytes_takes_little_memory(bugs):
    """Sizes and strides of a view that nothing accesses, so that its memory need not be there."""
    sizes, strides = (ctypes.c_int64 * 2)(4, 3), (ctypes.c_int64 * 2)(2**31, 1)
    bugs.library.fastattn_emulator_watch(b"sparse", 4096, 2, 2, sizes, strides, WRITE)
    assert bugs.finish() == ["unwritten output: 12 elements of 'sparse' are never written, the first at (0, 0)"]


@pytest.mark.parametrize(("threads", "why"), [(0, "1 to 1024"), (33, "multiple of 32"), (1056, "1 to 1024")])
def test_a_launch_that_cannot_be_is_refused(bugs: Emulated, threads, why):
    with pytest.raises(ValueError, match=why):
        run(bugs, "deadlock", False, threads)
    bugs.finish()
