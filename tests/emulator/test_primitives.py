"""Each primitive in the emulator against its definition in the PTX ISA, written here in NumPy."""

import re
from pathlib import Path

import numpy as np
import primitives
import pytest
import torch

from fastattn.kernels.cuda import emulator

pytestmark = [pytest.mark.emulator, pytest.mark.xdist_group("primitives")]  # a library of their own, compiled once

BLOCKS = 20
LANES = np.arange(32)
GROUP, QUAD = LANES // 4, LANES % 4  # groupID and threadID_in_group of the PTX ISA


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def floats(x):
    return x.view(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def bfloat16_bits(x):
    """To nearest even, by PyTorch."""
    return torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


# Matrix products


def sixteen_bit_matrices(a, b, value):
    """A (16, 16) and B (16, 8) in fp64 from the registers a (32, 4) and b (32, 2) of m16n8k16."""
    A, B = np.empty((16, 16)), np.empty((16, 8))
    a, b = (np.ascontiguousarray(x).view(np.uint16) for x in (a, b))  # elements a0..a7 and b0..b3
    for i in range(8):
        row = GROUP if i < 2 or 4 <= i < 6 else GROUP + 8
        A[row, QUAD * 2 + i % 2 + (8 if i >= 4 else 0)] = value(a[:, i])
    for i in range(4):
        B[QUAD * 2 + i % 2 + (8 if i >= 2 else 0), GROUP] = value(b[:, i])
    return A, B


def first_halves(matrices):
    """What m16n8k8 multiplies: the first eight columns of A and rows of B."""
    A, B = matrices
    return A[:, :8], B[:8]


def tf32_matrices(a, b):
    """A (16, 8) and B (8, 8) from the registers of m16n8k8; the low 13 bits do not count."""
    A, B = np.empty((16, 8)), np.empty((8, 8))
    a, b = floats(a & ~np.uint32(0x1FFF)), floats(b & ~np.uint32(0x1FFF))
    for i in range(4):
        A[GROUP if i % 2 == 0 else GROUP + 8, QUAD if i < 2 else QUAD + 4] = a[:, i]
    for i in range(2):
        B[QUAD + 4 * i, GROUP] = b[:, i]
    return A, B


def accumulator(matrix):
    """The registers (32, 4) of a (16, 8) matrix."""
    columns = [matrix[GROUP if i < 2 else GROUP + 8, QUAD * 2 + i % 2] for i in range(4)]
    return np.stack(columns, 1)


def half_value(x):
    return x.view(np.float16)


def bfloat16_value(x):
    return floats(x.astype(np.uint32) << 16)


MMA = {
    "mma_m16n8k16<Half>": lambda a, b: sixteen_bit_matrices(a, b, half_value),
    "mma_m16n8k16<Bfloat16>": lambda a, b: sixteen_bit_matrices(a, b, bfloat16_value),
    "mma_m16n8k8<Half>": lambda a, b: first_halves(sixteen_bit_matrices(a, b, half_value)),
    "mma_m16n8k8<Bfloat16>": lambda a, b: first_halves(sixteen_bit_matrices(a, b, bfloat16_value)),
    "mma_m16n8k8_tf32": tf32_matrices,
}


def operand_words(rng, name, draw):
    """Registers a and b (BLOCKS, 32, 6) whose elements are draws, in the primitive's format."""
    if name == "mma_m16n8k8_tf32":
        return bits(draw((BLOCKS, 32, 6))) & ~np.uint32(0x1FFF) | rng.integers(0, 0x2000, (BLOCKS, 32, 6), dtype=np.uint32)
    elements = draw((BLOCKS, 32, 12))
    halves = elements.astype(np.float16).view(np.uint16) if "Half" in name else bfloat16_bits(elements)
    return halves.view(np.uint32)


@pytest.mark.parametrize("name", MMA)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "normal"])
def test_mma(kernels, rng, name, integers):
    """Exact on small integers; otherwise as near as 17 roundings in fp32 are."""
    draw = (lambda shape: rng.integers(-8, 9, shape).astype(np.float32)) if integers else rng.standard_normal
    ab, d = operand_words(rng, name, draw), draw((BLOCKS, 32, 4))
    actual = floats(primitives.emulate(kernels, name, np.concatenate([ab, bits(d)], 2)))
    for block in range(BLOCKS):
        A, B = MMA[name](ab[block, :, :4], ab[block, :, 4:])
        start = d[block].astype(np.float32).astype(np.float64)
        error = abs(actual[block] - (start + accumulator(A @ B)))
        assert (error <= (0 if integers else 17 * 2.0**-24) * (abs(start) + accumulator(abs(A) @ abs(B)))).all()


