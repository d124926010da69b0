"""Work shared out over threads: each serial, exceptions, several callers at once, a forked process."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.kernels.cpu import shared_out


def in_a_new_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def python(code):
    """In a process of its own, since the number of threads is the process's."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_threads_are_serial_and_others_keep_their_number():
    """Also those that begin later, which PyTorch gives the number that was set last."""
    python("""
        import threading, torch
        from fastattn.kernels.cpu import shared_out
        from tests.test_shared_out import in_a_new_thread
        torch.set_num_threads(3)
        numbers = []
        def ask(piece):
            torch.ones(100_000).add_(1)
            numbers.append((threading.get_ident(), torch.get_num_threads()))
        shared_out.run(ask, range(50))
        assert len(numbers) == 50 and {number for _, number in numbers} == {1}
        assert threading.get_ident() not in {thread for thread, _ in numbers}
        assert torch.get_num_threads() == 3 and in_a_new_thread(torch.get_num_threads) == 3
        torch.set_num_threads(2)
        shared_out.run(ask, range(50))
        assert torch.get_num_threads() == 2 and sorted(shared_out._queues) == [2, 3]
    """)


def test_failures_reach_the_caller_after_all_pieces():
    done = []

    def fail_at_three(piece):
        if piece == 3:
            raise KeyError(piece)
        done.append(piece)

    for _ in range(3):
        with pytest.raises(KeyError, match="3"):
            shared_out.run(fail_at_three, range(6))
        assert sorted(done) == [0, 1, 2, 4, 5]
        done.clear()


def test_callers_wait_for_their_own_pieces():
    """Eight at once; one of them raises."""
    results = {}

    def call(n):
        mine = []
        try:
            shared_out.run(lambda piece: mine.append(piece if n != 5 else 1 // 0), range(40))
        except ZeroDivisionError:
            mine = "raised"
        results[n] = mine

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert {n: mine if n == 5 else sorted(mine) for n, mine in results.items()} == {
        n: "raised" if n == 5 else list(range(40)) for n in range(8)
    }


def test_pieces_are_not_kept():
    import weakref

    tensor = torch.zeros(3)
    seen = weakref.ref(tensor)
    shared_out.run(lambda piece: piece.add_(1), [tensor])
    done = threading.Event()
    shared_out.run(lambda piece: done.set(), range(4 * torch.get_num_threads()))  # every thread has let go of the piece before
    assert done.is_set() and tensor.sum() == 3
    del tensor
    assert seen() is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_grad_mode(monkeypatch, mode):
    before = torch.get_num_threads()
    lengths = [128, 3, 77, 50, 9, 120, 64, 31]
    calls = []
    monkeypatch.setattr(shared_out, "run", lambda f, pieces, run=shared_out.run: (calls.append(len(pieces)), run(f, pieces)))
    torch.set_num_threads(2)
    with mode():
        q, k, v = (torch.randn(8, 4, 128, 64, requires_grad=mode is torch.enable_grad) for _ in range(3))
        served, expected = (fastattn.attention(q, k, v, masks.padding(lengths), backend=name) for name in ("cpu", "eager"))
    torch.set_num_threads(before)
    assert calls and served.is_inference() == expected.is_inference() and served.requires_grad == (mode is torch.enable_grad)
    torch.testing.assert_close(served, expected)
    served.mul(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own():
    python("""
        import os, signal, torch
        from fastattn.kernels.cpu import shared_out
        torch.set_num_threads(2)
        done = []
        shared_out.run(done.append, range(4))
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            shared_out.run(done.append, range(4))
            os._exit(0 if len(done) == 8 else 1)
        assert os.waitpid(child, 0)[1] == 0
        shared_out.run(done.append, range(4))
        assert len(done) == 8
    """)
