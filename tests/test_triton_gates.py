"""What the compiled Triton kernels hold, seen ahead of time: registers, spills, tensor cores, number of variants."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that one block may have


def compiled(mode):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def variants():
    return compiled("gates")


def check(variants, holds):
    wrong = [v for v in variants if not holds(v)]
    assert variants and not wrong, "\n".join(map(str, wrong))


# bytes of stack that a variant may spill, at most 64, each with its reason
SPILLS = {
    # 255 registers hold both accumulators and the tiles of K and V; smaller tiles cost more than the two stores outside the loop
    ("attention_dkdv_kernel", 64): 8,
}


@pytest.mark.slow
def test_no_spills(variants):
    check(variants, lambda v: v["stack"] <= SPILLS.get((v["kernel"], v["D"]), 0))


@pytest.mark.slow
def test_shared_memory_fits(variants):
    check(variants, lambda v: v["shared"] <= SHARED[v["sm"]])


@pytest.mark.slow
def test_half_precision_runs_on_tensor_cores_with_wide_loads(variants):
    half = [v for v in variants if v["dtype"] != "float32"]
    check(half, lambda v: v["hmma"] + v["hgmma"] > 0 and v["narrow"] == 0)
    check([v for v in half if v["sm"] == 90 and v["block_m"] >= 64], lambda v: v["hgmma"] > 0)


@pytest.mark.slow
def test_fp32_is_ieee(variants):
    check([v for v in variants if v["dtype"] == "float32"], lambda v: v["tf32"] == 0 and v["hmma"] + v["hgmma"] == 0)


@pytest.mark.slow
def test_thirty_lengths_compile_at_most_two_variants():
    counts = compiled("lengths")
    assert len(counts) == 3 and all(1 <= n <= 2 for n in counts.values()), counts
