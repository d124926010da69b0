"""What the compiled kernels hold: gates.json is of the present sources, within limits, and what a sample compiles to now."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.xdist_group("gates"),  # `present` compiles for half a minute: once
]
MOST_SPILLED = 64  # bytes of stack

# Variants that spill, each with its reason: (kernel, dtype and case) -> bytes of stack at most.
SPILLS = {
    # two blocks of eight warps share a multiprocessor with 128 registers a thread: a little is stored once for 16 queries, and
    # more registers would leave a block fewer
    ("attention_forward_resident_kernel<Bfloat16, 64, 128>", ""): 8,
    ("attention_forward_resident_kernel<Half, 64, 128>", ""): 8,
    # 144 scores and the 64 registers of the accumulator: four values are stored once for 16 queries
    ("attention_forward_resident_kernel<Bfloat16, 128, 288>", ""): 16,
    ("attention_forward_resident_kernel<Half, 128, 288>", ""): 16,
    # all keys of a head, with both accumulators; at 168 registers the assembler keeps to a step of occupancy
    ("attention_backward_kernel", "float16 D=128 keys L=64"): 8,
    ("attention_backward_kernel", "float16 D=128 none L=64"): 8,
    ("attention_backward_kernel", "float16 D=32 causal_padding L=64"): 16,
    ("attention_backward_kernel", "float16 D=32 keys L=64"): 16,
    ("attention_backward_kernel", "float16 D=32 none L=64"): 8,
    ("attention_backward_kernel", "float16 D=64 keys L=128"): 16,
    # the places of listed tiles, at that step of occupancy
    ("attention_dkdv_kernel", "float16 D=32 bits"): 16,
    ("attention_dkdv_kernel", "float16 D=32 documents"): 16,
    ("attention_forward_kernel", "float16 D=80 bits"): 8,
    # an IEEE product takes its operands into registers; the next smaller tile is 16 rows
    ("attention_dkdv_kernel", "float32 D=128 bits"): 32,
    ("attention_dkdv_kernel", "float32 D=128 causal_padding"): 40,
    ("attention_dkdv_kernel", "float32 D=16 causal_padding"): 24,
    ("attention_dkdv_kernel", "float32 D=32 bits"): 8,
    ("attention_dq_kernel", "float32 D=16 causal_padding"): 8,
    ("attention_dq_kernel", "float32 D=32 bits"): 8,
    ("attention_dq_kernel", "float32 D=32 causal_padding"): 8,
    # where a packed sequence lies and how long it is are loaded into registers, while the numbers of a padded batch are read as
    # constants; every one of these stores and loads is outside of the loops over tiles
    ("attention_backward_kernel", "float16 D=128 keys L=64 packed=True"): 16,
    ("attention_backward_kernel", "float16 D=32 keys L=128 packed=True"): 32,
    ("attention_backward_kernel", "float16 D=64 keys L=128 packed=True"): 16,
    ("attention_dkdv_kernel", "float16 D=128 causal_padding packed=True"): 8,
    # bounds beside a prefix: the nearer of two bounds is kept for each key
    ("attention_backward_kernel", "float16 D=32 prefix L=64"): 8,
    ("attention_backward_kernel", "float16 D=64 prefix L=128"): 16,
    ("attention_backward_kernel", "float16 D=64 prefix L=64"): 24,
    # keys with holes, of which each tile loads a mask
    ("attention_dkdv_kernel", "float16 D=64 keys"): 48,
    ("attention_dkdv_kernel", "float16 D=64 keys L=256"): 48,
    # a tile of a bias or the words of dropout's bits, beside the two accumulators
    ("attention_backward_kernel", "bfloat16 D=64 padding L=128 extras=dropout"): 32,
    ("attention_dbias_kernel", "float32 D=128 padding extras=relative"): 8,
    ("attention_dkdv_kernel", "bfloat16 D=64 padding extras=pairs+dropout"): 8,
    ("attention_dkdv_kernel", "float16 D=128 padding extras=pairs+dropout"): 16,
    ("attention_dkdv_kernel", "float16 D=64 padding L=128 extras=row+dropout"): 24,
    ("attention_dkdv_kernel", "float16 D=64 padding extras=relative+dropout"): 16,
    ("attention_dkdv_kernel", "float32 D=128 padding extras=relative"): 24,
    ("attention_dkdv_kernel", "float32 D=32 padding extras=pairs+dropout"): 40,
    ("attention_dkdv_kernel", "float32 D=64 padding extras=pairs+dropout"): 32,
    ("attention_dq_kernel", "float32 D=32 padding extras=relative"): 8,
    ("attention_forward_kernel", "float16 D=32 padding extras=dropout"): 8,
    ("attention_forward_kernel", "float16 D=64 padding extras=relative+dropout"): 24,
    # the draw of dropout, beside a tile
    ("linear_dgrad_kernel", "bfloat16 gelu large dropout"): 40,
}


def program(name, *arguments):
    """What a program beside this file prints as JSON; it compiles, so nothing is interpreted there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def table():
    return json.loads(Path(__file__).with_name("gates.json").read_text())


@pytest.fixture(scope="module")
def present():
    """The sources' hashes, the compilers' versions and a sample of the variants, compiled now."""
    return program("gates.py", "sample")


@pytest.fixture(params=["table", "present"])
def rows(request):
    return request.getfixturevalue(request.param)["rows"]


def check(rows, holds):
    wrong = [row for row in rows if not holds(row)]
    assert rows and not wrong, "\n".join(map(str, wrong))


def key(row):
    return row["backend"], row["kernel"], row["case"], row["sm"]


