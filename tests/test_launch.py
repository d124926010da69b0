"""The launch of a compiled Triton kernel by addresses: the same that Triton's own JIT does, or the JIT does it.

`make oldest` runs this file with the oldest Triton too.
"""

# ruff: noqa: E402  (without triton nothing below can be imported)
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from backends import TRITON, device_of

import fastattn
from fastattn import planned
from fastattn.kernels.triton import launch, norm
from fastattn.lowering import LoweredMask, Prepared

PROGRAM = Path(__file__).with_name("launching.py")


@pytest.fixture(scope="module")
def seen():
    """What reaches C by Triton's JIT and by plans, of kernels that a process without the interpreter compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(fastattn.__file__).parent.parent), str(PROGRAM.parent)]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["triton"] == triton.__version__
    return found


@pytest.mark.parametrize("hooked", ["", "hooked "])
def test_the_same_reaches_c_as_by_triton_s_jit(seen, hooked):
    """With a profiler's hooks too: then the hooks, and what they are told, are handed on."""
    by_jit, by_plans = seen[f"{hooked}jit"], seen[f"{hooked}plans"]
    assert by_plans == by_jit
    for head, parameters in by_plans:
        assert len(head) == 13 and parameters
        told = [x for x in head if isinstance(x, dict)]
        assert [sorted(x) for x in told] == [["function", "name", "stream"]] * bool(hooked)
        assert head.count(1) >= 2 + 2 * bool(hooked)  # the grid's other axes, and how many hooks there are to call


def test_one_compiled_kernel_serves_every_length(seen):
    """Of a plan, whatever its first call was: head[4] is the number of the compiled kernel."""
    by_name = {
        name: [head[4] for head, _ in seen["plans"]][slice(*places)]
        for name, places in {"tiny": (0, 4), "norm": (4, 12, 2), "norm backward": (5, 12, 2), "packed": (12, 16)}.items()
    }
    assert all(len(functions) == 4 and len(set(functions)) == 1 for functions in by_name.values()), by_name
    assert len({functions[0] for functions in by_name.values()}) == 4


def test_ragged_batches_share_plans_and_kernels(seen):
    """Of 200 batches, all with other lengths and numbers of tokens. The three ops that know of rows alone have a plan for each
    direction, 6; attention has two for each class of 32 that the longest sequence of a batch is in, of which 200 reaches 7."""
    ragged = seen["ragged"]
    assert 8 <= ragged["plans"] <= 6 + 2 * 7 and ragged["plans"] - ragged["early"] <= 2 * 2
    assert ragged["variants"] == ragged["tiled"] >= 7, "a kernel is compiled once for each choice of tiles"


@pytest.fixture
def compiled(monkeypatch):
    """A kernel as `compiled_start` reads it, and what it does, noted. Of several GPUs, 0 is the current one."""
    noted, current = [], [0]

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            noted.append(("enter", self.device))
            self.before, current[0] = current[0], self.device

        def __exit__(self, *error):
            noted.append(("leave", self.device))
            current[0] = self.before

    class Launcher:
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl, arg_annotations, kernel_signature = False, True, "annotations", "signature"

        def launch(self, *given):
            noted.append(("launch", current[0], given))

        def __call__(self, *given):
            noted.append(("official", current[0], given))

    kernel = SimpleNamespace(
        run=Launcher(),
        function=77,
        packed_metadata="packed",
        launch_metadata=lambda grid, stream, *values: (grid, stream, values),
    )
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 500 + device, raising=False)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    return SimpleNamespace(kernel=kernel, noted=noted, current=current)


