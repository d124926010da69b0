"""What `make gpu` compiles before the benchmarks call it: the kernels that they launch."""

# ruff: noqa: E402  (without triton nothing below can be imported)
import functools
import pickle

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import ahead, shapes
from fastattn.kernels.triton import ahead as compiler
from fastattn.kernels.triton.launch import GPU
from fastattn.launches import launches_of

H100 = GPU(90)


def variants(request):
    return {compiler._variant(launch) for launch in launches_of(request, H100)}


def test_every_request_launches_something_in_another_process():
    found = [functools.partial(launches_of, request, H100) for request in ahead.requests()]
    kernels = {launch.kernel.__name__ for job in pickle.loads(pickle.dumps(found)) for launch in job()}
    assert {"_attention_forward_kernel", "_linear_forward_kernel", "_norm_forward_kernel", "_norm_backward_kernel"} < kernels


@pytest.mark.parametrize("shape", shapes.ATTENTION, ids=lambda shape: shape.name)
def test_the_benchmark_s_own_call_is_compiled(shape, monkeypatch):
    """With as many sequences as there are on a GPU: a kernel is not compiled for their number."""
    for fill in shape.fills:
        compiled = variants(functools.partial(ahead.attention, shape, fill))
        monkeypatch.setattr(ahead, "B", shape.batch)
        assert variants(functools.partial(ahead.attention, shape, fill)) == compiled
        monkeypatch.undo()


class Compiled:
    def __init__(self, *failures):
        self.variants, self.failures = 7, list(failures)


@pytest.mark.parametrize(("failures", "status"), [((), 0), ((compiler.Failure(int, 0, "out of registers"),), 1)])
def test_its_words_and_exit_status(monkeypatch, capsys, failures, status):
    given = []

    def compile_ahead(jobs, sm):
        given.extend(jobs)
        return Compiled(*failures)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    states = {name: {"available": name == "triton"} for name in ("eager", "cpu", "triton", "cuda")}
    monkeypatch.setattr("fastattn.verify.info", lambda: {"backends": states})
    monkeypatch.setattr(compiler, "compile_ahead", compile_ahead)
    assert ahead.main([]) == status
    said = capsys.readouterr().out
    assert f"7 kernels are compiled, {len(failures)} failed" in said and ("out of registers" in said) == bool(failures)
    assert len(given) > len(ahead.requests()) > 20 and pickle.loads(pickle.dumps(given))


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        ahead.main([])
