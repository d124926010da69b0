"""The tests for GPUs keep to one device: all of them run on a pretended GPU, and that one sees what a GPU would refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import GPU, NOT_REHEARSED, PretendedGPU

from benchmarks.gpu import gpu_tests
from fastattn import masks

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pretended():
    with PretendedGPU():
        yield


@pytest.mark.slow
def test_the_tests_for_gpus_keep_to_one_device():
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-m", "gpu", *gpu_tests()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--tb=short"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:]
    outcome = re.search(r"^(\d+) passed", done.stdout.splitlines()[-1])
    assert outcome is not None and int(outcome[1]) > 200, done.stdout[-2000:]


def on_both():
    return torch.randn(3, device="cuda"), torch.randn(3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: torch.equal(there, here),
        lambda there, here: torch.allclose(there[1:], here[1:]),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(there > 0, here, 0),
        lambda there, here: here[there > 0],
        lambda there, here: here.new_zeros(3).mul_(there),
        lambda there, here: torch.autograd.grad(there.requires_grad_().square().sum(), there)[0] - here,
        lambda there, here: torch.ops.aten.add.Tensor(there, here),
        lambda there, here: torch.nn.functional.linear(there, torch.nn.Linear(3, 2).weight),
        lambda there, here: torch.randn(3, generator=torch.Generator(), device="cuda"),
    ],
)
def test_two_devices_are_refused(pretended, mix):
    with pytest.raises(RuntimeError, match="same device|device type for generator"):
        mix(*on_both())


def test_what_a_gpu_takes(pretended):
    there, here = on_both()
    assert torch.equal((there + here[0]).cpu(), there.cpu() + here[0]), "a tensor without dimensions may come from the CPU"
    assert there[torch.tensor([2, 0])].device == GPU, "and so may indices"
    assert here.copy_(there).device.type == "cpu" and torch.equal(here, there.cpu())
    assert torch.nn.Linear(3, 2).to("cuda")(there).device == GPU


def test_memory_is_where_it_was_made(pretended):
    """Whatever looks at it: views, what autograd keeps and makes, moves there and back."""
    x = torch.randn(2, 3).to("cuda", torch.float64).requires_grad_()
    x[:, 1:].exp().sum().backward()
    for t in (
        x,
        x.grad,
        x.detach()[0],
        x.mT,
        x.new_empty(2),
        torch.zeros_like(x),
        torch.arange(3, device=x.device),
        x.cpu().cuda(),
    ):
        assert t.device == GPU and t.is_cuda and not t.is_cpu and t.get_device() == 0
    for t in (x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"), torch.tensor(x.tolist())):
        assert t.device.type == "cpu" and not t.is_cuda
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.detach().numpy()
    with pytest.raises(AssertionError, match="device"):
        torch.testing.assert_close(x, x.cpu())


def test_a_mask_of_a_gpu_on_the_cpu(pretended):
    """What most failures of a first run on a GPU were."""
    mask = masks.padding(torch.tensor([3], device="cuda"))
    assert mask.dense(1, 1, 4, 4, "cuda").device == GPU, "without the index"
    with pytest.raises(ValueError, match="mask is on cuda:0, but q is on cpu"):
        mask.dense(1, 1, 4, 4, "cpu")


def test_what_is_not_rehearsed_is_there():
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [word for word in NOT_REHEARSED if not re.search(rf"def test_\w*{word}", text)] == []