def test_another_device_than_the_current_one_is_entered(compiled):
    """And left again; the stream is that device's. On its own device nothing is entered."""
    start = launch.compiled_start(compiled.kernel, 1)
    start(3, ("values",))
    (enter, (what, device, given), leave), compiled.noted[:] = tuple(compiled.noted), []
    assert (enter, leave) == (("enter", 1), ("leave", 1)) and (what, device) == ("launch", 1)
    assert given[:5] == (3, 1, 1, 501, 77) and compiled.current == [0]
    compiled.current[0] = 1
    start(3, ("values",))
    assert compiled.noted == [("launch", 1, given)]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("3.6.0", (5, 1, 1, 500, 77, False, True, None, None, "packed", None, None, None, 10, None, 0.5)),
        (
            "3.7.1",
            (5, 1, 1, 500, 77, False, True, "packed", None, None, None, None, None, "annotations", "signature", (10, None, 0.5)),
        ),
    ],
)
def test_the_order_of_each_version(compiled, monkeypatch, version, expected):
    monkeypatch.setattr(triton, "__version__", version)
    launch.compiled_start(compiled.kernel, 0)(5, (10, None, 0.5))
    assert compiled.noted == [("launch", 0, expected)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("way", ["added", "in its place"])
def test_a_hook_is_called_by_the_official_way(compiled, monkeypatch, name, way):
    """As soon as there is one, with the launch's metadata, and no longer."""
    hooks, start = triton.knobs.runtime, launch.compiled_start(compiled.kernel, 0)

    def hook(metadata):
        pass

    with monkeypatch.context() as patch:
        if way == "added":
            getattr(hooks, name).add(hook)
        else:
            patch.setattr(hooks, name, hook)
        start(5, (10,))
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if way == "added":
            getattr(hooks, name).remove(hook)
    told = (5, 1, 1), 500, (10,)
    assert compiled.noted == [("official", 0, (5, 1, 1, 500, 77, "packed", told, enter, leave, 10))]
    start(5, (10,))
    assert [what for what, *_ in compiled.noted] == ["official", "launch"]


def test_chains_of_hooks_that_were_taken_away(compiled, monkeypatch):
    for name in ("launch_enter_hook", "launch_exit_hook"):
        monkeypatch.setattr(triton.knobs.runtime, name, None)
    launch.compiled_start(compiled.kernel, 0)(5, (10,))
    assert [what for what, *_ in compiled.noted] == ["launch"]


@pytest.mark.parametrize("what", ["version", "global_scratch_size", "profile_scratch_size"])
def test_what_is_not_known_is_left_to_the_jit(compiled, monkeypatch, what):
    """A Triton of another version, and a kernel that needs memory of its own."""
    if what == "version":
        monkeypatch.setattr(triton, "__version__", "3.8.0")
    else:
        monkeypatch.setattr(type(compiled.kernel.run), what, 16)
    assert launch.compiled_start(compiled.kernel, 0) is None

    class Kernel:
        arg_names = ("x", "n")

        def warmup(self, *values, grid, **options):
            return compiled.kernel

        def __getitem__(self, grid):
            return lambda *values, **options: compiled.noted.append((grid, values, options))

    x = torch.zeros(1)
    monkeypatch.setattr(launch, "INTERPRET", SimpleNamespace(value=False))
    tiles = launch.Launch(Kernel(), 3, {"x": x, "n": 7}, norm.Config(1, 16, 4, 1))
    ready = launch.ready(tiles._replace(config=SimpleNamespace(_asdict=lambda: {"num_warps": 4, "num_stages": 1})))
    ready.start(9, (ready.handle(x), 8))
    assert compiled.noted == [((9,), (x, 8), {"num_warps": 4, "num_stages": 1})]


@pytest.mark.parametrize("backend", [TRITON])
def test_a_plan_keeps_no_tensor_of_the_call_that_it_was_made_for(backend):
    """Nor of those that it served."""

    def made():
        q, k, v, dout = (torch.randn(1, 2, 8, 16, device=device_of(backend)) for _ in range(4))
        x, weight = torch.randn(3, 16, device=q.device), torch.randn(16, device=q.device)
        prepared = Prepared(LoweredMask(key_end=torch.tensor([5], dtype=torch.int32, device=q.device)))
        forward = fastattn.kernels.triton.attention.forward_plan(q, k, v, prepared, 0.5, True, True)
        out, lse = forward(q, k, v, prepared)
        backward = fastattn.kernels.triton.attention.backward_plan(dout, None, q, k, v, out, lse, prepared, 0.5)
        grads, add = backward(dout, None, q, k, v, out, lse, prepared), norm.forward_plan(x, None, weight, None, 1e-5, 0, 1, 1)
        tensors = (
            q,
            k,
            v,
            dout,
            out,
            lse,
            *grads,
            x,
            weight,
            *prepared.tensors,
            *(y for y in add(x, None, weight, None) if y is not None),
        )
        return (forward, backward, add), [weakref.ref(x) for x in tensors]

    plans, kept = made()
    gc.collect()
    assert plans and len(kept) > 12 and not [ref() for ref in kept if ref() is not None]


def test_on_paper_and_back_no_plan_is_kept():
    """Plans know how to launch: those of a process's own are not used on paper, nor the others after it."""
    x = torch.randn(2, 16)
    expected = fastattn.add_layer_norm(x, None, None, None)
    before = list(planned.PLANS)
    with launch.dry(launch.GPU(90)) as made:
        assert before and not planned.PLANS
        fastattn.add_layer_norm(x, None, None, None)
        assert made.launches == 1 and planned.PLANS
        with launch.recorded(launch.GPU(80)) as inner:
            fastattn.add_layer_norm(x, None, None, None, backend="triton")
            assert len(inner) == 1
        assert not planned.PLANS and planned.pretending
        fastattn.add_layer_norm(x, None, None, None)
        assert made.launches == 2
    assert not planned.PLANS and not planned.pretending
    assert torch.equal(fastattn.add_layer_norm(x, None, None, None), expected)
