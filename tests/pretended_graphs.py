"""CUDA graphs on a CPU: everything around the capture runs as it is, and a replay computes once more what was captured."""

import contextlib
import gc
import sys
import threading
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from fastattn import graphs, packing
from fastattn.integrations import accelerate_graphs

READS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
OURS = ("fastattn/integrations/", "fastattn/packing.py", "fastattn/graphs.py")


def on_host(x):
    """x, as one that is in the host's memory; other tensors pretend to be on a GPU."""
    x.on_host = True
    return x


class OnHost(TorchFunctionMode):
    """Inside, what is computed of tensors in the host's memory alone is there too."""

    device = torch.device("cpu")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        if given and all(hasattr(x, "on_host") for x in given):
            for x in tree_iter(result):
                if isinstance(x, torch.Tensor):
                    on_host(x)
        return result


class Pretended:
    """What was captured and replayed, `log`: what was done on which stream, and `reads` of values of the GPU on the host."""

    def __init__(self):
        self.captures = self.replays = self.reads = self.events = 0
        self.pools, self.log, self.fails = [], [], None
        self.here = threading.local()

    def capture(self, function, pool, stream):
        assert not torch.is_inference_mode_enabled(), (
            "a first graph of that mode leaves random numbers that no other may write to"
        )
        assert not gc.isenabled(), "a graph that is destroyed during a capture makes it fail"
        function()
        if self.fails is not None:
            raise graphs.NotCaptured(self.fails)
        self.captures += 1
        self.pools.append(pool)
        result = function()

        def replay():
            self.replays += 1
            self.log.append((self.stream().name, "replay"))
            for kept, new in zip(result, function(), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return replay, result

    def stream(self):
        return getattr(self.here, "stream", self.made("default"))

    @contextlib.contextmanager
    def on(self, name):
        self.here.stream = self.made(name)
        yield
        del self.here.stream

    def made(self, name):
        def record():
            self.events += 1
            event = self.events
            self.log.append((name, f"record {event}"))
            return SimpleNamespace(number=event, synchronize=lambda: self.log.append(("host", f"wait {event}")))

        def wait(event):
            self.log.append((name, f"wait {event.number}"))

        return Stream(name, record, wait)


class Stream:
    def __init__(self, name, record_event, wait_event):
        self.name, self.record_event, self.wait_event = name, record_event, wait_event

    def __eq__(self, other):
        return self.name == other.name


def pretend(monkeypatch):
    cuda, fake, pools = torch.cuda, Pretended(), iter(range(100))
    monkeypatch.setattr(graphs, "capture", fake.capture)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    for module in (graphs, accelerate_graphs):
        monkeypatch.setattr(module, "on_gpu", lambda x: not hasattr(x, "on_host"))
    monkeypatch.setattr(packing, "readable", lambda x: False)
    monkeypatch.setattr(cuda, "current_stream", lambda *_: fake.stream())
    monkeypatch.setattr(cuda, "Stream", type("Side", (), {"__init__": lambda self, device: None}))  # a class, as in annotations
    monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: fake.log.append((stream.name, "uses")))
    for name in READS:
        _count(monkeypatch, fake, name)
    return fake


def _count(monkeypatch, fake, name):
    honest = getattr(torch.Tensor, name)

    def read(x, *args):
        asks = sys._getframe(1).f_code.co_filename
        if not hasattr(x, "on_host") and any(part in asks for part in OURS):
            fake.reads += 1
            return on_host(honest(x).clone()) if name == "cpu" else honest(x, *args)
        return honest(x, *args)

    monkeypatch.setattr(torch.Tensor, name, read)