def test_mma_takes_subnormal_halves(kernels):
    ab = np.full((1, 32, 6), 0x00010001, np.uint32)  # every element 2^-24
    result = floats(primitives.emulate(kernels, "mma_m16n8k16<Half>", np.concatenate([ab, np.zeros((1, 32, 4), np.uint32)], 2)))
    assert (result == 16 * 2.0**-48).all()


# ldmatrix, cp.async


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(kernels, rng, matrices, transposed):
    rows = words(rng, BLOCKS, 32, 4)
    name = f"ldmatrix_x{matrices}" + "_trans" * transposed
    actual = primitives.emulate(kernels, name, rows).view(np.uint16).reshape(BLOCKS, 32, matrices, 2)
    elements = rows.view(np.uint16)[:, ::-1].reshape(BLOCKS, 4, 8, 8)  # lane l gives the address of row 31 - l
    if transposed:
        elements = elements.swapaxes(2, 3)
    for i in range(matrices):
        for e in range(2):
            assert (actual[:, :, i, e] == elements[:, i][:, GROUP, QUAD * 2 + e]).all()


def test_cp_async_reads_some_bytes_and_zeroes_the_rest(kernels, rng):
    given = words(rng, BLOCKS, 32, 8)
    given[:, :, 4] = np.arange(BLOCKS * 32).reshape(BLOCKS, 32)  # every count modulo 17
    actual = primitives.emulate(kernels, "cp_async_16", given).view(np.uint8)
    kept = np.arange(16) < (given[:, :, 4] % 17)[:, :, None]
    assert (actual == np.where(kept, given.view(np.uint8)[:, :, :16], 0)).all()


def test_cp_async_groups(kernels, rng):
    given = words(rng, BLOCKS, 32, 8)
    assert (primitives.emulate(kernels, "cp_async_wait<1>", given) == given).all()


# Exchange within a warp

SOURCES = {
    "shuffle": lambda lane, i: i % 32,
    "shuffle_xor": lambda lane, i: lane ^ i % 32,
    "shuffle_up": lambda lane, i: np.where(lane >= i % 32, lane - i % 32, lane),
    "shuffle_down": lambda lane, i: np.where(lane + i % 32 < 32, lane + i % 32, lane),
    "shuffle<float>": lambda lane, i: i % 32,
    "shuffle<uint64_t>": lambda lane, i: i % 32,
}


@pytest.mark.parametrize("name", SOURCES)
def test_shuffle(kernels, rng, name):
    values = words(rng, BLOCKS, 32, 2 if name == "shuffle<uint64_t>" else 1)
    if name == "shuffle<float>":
        values = bits(rng.standard_normal(values.shape))
    indices = rng.integers(0, 64, (BLOCKS, 32, 1), dtype=np.uint32)
    actual = primitives.emulate(kernels, name, np.concatenate([values, indices], 2))
    for block in range(BLOCKS):
        source = SOURCES[name](LANES, indices[block, :, 0].astype(int))
        assert (actual[block] == values[block, source]).all()


def test_votes(kernels, rng):
    predicates = rng.integers(0, 2, (BLOCKS, 32, 1), dtype=np.uint32)
    predicates[:4] = [np.zeros((32, 1)), np.ones((32, 1)), LANES[:, None] == 13, LANES[:, None] != 13]
    ballots, some, every = (primitives.emulate(kernels, f"vote_{vote}", predicates) for vote in ("ballot", "any", "all"))
    assert (ballots[:, :, 0] == (predicates[:, :, 0] << LANES.astype(np.uint32)).sum(1, keepdims=True, dtype=np.uint32)).all()
    assert (some == predicates.any(1, keepdims=True)).all()
    assert (every == predicates.all(1, keepdims=True)).all()
    assert set(some.ravel()) == set(every.ravel()) == {0, 1}


@pytest.mark.parametrize(("name", "threads"), [("warp_barrier", 32), ("block_barrier", 64), ("named_barriers", 64)])
def test_barriers(kernels, rng, name, threads):
    values = words(rng, BLOCKS, threads, 1)
    assert (primitives.emulate(kernels, name, values) == values[:, ::-1]).all()


# Conversions


def elementwise(kernels, name, *inputs):
    """The results of a primitive on vectors of any length; a block takes 32 elements."""
    columns = [np.pad(x, (0, -len(x) % 32)).reshape(-1, 32) for x in inputs]
    return primitives.emulate(kernels, name, np.stack(columns, 2)).ravel()[: len(inputs[0])]


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 65536, 2**-24, 2**-25, 2**-26, 3.4028235e38, 1e-45]


