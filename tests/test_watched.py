"""What is asked before each replay, and how: whether modules, weights and PyTorch's switches are as they were.

The changes themselves are in test_graphs.py and test_accelerate_graphs.py. A capture is pretended (`pretended_graphs`).
"""

import functools

import pytest
import torch
from test_graphs import Small, assert_equal, data, fewer, replace, transpose, x
from torch import nn

from fastattn import watched
from fastattn.graphs import graphed


@pytest.fixture
def model():
    return Small().eval()


class Doubles(nn.LayerNorm):
    def forward(self, given):
        return super().forward(given) * 2


class Chain(nn.Module):
    """Its list may be empty, and its buffer is the last thing that is registered."""

    def __init__(self):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(8), nn.ModuleList()
        self.after.register_buffer("sum", torch.zeros(8))

    def forward(self, given):
        y = self.norm(given)
        for part in self.after:
            y = part(y)
        return {"y": y + sum(self.after.buffers())}


def another_class(model):
    model.norm.__class__ = Doubles


def filled_anew(model):
    held = dict(model.after._buffers)
    model.after.__init__([nn.Linear(8, 8)])
    model.after._buffers.update(held)
    model.eval()


def weights_in_another_dict(model):
    model.norm._parameters = {"weight": nn.Parameter(torch.randn(8)), "bias": None}


def one_more_at_the_end(model):
    model.after.register_buffer("more", torch.ones(8))


@pytest.mark.parametrize("change", [another_class, filled_anew, weights_in_another_dict, one_more_at_the_end])
@torch.no_grad()
def test_what_changes_beside_what_a_module_sets(capturing, change):
    model = Chain().eval()
    call, given = graphed(model), x()
    call(given)
    change(model)
    assert_equal(call(given), model(given))
    assert capturing.captures == 2


@torch.no_grad()
def test_a_weight_under_another_name(capturing):
    model = nn.LayerNorm(8, bias=False).eval()
    nn.init.normal_(model.weight)
    call, given = graphed(model), x()
    call(given)
    model.weight, model.bias = None, model.weight
    assert torch.equal(call(given), model(given)) and capturing.captures == 2


@pytest.mark.parametrize("change", [data, transpose, fewer, replace])
def test_a_change_without_the_guard_of_pytorch(capturing, model, change, monkeypatch):
    """In another mode than it was made in, or where there is none, dtypes, shapes and strides are compared one by one."""
    call, given = graphed(model), x()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            call(given)
    assert capturing.captures == 2
    with torch.no_grad():
        change(model)
        assert_equal(call(given), model(given))
    assert capturing.captures == 3 and len(call._calls.graphs) == 1
    monkeypatch.setattr(watched, "_guard", lambda tensors: None)
    call = graphed(model)
    with torch.no_grad():
        call(given), call(given)
        change(model)
        assert_equal(call(given), model(given))
    assert capturing.captures == 5


@torch.no_grad()
def test_a_replay_asks_one_guard_for_all_layouts(capturing, monkeypatch):
    """What is tied is one weight to it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight = model[0].weight
    call, given = graphed(model), x()
    call(given)
    monkeypatch.setattr(watched, "LAYOUT", (lambda tensor: pytest.fail("each tensor was asked"),))
    call(given)
    assert capturing.replays == 2


SWITCHES = {
    "conv": (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "fp16 sums": (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "bf16 sums": (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "fp16 accumulation": (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    "cudnn": (torch.backends.cudnn, "enabled", False),
    "deterministic cudnn": (torch.backends.cudnn, "deterministic", True),
}
KERNELS = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "mem_efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
    "cudnn attention": torch.backends.cuda.enable_cudnn_sdp,
    "deterministic": lambda on: torch.use_deterministic_algorithms(not on),
}


@pytest.mark.parametrize("name", [*SWITCHES, *KERNELS])
@torch.no_grad()
def test_switches_of_pytorch_are_in_the_key(capturing, model, name):
    if name in KERNELS:
        change, before, value = KERNELS[name], True, False
    else:
        owner, switch, value = SWITCHES[name]
        change, before = functools.partial(setattr, owner, switch), getattr(owner, switch)
    call, given = graphed(model), x()
    call(given)
    try:
        change(value)
        call(given)
        assert before != value and capturing.captures == 2
    finally:
        change(before)
    call(given)
    assert capturing.captures == 2
