"""The accuracy rule must fail on wrong results: each seeded bug here is caught, a right result is not."""

import pytest
import torch
import torch.nn.functional as F

from fastattn import masks
from fastattn.testing import (
    assert_accurate,
    attention_inputs,
    attention_yardstick,
    ffn_yardstick,
    linear_yardstick,
    norm_yardstick,
    run_attention,
    run_ffn,
    run_norm,
)


def correct():
    x = attention_inputs(2, 2, 65, 77, 32, torch.float32, mask="padding", seed=3)
    return x, run_attention(x, "cpu"), attention_yardstick(x)


def test_a_right_result_passes():
    _, actual, yardstick = correct()
    errors = assert_accurate(actual, yardstick)
    assert set(errors) == {"out", "dq", "dk", "dv"} and all(0 < e < 20 for e in errors.values())


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_two_percent_is_caught(name):
    _, actual, yardstick = correct()
    actual[name] = actual[name] * 1.02
    with pytest.raises(AssertionError, match=name):
        assert_accurate(actual, yardstick)


@pytest.mark.parametrize("name", ["out", "lse", "dq"])
def test_one_nan_is_caught(name):
    _, actual, yardstick = correct()
    actual[name] = actual[name].flatten().index_fill(0, torch.tensor(5), float("nan")).view(actual[name].shape)
    with pytest.raises(AssertionError, match=name):
        assert_accurate(actual, yardstick)


def test_shifted_mask_and_dropped_key_are_caught():
    x, _, yardstick = correct()
    keep = x.lowered().visible(2, 2, 65, 77)
    for wrong in (keep.roll(1, -1), keep & (torch.arange(77) != 0)):
        other = type(x)(x.q, x.k, x.v, x.dout, x.dlse, masks.dense(wrong), x.scale)
        with pytest.raises(AssertionError):
            assert_accurate({"out": run_attention(other, "eager")["out"]}, yardstick)


def test_small_lse_error_is_caught():
    _, actual, yardstick = correct()
    with pytest.raises(AssertionError, match="rule 4"):
        assert_accurate({"lse": actual["lse"] + 1e-4}, yardstick)


def test_wrong_gelu_is_caught_in_fp32():
    x, weight, dy = torch.randn(64, 96), torch.randn(128, 96) / 10, torch.randn(64, 128)
    yardstick = linear_yardstick(x, weight, None, None, dy, "gelu")
    assert_accurate({"y": F.gelu(x @ weight.T)}, yardstick)
    with pytest.raises(AssertionError, match="y"):
        assert_accurate({"y": F.gelu(x @ weight.T, approximate="tanh")}, yardstick)


def ffn_and_norm():
    """(yardstick, right result) of an ffn and of both norms, in fp32."""
    x, w1, w2 = torch.randn(40, 32), torch.randn(48, 32) / 6, torch.randn(32, 48) / 7
    args = (x, w1, torch.randn(48), w2, torch.randn(32), torch.randn(40, 32))
    yield ffn_yardstick(*args, "gelu"), run_ffn(*args, "gelu", "eager")
    residual, dsum, weight, bias = torch.randn(40, 32), torch.randn(40, 32), torch.randn(32), torch.randn(32)
    for rms in (False, True):
        args = (x, residual, weight, None if rms else bias, torch.randn(40, 32), dsum, 1e-5)
        yield norm_yardstick(*args, rms=rms), run_norm(*args, "eager", rms=rms)


def test_two_percent_of_an_ffn_or_a_norm_is_caught():
    for yardstick, actual in ffn_and_norm():
        assert_accurate(actual, yardstick)
        for name, tensor in actual.items():
            with pytest.raises(AssertionError, match=name):
                assert_accurate({name: tensor * 1.02}, yardstick)


def test_wrong_eps_and_unbiased_variance_are_caught():
    (x, dy), weight = torch.randn(2, 40, 32), torch.randn(32)
    yardstick = norm_yardstick(x, None, weight, None, dy, None, 1e-5)
    wrong = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * weight
    for y in (F.layer_norm(x, (32,), weight, None, 1e-4), wrong):
        with pytest.raises(AssertionError, match="y"):
            assert_accurate({"y": y}, yardstick)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_truncating_cast_is_caught(dtype):
    x = attention_inputs(2, 2, 65, 77, 32, dtype, seed=3)
    yardstick = attention_yardstick(x)
    out = yardstick.exact["out"].float()
    shift = 16 if dtype == torch.bfloat16 else 13
    truncated = (out.view(torch.int32) >> shift << shift).view(torch.float32)
    with pytest.raises(AssertionError, match="rule 2"):
        assert_accurate({"out": truncated.to(dtype)}, yardstick)
