"""Compiling ahead: children fill Triton's cache, and a later process finds there what it calls."""

# ruff: noqa: E402  (without triton nothing below can be imported)
import functools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from backends import TRITON, device_of

import fastattn
from fastattn import launches, masks
from fastattn.kernels.triton import ahead

# A fresh process makes the same requests as if it were to run them, and says which kernels its calls compiled.
FRESH = """
import json, pickle, sys, triton
from fastattn.kernels.triton.ahead import compile_only
compile_only(90)
compiled = []
def listener(src, metadata, metadata_group, times, cache_hit):
    if not cache_hit:
        compiled.append(src.name)
triton.knobs.compilation.listener = listener
calls = 0
for job in pickle.load(open(sys.argv[1], "rb")):
    for launch in job():
        launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.config._asdict())
        calls += 1
print(json.dumps([calls, compiled]))
"""


def compiled_by_a_fresh_process(jobs, folder):
    """How many kernels a fresh process calls, and the names of those that it compiles."""
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    (folder / "fresh.py").write_text(FRESH)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(fastattn.__file__).parent.parent), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(folder / "fresh.py"), str(folder / "jobs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def attention_call(length, D, mask):
    """Forward and backward of the public function, through autograd."""
    q, k, v = (torch.zeros(2, length, 3, D, dtype=torch.float16).transpose(1, 2).requires_grad_() for _ in range(3))
    fastattn.attention(q, k, v, masks.causal() if mask else None, backend="triton").sum().backward()


def ffn_call(rows):
    x, w1, w2 = (torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in ((2, rows, 64), (128, 64), (64, 128)))
    fastattn.ffn(x, w1, w1[:, 0], w2, None, activation="relu", backend="triton").sum().backward()


def norm_call(width):
    x, weight = torch.zeros(4, width, requires_grad=True), torch.ones(width)
    fastattn.add_layer_norm(x, None, weight, weight, backend="triton").sum().backward()


def recorded(request, *arguments):
    return functools.partial(launches.launches_of, functools.partial(request, *arguments))


def nothing():
    raise ValueError("there is no such request")


def dies_in_a_child():
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return launches.norm_launches(torch.float32, 16, True)[:1]


def too_wide():
    (launch, _) = launches.norm_launches(torch.float32, 16, True)
    return [launch._replace(config=launch.config._replace(BLOCK_N=12))]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def test_a_fresh_process_compiles_nothing(tmp_path):
    calls = [(attention_call, 60, 32, False), (attention_call, 300, 16, True), (ffn_call, 9), (norm_call, 64)]
    jobs = [recorded(*call) for call in calls]
    compiled = ahead.compile_ahead(jobs, 90, processes=2)
    assert compiled == (2 + 3 + 2 + 2, [])
    assert compiled_by_a_fresh_process(jobs, tmp_path) == [compiled.variants, []]
    more = functools.partial(launches.norm_launches, torch.float16, 64, True)
    assert compiled_by_a_fresh_process([more], tmp_path)[1] == ["_norm_forward_kernel", "_norm_backward_kernel"]


def test_what_fails_is_returned_and_keeps_nothing_else_from_compiling(tmp_path):
    good = functools.partial(launches.norm_launches, torch.float32, 64, False)
    compiled = ahead.compile_ahead([nothing, dies_in_a_child, too_wide, good], 90, processes=1)
    assert compiled.variants == 2
    words = {(failure.job.__name__, failure.index): failure.error for failure in compiled.failures}
    assert set(words) == {("nothing", None), ("dies_in_a_child", 0), ("too_wide", 0)}
    assert words["nothing", None] == "ValueError: there is no such request"
    assert words["dies_in_a_child", 0].startswith("BrokenProcessPool") and "power of 2" in words["too_wide", 0]
    assert compiled_by_a_fresh_process([good], tmp_path) == [2, []]


def test_a_variant_is_compiled_once():
    """Kernels that were imported for the interpreter do not say which arguments they are not specialised for."""
    code = """
import functools, torch
from fastattn import launches
from fastattn.kernels.triton import ahead
jobs = [functools.partial(launches.attention_launches, torch.float16, 64, "causal", L) for L in (300, 320, 401)]
jobs += [functools.partial(launches.attention_launches, dtype, 64, "causal", 300) for dtype in (torch.float16, torch.bfloat16)]
jobs += [functools.partial(launches.norm_launches, torch.float16, N, False) for N in (768, 776, 769)]
print([(job.args[0], job.args[1], index) for job, index in ahead._variants(jobs)[0]])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(fastattn.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    half, bfloat = torch.float16, torch.bfloat16
    expected = [(dtype, 64, index) for dtype in (half, bfloat) for index in range(3)]
    expected += [(half, N, index) for N in (768, 769) for index in range(2)]
    assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize("backend", [TRITON])
def test_recording_launches_nothing_and_leaves_nothing_behind(backend):
    x = torch.ones(4, 64)
    found = launches.launches_of(lambda: fastattn.add_rms_norm(x, None, torch.ones(64), backend=backend))
    assert [launch.kernel.__name__ for launch in found] == ["_norm_forward_kernel"]
    x = x.to(device_of(backend))
    assert torch.allclose(fastattn.add_rms_norm(x, None, torch.ones_like(x[0]), backend=backend), x)


def test_processes_is_checked():
    with pytest.raises(ValueError, match="processes must be at least 1"):
        ahead.compile_ahead([], 90, processes=0)
