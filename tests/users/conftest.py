"""Nothing here reaches a network; models this small run in one thread; no state of an Accelerator meets the next test."""

import socket

import pytest
import torch


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a test connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine two threads of a tiny model wait for one another ten times as long as they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerator():
    """`Accelerator` keeps its settings, mixed precision among them, for the whole process."""
    state = pytest.importorskip("accelerate.state")

    def reset():
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    reset()
    yield
    reset()