@pytest.mark.slow
def test_table_is_of_the_present_sources(table, present):
    assert table["sources"] == present["sources"], "run `make gates`"


@pytest.mark.parametrize("sm", [80, 90])
def test_every_row_of_the_tables_of_tiles_is_compiled(sm):
    """Whatever a table says some variant of gates.json has, or nobody would know what it holds."""
    import aot

    from fastattn.kernels.triton import tuned
    from fastattn.kernels.triton.launch import GPU

    compiled = set()
    for dtype, _, launch in aot.launches(True, sm):
        arguments, config = launch.arguments, launch.config
        attention = "BLOCK_D" in arguments
        block = max(arguments["BLOCK_D"], arguments["BLOCK_DV"]) if attention else None
        listed = arguments["tiles"] is not None if attention else None
        compiled.add((launch.kernel.__name__[1:-7], tuned.dtype_class(dtype), block, listed, config))
    for row in tuned.shipped(GPU(sm)).tables[-1].rows:
        dtypes = [row.fields["dtype"]] if row.fields["dtype"] else ["half"]
        block, listed = row.fields.get("block_d"), row.fields.get("listed")
        if row.config is not None:
            assert {(row.kernel, dtype, block, listed, row.config) for dtype in dtypes} <= compiled, row


@pytest.mark.slow
def test_sample_is_as_the_table_says(table, present):
    recorded = {key(row): row for row in table["rows"]}
    assert len(recorded) == len(table["rows"]) and sum(row["backend"] == "triton" for row in present["rows"]) <= 60
    for row in present["rows"]:
        assert key(row) in recorded
        if present["compilers"][row["backend"]] == table["compilers"][row["backend"]]:
            assert row == recorded[key(row)]


@pytest.mark.slow
def test_recorded_spills_are_those_that_happen(table):
    assert set(SPILLS) == {(row["kernel"], row["case"]) for row in table["rows"] if row["stack"] > 0}


@pytest.mark.slow
def test_sample_holds_every_kernel(table, present):
    found = [{(row["backend"], row["kernel"]) for row in rows} for rows in (table["rows"], present["rows"])]
    compiled = {backend for backend, version in present["compilers"].items() if version}
    assert found[1] == {kernel for kernel in found[0] if kernel[0] in compiled}
    assert len({kernel for backend, kernel in found[0] if backend == "cuda"}) <= 40


@pytest.mark.slow
def test_no_sign_is_lost(rows):
    """ptxas 12.8, which Triton 3.6 and 3.7 come with, makes max(-x, y, z, 0) one instruction, which has no place for the sign."""
    check(rows, lambda row: row["clamped"] == 0)


@pytest.mark.slow
def test_no_spills(rows):
    def holds(row):
        allowed = SPILLS.get((row["kernel"], row["case"]), 0)
        return row["stack"] <= allowed and (allowed > 0 or row["local"] == 0)

    assert max(SPILLS.values()) <= MOST_SPILLED
    check(rows, holds)


@pytest.mark.slow
def test_dkdv_of_64_columns_has_company(rows):
    """On sm_90 blocks of twelve warps at least share a multiprocessor, and nothing is spilled. v of 128 columns takes more,
    as do a bias and the bits of dropout."""
    kernel = [row for row in rows if row["kernel"] == "attention_dkdv_kernel" and row["sm"] == 90 and "D=64" in row["case"]]
    half = [row for row in kernel if not any(name in row["case"] for name in ("float32", "Dv=128", "extras="))]
    check(half, lambda row: row["stack"] == 0 and row["occupancy"] * 64 >= 11.9)


@pytest.mark.slow
def test_a_block_fits(rows):
    """The longest sequences ask the single backward kernel for more than sm_89 has: there they get two kernels."""
    check(rows, lambda row: (row["occupancy"] > 0 and row["fits"]) or ("single" in row["kernel"] and row["sm"] == 89))


@pytest.mark.slow
def test_products_of_half_precision_run_on_tensor_cores(rows):
    half = [row for row in rows if row["multiplies"] and "float32" not in row["case"]]
    check(half, lambda row: row["hmma"] + row["hgmma"] > 0)
    triton = [row for row in half if row["backend"] == "triton" and row["sm"] == 90 and row["block_m"] >= 64]
    check(triton, lambda row: row["hgmma"] > 0)


@pytest.mark.slow
def test_half_precision_loads_16_bytes(rows):
    """Triton's variants are of aligned rows but for those that say `odd`; CUDA kernels hold both paths.

    Of the weight and the bias of 128 columns each of 128 threads has one element, as of a bias of attention with one row.
    """
    triton = [row for row in rows if row["backend"] == "triton" and not any(x in row["case"] for x in ("float32", "odd", "=row"))]
    one_each = {"norm_forward_kernel": 2, "norm_backward_kernel": 1}
    check(triton, lambda row: row["narrow"] == (one_each[row["kernel"]] if "width=128 " in row["case"] else 0))
    cuda = [row for row in rows if row["backend"] == "cuda" and row["multiplies"]]
    if cuda or shutil.which("nvcc"):
        check(cuda, lambda row: row["ldgsts"] > 0)


@pytest.mark.slow
def test_fp32_is_ieee(rows):
    single = [row for row in rows if "float32" in row["case"]]
    check(single, lambda row: row["tf32"] == 0 and row["hmma"] + row["hgmma"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "kernels"), [("padded", 13), ("packed", 6)])
def test_thirty_lengths_compile_at_most_two_variants(sequences, kernels):
    counts = program("aot.py", sequences)
    assert len(counts) == kernels and all(1 <= n <= 2 for n in counts.values()), counts
