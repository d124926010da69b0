"""Each primitive on a GPU and in the emulator, on the same random data, lane by lane."""

import ctypes

import numpy as np
import primitives
import pytest
import torch

from fastattn.kernels.cuda import emulator

pytestmark = pytest.mark.xdist_group("primitives")  # libraries compiled once

BLOCKS = 50
EXP2_ERROR = 2**-22 + 2**-24  # relative: that of the instruction by the PTX ISA, and the rounding of the emulator's result
SPECIAL = [0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, -1, 1, -127, 128, 2**126, 2**127, 65504, 65520]
SPECIAL += [2**-24, 2**-25, 3 * 2**-25]  # a subnormal half, two ties


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The primitives compiled by nvcc: for the GPU that is here, or for sm_90."""
    compiler, folder = emulator.csrc_build(), tmp_path_factory.mktemp("gpu")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    problem = compiler.nvcc_problem([f"{major}{minor}"])
    if problem is not None:
        pytest.skip(problem)
    compiler.cuda(folder / "library.so", folder, [f"{major}{minor}"], [primitives.CONFORMANCE])
    return ctypes.CDLL(str(folder / "library.so"))


def test_nvcc_compiles_every_primitive(gpu):
    """The assembler has accepted each instruction; what it does is for a GPU to show."""
    assert list(primitives.sizes(gpu)) == primitives.NAMES


def inputs(name, threads, per_thread):
    """Random words: numbers where the primitive takes numbers, of a harmless size where there is a tolerance."""
    rng = np.random.default_rng(0)
    shape = (BLOCKS, threads, per_thread)
    if name.startswith("vote"):
        x = rng.integers(0, 2, shape, dtype=np.uint32)
        x[0], x[1] = 0, 1
        return x
    if name == "exp2_approximate":
        x = rng.uniform(-120, 120, shape)
    elif name.startswith(("from_float", "pack", "to_tf32")):
        x = rng.choice([-1, 1], shape) * np.exp2(rng.uniform(-30, 20, shape))
    else:
        x = rng.standard_normal(shape)
    x = x.astype(np.float32)
    if name.startswith("mma"):
        if "tf32" not in name:
            dtype = torch.float16 if "Half" in name else torch.bfloat16
            elements = torch.from_numpy(rng.standard_normal((BLOCKS, threads, 12))).to(dtype).view(torch.int16).numpy()
            x.view(np.uint32)[:, :, :6] = elements.view(np.uint32)
        return x.view(np.uint32)
    if name.startswith(("exp2", "from_float", "pack", "to_tf32")):
        x.flat[: len(SPECIAL)] = SPECIAL
        return x.view(np.uint32)
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def on_gpu(gpu, name, words, words_out):
    x = torch.from_numpy(words.view(np.int32)).cuda()
    y = torch.full((words.shape[0] * words_out,), -1, dtype=torch.int32, device="cuda")
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    primitives.call(gpu, name, x.data_ptr(), x.numel(), y.data_ptr(), y.numel(), stream)
    return y.cpu().numpy().view(np.uint32)


def magnitude(kernels, name, words):
    """The sum of |d| and all |a b| of each element of a product, by the emulator: signs are cleared."""
    clear = np.full(10, 0x7FFFFFFF if "tf32" in name else 0x7FFF7FFF, np.uint32)
    clear[6:] = 0x7FFFFFFF
    return primitives.emulate(kernels, name, words & clear).view(np.float32).ravel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", primitives.NAMES)
def test_gpu_and_emulator_agree(gpu, kernels, name):
    words_in, words_out = primitives.sizes(kernels.library)[name]
    threads = 64 if name in ("block_barrier", "named_barriers") else 32
    words = inputs(name, threads, words_in // threads)
    actual, expected = on_gpu(gpu, name, words, words_out), primitives.emulate(kernels, name, words).ravel()
    if name.startswith("mma"):
        difference = abs(actual.view(np.float32).astype(np.float64) - expected.view(np.float32))
        assert (difference <= 2.0**-22 * magnitude(kernels, name, words)).all()
    elif name == "exp2_approximate":
        actual, expected = actual.view(np.float32), expected.view(np.float32)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[~finite], expected[~finite])
        actual, expected = actual[finite].astype(np.float64), expected[finite]
        assert (abs(actual - expected) <= EXP2_ERROR * abs(expected)).all()
    elif name in ("to_float(Half)", "to_float(Bfloat16)", "to_tf32"):
        actual, expected = actual.view(np.float32), expected.view(np.float32)  # all NaNs count as equal
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_array_equal(actual, expected)
