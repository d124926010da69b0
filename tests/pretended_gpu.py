"""A pretended GPU: `pytest -p pretended_gpu -m gpu` runs the tests for GPUs where there is none, and sees two devices mixed.

PyTorch reports a CUDA device. What a test puts there lies in CPU memory and says `cuda:0`; an operation on tensors of both
devices raises, as on a GPU. The specification answers for the kernels: this rehearses the tests, not the kernels.
"""

import importlib
import os
from dataclasses import is_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SHARED = 227 * 1024  # bytes of shared memory of a block, as on an H100
KERNELS = (("triton", "attention"), ("triton", "ffn"), ("triton", "norm"), ("cuda", "attention"), ("cuda", "ffn"))
COPIES = ("copy_", "__set__", "_has_compatible_shallow_copy_type")  # what may meet tensors of two devices
NEEDS_A_GPU = ("Torch not compiled with CUDA enabled", "requires CUDA support", "Found no NVIDIA driver")
# What PyTorch's own code would do on a GPU (capture, compile, recompute), a kernel that is better than the specification in the
# same dtype, and 250 runs that would each be slow here; and what is done only where nothing watches.
NOT_REHEARSED = ("graph", "capture", "compile", "export", "opcheck", "checkpoint", "vmap", "half_precision_is", "250_runs")
NOT_REHEARSED += ("on_load",)
# What launches kernels or Triton's host code by itself, in whose place the specification answers, or a process that sees no GPU
OWN_CODE = (
    "test_ahead.py",
    "test_tune.py",
    "test_tuned.py",
    "test_cuda_plans.py",
    "test_benchmarks_overhead.py",
    "test_launch.py",
    "test_triton_extras.py",
    "test_triton_bias_gradient.py",
)
OWN_CODE += (
    "test_planned.py",
    "test_planned_keys.py",
    "test_recall.py",
)  # and what this mode, which watches, keeps from happening
MANY, FEWER = 8, 6  # of a test with more variants than these one in so many


class Generator(torch.Generator):
    """Draws a CPU's numbers, wherever it says it is."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.where = torch.device(device)


class PretendedGPU(TorchFunctionMode):
    """Knows a tensor by its storage, so that a view, or what autograd has kept, is where its memory is."""

    storages = {}  # of all tests, by address, which a weak reference keeps from being used again

    def device_of(self, x):
        return GPU if _address(x) in self.storages else x.device

    def put(self, x, device):
        address = _address(x)
        if device.type == "cuda" and address is not None:
            self.storages[address] = StorageWeakRef(x.untyped_storage())
        else:
            self.storages.pop(address, None)
        return x

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("__get__", "get_device"):
            return self._attribute(function, name, args)
        if name in ("to", "cpu", "cuda"):
            return self._moved(name, *args, **kwargs)
        here = self._common(name, [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)])
        if name in ("numpy", "__array__") and here == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        target = here if kwargs.get("device") is None else torch.device(kwargs["device"])
        if target.type == "cuda" and "device" in kwargs:
            kwargs["device"] = CPU
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "where", generator.device).type != target.type:
            raise RuntimeError(f"Expected a '{target.type}' device type for generator")
        result = function(*args, **kwargs)
        if name in ("as_tensor", "asarray") and target.type != here.type:
            result = result.clone()
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                self.put(x, target)
        return result

    def _common(self, name, tensors):
        """The device of an operation. A tensor without dimensions may come from the CPU, and so may indices into a GPU's."""
        devices = [self.device_of(x) for x in tensors]
        if GPU not in devices:
            return CPU
        mixed = any(device == CPU and x.dim() for x, device in zip(tensors, devices, strict=True))
        into_the_gpu = name in ("__getitem__", "__setitem__") and devices[0] == GPU
        if mixed and not into_the_gpu and name not in COPIES:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two, cuda:0 and cpu")
        return devices[0] if name in COPIES else GPU

    def _attribute(self, function, name, args):
        if self.device_of(args[0]) != GPU:
            return function(*args)
        told = {"device": GPU, "is_cuda": True, "is_cpu": False, "get_device": 0}
        name = function.__self__.__name__ if name == "__get__" else name
        if name in told:
            return told[name]
        result = function(*args)
        return self.put(result, GPU) if isinstance(result, torch.Tensor) else result

    def _moved(self, name, x, *args, copy=False, memory_format=torch.preserve_format, **kwargs):
        if name in ("cpu", "cuda"):
            args = (torch.device(name),)
        if args and isinstance(args[0], torch.Tensor):
            device, dtype = self.device_of(args[0]), args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = self.device_of(x)
        target = here if device is None else GPU if device.type == "cuda" else device
        memory = CPU if target == GPU else target
        moved = x.to(memory, dtype or x.dtype, copy=copy or target != here, memory_format=memory_format)
        return self.put(moved, target)


