"""torchvision where there is none: the few names that timm and open_clip import from it and that their transformers never use."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from unittest import mock

NAMES = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
    "torchvision.datasets": ("CIFAR100", "CIFAR10", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder"),
    "torchvision.transforms": (
        "Normalize", "Compose", "RandomResizedCrop", "InterpolationMode", "ToTensor", "Resize", "CenterCrop", "ColorJitter",
        "Grayscale",
    ),
    "torchvision.transforms.functional": ("InterpolationMode",),
}  # fmt: skip
INTERPOLATIONS = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


@contextlib.contextmanager
def stubbed():
    """Inside, the names can be imported; afterwards there is no torchvision, as before. Nothing is done where it is."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    with contextlib.suppress(ImportError):
        from transformers.utils import is_torchvision_available

        assert not is_torchvision_available()  # asked now, since it remembers
    modules = {path: _module(path, names) for path, names in NAMES.items()}
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        if above:
            setattr(modules[above], name, module)
    with mock.patch.dict(sys.modules):  # what was imported stays
        sys.modules.update(modules)
        yield
        kept = {name: module for name, module in sys.modules.items() if name not in modules}
    sys.modules.update(kept)


def _module(path, names):
    module = types.ModuleType(path)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(path, None, is_package=True), []
    for name in names:
        values = {key: key for key in INTERPOLATIONS} if name == "InterpolationMode" else {}
        setattr(module, name, type(name, (), values))
    return module