def fp32_of_interest(rng, significant_bits):
    """Random bit patterns, special values, and ties with their neighbours for a format with so many bits of significand."""
    shift = 24 - significant_bits
    kept = words(rng, 20_000) >> np.uint32(shift) << np.uint32(shift)
    ties = kept + np.uint32(1 << (shift - 1))
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    half_ties = bits((halves[:-1] + halves[1:]) / 2)  # those of subnormal halves too
    near_ties = [tie + np.uint32(step) for tie in (ties, half_ties) for step in (0, 1, 2**32 - 1)]
    return np.concatenate([words(rng, 20_000), kept, *near_ties, bits(SPECIAL)])


def test_to_float(kernels):
    every = np.arange(2**16, dtype=np.uint32)
    half = floats(elementwise(kernels, "to_float(Half)", every))
    np.testing.assert_array_equal(half, every.astype(np.uint16).view(np.float16).astype(np.float32))
    assert (np.signbit(half) == (every >> 15 == 1))[~np.isnan(half)].all()
    assert (elementwise(kernels, "to_float(Bfloat16)", every) == every << 16).all()


def test_from_float_half(kernels, rng):
    x = fp32_of_interest(rng, 11)
    with np.errstate(over="ignore"):
        expected = floats(x).astype(np.float16).view(np.uint16)
    expected = np.where(np.isnan(floats(x)), 0x7FFF, expected)
    np.testing.assert_array_equal(elementwise(kernels, "from_float<Half>", x), expected)


def test_from_float_bfloat16(kernels, rng):
    x = fp32_of_interest(rng, 8)
    expected = np.where(np.isnan(floats(x)), 0x7FFF, bfloat16_bits(floats(x)))
    np.testing.assert_array_equal(elementwise(kernels, "from_float<Bfloat16>", x), expected)


@pytest.mark.parametrize("name", ["Half", "Bfloat16"])
def test_pack(kernels, rng, name):
    low, high = words(rng, 2, 1000)
    each = [elementwise(kernels, f"from_float<{name}>", x) for x in (low, high)]
    np.testing.assert_array_equal(elementwise(kernels, f"pack<{name}>", low, high), each[0] | each[1] << 16)


def test_to_tf32(kernels, rng):
    """11 significant bits, ties away from zero; the grid below 2^-126 is that of 2^-126."""
    x = fp32_of_interest(rng, 11)
    with np.errstate(invalid="ignore"):
        exact = floats(x).astype(np.float64)
    finite = np.isfinite(exact)
    step = 2.0 ** (np.maximum(np.frexp(np.where(finite, exact, 0))[1] - 1, -126) - 10)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (np.copysign(np.floor(abs(exact) / step + 0.5), exact) * step).astype(np.float32)
    expected = np.where(finite, expected, floats(x))
    np.testing.assert_array_equal(floats(elementwise(kernels, "to_tf32", x)), expected)


def test_exp2(kernels, rng):
    x = rng.uniform(-120, 120, 10_000).astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    actual = floats(elementwise(kernels, "exp2_approximate", bits(x)))
    assert (abs(actual - expected) <= np.spacing(abs(expected).astype(np.float32))).all()
    exact = {-np.inf: 0, np.inf: np.inf, np.nan: np.nan, 0: 1, -126: 2**-126, 128: np.inf, 10: 1024}
    exact |= {1e-40: 1, -127: 0}  # subnormal arguments and results count as zero
    arguments, results = np.array(list(exact.items()), np.float32).T
    np.testing.assert_array_equal(floats(elementwise(kernels, "exp2_approximate", bits(arguments))), results)


# What is there to be tested


def test_every_primitive_is_tested(kernels):
    """Each function of ptx.cuh is called in conformance.cu, each entry of conformance.cu in this file."""
    source = primitives.CONFORMANCE.read_text()
    header = (emulator.ROOT / "csrc" / "common" / "ptx.cuh").read_text().split("#else")[1]
    functions = set(re.findall(r"^DEVICE \S+ (\w+)(?:<\w+>)?\(", header, re.MULTILINE)) - {"shared_address"}
    assert len(functions) > 20
    assert [name for name in functions if not re.search(rf"\b{name}(<\w+>)?\(", source)] == []
    assert list(primitives.sizes(kernels.library)) == primitives.NAMES
    here = Path(__file__).read_text()
    families = ("ldmatrix_x", "vote_", "pack<")  # their names are put together
    assert [name for name in primitives.NAMES if f'"{name}"' not in here and not name.startswith(families)] == []