def _address(x):
    try:
        return x.untyped_storage()._cdata if x.device.type == "cpu" else None
    except (NotImplementedError, RuntimeError):  # a tensor without memory, as inside of torch.vmap
        return None


def _serve_by_the_specification(backend, op):
    module, specification = (importlib.import_module(f"fastattn.kernels.{name}.{op}") for name in (backend, "eager"))
    honest, backward = module.unsupported, specification.backward

    def unsupported(problem):
        if problem.device != "cpu":
            return honest(problem)
        if torch._C._len_torch_function_stack():
            return ["tensors are on cpu"]
        on_gpu = {"device": "cuda"}  # inside of an operation, where nothing is pretended
        return honest(replace(problem, **on_gpu) if is_dataclass(problem) else problem._replace(**on_gpu))

    def noted_backward(dout, dlse, q, k, v, out, lse, mask, scale):
        """Some tests ask for the names of the kernels that are launched."""
        B, _, M, N, D = module._sizes(q, k, mask)
        if min(q.numel(), k.numel(), B, M, N) > 0:
            name = "attention_backward_single" if module.one_kernel(D, M, N, SHARED) else "attention_backward"
            module.library.launch(SimpleNamespace(name=name))
        return backward(dout, dlse, q, k, v, out, lse, mask, scale)

    for name in ("forward_plan", "backward_plan"):
        if hasattr(module, name):
            delattr(module, name)
    module.unsupported, module.forward = unsupported, specification.forward
    module.backward = noted_backward if (backend, op) == ("cuda", "attention") else backward


def pretend():
    os.environ["TRITON_INTERPRET"] = "1"  # for the kernels that are a test's own
    torch.Generator = Generator
    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED, major=9, minor=0)
    for name, answer in {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0), "is_bf16_supported": True,
        "get_device_name": "a pretended GPU", "get_device_properties": properties, "is_current_stream_capturing": False,
        "set_sync_debug_mode": None, "synchronize": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    from fastattn.kernels.cuda import library

    library._gpu_problems, library.launch = list, lambda *args: None
    for backend, op in KERNELS:
        _serve_by_the_specification(backend, op)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    pretend()  # before conftest.py asks whether there is a GPU


def _by_function(items):
    found = {}
    for item in items:
        found.setdefault(item.nodeid.split("[")[0], []).append(item)
    return found.values()


def pytest_collection_modifyitems(config, items):
    """Every test, but of many variants one in six, and the first: what mixes devices is most often a helper of all."""
    left_out = [item for item in items if any(word in item.nodeid for word in NOT_REHEARSED + OWN_CODE)]
    for variants in _by_function(item for item in items if item not in left_out):
        step = FEWER if len(variants) > MANY else 1
        left_out += [item for n, item in enumerate(variants) if n % step]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        with PretendedGPU():
            return (yield)
    except Exception as error:
        if any(words in str(error) for words in NEEDS_A_GPU):
            pytest.skip("PyTorch's own code for GPUs is called: up to there it was rehearsed")
        raise
