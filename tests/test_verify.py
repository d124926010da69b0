"""`python -m fastattn verify`: what it asks, with `--quick` and without, and that each answer is judged."""

import functools
import json
import pickle

import pytest
import torch

from fastattn import testing, verify
from fastattn.__main__ import main
from fastattn.ops import attention, ffn, norm

SERVED = {
    "attention": attention.BACKENDS, "varlen_attention": attention.BACKENDS, "linear": ffn.BACKENDS, "ffn": ffn.BACKENDS,
    "add_layer_norm": norm.BACKENDS, "add_rms_norm": norm.BACKENDS,
}  # fmt: skip


@pytest.fixture
def available(monkeypatch):
    """Only these backends are there."""

    def available(*names):
        states = {name: {"available": name in names} for name in ("eager", "cpu", "triton", "cuda")}
        monkeypatch.setattr(verify, "info", lambda: {"backends": states, "devices": ["a test's"]})

    return available


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_asks_every_op_of_every_backend(available, device):
    available("eager", "cpu", "triton", "cuda")
    rows = [row for row, cases in verify.requests(device, verify.QUICK) if cases]
    asked = {(row.op, row.backend, row.dtype) for row in rows}
    backends = {op: [name for name in names if name != "cpu" or device == "cpu"] for op, names in SERVED.items()}
    assert asked == {(op, name, dtype) for op, names in backends.items() for name in names for dtype in ("fp16", "bf16")}
    kinds = {row.kind for row in rows if row.op == "attention"}
    extras = {"padding dropout 0.1", "padding heads", "padding relative dropout 0.1"}
    assert kinds >= {"none", "padding", "holes", "causal_padding", *extras} and kinds - extras < set(testing.MASKS)


def test_the_whole_table_holds_the_quick_one(available):
    available("eager", "triton")
    quick, whole = ([str(row) for row, _ in verify.requests("cuda", table)] for table in (verify.QUICK, verify.whole()))
    assert set(quick) < set(whole) and len(whole) == len(set(whole)) > 3 * len(quick)


def test_quick_passes(available, capsys):
    available("eager", "cpu")
    assert main(["verify", "--quick"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(rows)} passed, 0 failed, 0 not served, on a test's"
    assert len(rows) == len(list(verify.requests("cpu", verify.QUICK)))


def test_each_row_is_judged(available, capsys, monkeypatch):
    """One element of each answer is off by a tenth of the largest."""
    available("eager", "cpu")
    monkeypatch.setattr(verify, "QUICK", verify.QUICK._replace(shapes=[(1, 2, 20, 20, 32)]))

    def off(run):
        @functools.wraps(run)
        def wrong(*args, **options):
            results = run(*args, **options)
            name = next(iter(results))
            results[name] = results[name].clone(memory_format=torch.contiguous_format)
            results[name].view(-1)[0] += results[name].abs().max() / 10
            return results

        return wrong

    for name in ("run_attention", "run_varlen_attention", "run_linear", "run_ffn", "run_norm"):
        monkeypatch.setattr(testing, name, off(getattr(testing, name)))
    assert main(["verify", "--quick", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 50 and all("(rule 1)" in row["failure"] for row in rows)


def test_a_kernel_that_raises_fails_its_row_alone(available, capsys, monkeypatch):
    available("eager")
    monkeypatch.setattr(verify, "QUICK", verify.QUICK._replace(shapes=[(1, 1, 9, 9, 16)]))

    def broken(*args, **options):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(testing, "run_ffn", broken)
    assert main(["verify", "--quick", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert all(row["failure"] == ("RuntimeError: an illegal memory access" if row["op"] == "ffn" else None) for row in rows)


def test_on_a_gpu_kernels_are_compiled_first(monkeypatch):
    done = []
    row = verify.Row("cuda", "attention", "triton", "fp16", "none")

    def case():
        done.append("asked")
        raise NotImplementedError("no GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verify, "requests", lambda device, table: [(row, [case])])
    monkeypatch.setattr(verify, "compile_ahead", lambda asked: done.append(asked))
    assert verify.main(as_json=True, quick=True) == 1  # nothing was served
    assert done == [[(row, [case])], "asked"]


def test_what_is_compiled_first_is_what_is_launched(available):
    """A job for each case of a Triton row, which makes its launches in another process, of tensors of the CPU."""
    pytest.importorskip("triton")
    from fastattn.kernels.triton.launch import GPU

    available("eager", "triton", "cuda")
    asked = list(verify.requests("cuda", verify.QUICK))
    jobs = pickle.loads(pickle.dumps(verify.jobs(asked, GPU(90))))
    assert len(jobs) == sum(len(cases) for row, cases in asked if row.backend == "triton")
    launched = [{launch.kernel.__name__ for launch in job()} for job in jobs]
    assert all(launched) and set.union(*launched) == {
        "_attention_forward_kernel", "_attention_dq_kernel", "_attention_dkdv_kernel", "_attention_backward_kernel",
        "_linear_forward_kernel", "_linear_dz_kernel", "_linear_dgrad_kernel", "_norm_forward_kernel", "_norm_backward_kernel",
    }  # fmt: skip


def test_help_says_what_quick_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["verify", "--help"])
    assert "fp16 and bf16" in " ".join(capsys.readouterr().out.split())
