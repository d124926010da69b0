"""Who runs a whole model: fastattn's reference models, Hugging Face transformers, and exported models, as far as installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastattn
from benchmarks import exported, model_cases
from benchmarks.model_cases import Case
from fastattn.models.implementations import IMPLEMENTATIONS

Forward = Callable[..., object]


class Built(NamedTuple):
    """`forward(**case.inputs)` gives what `case.outputs` reads; a training step fills the gradients of `module`."""

    forward: Forward
    module: nn.Module


Build = Callable[[Case, str], Built]  # (case, "infer" or "train"); raises its refusal


class Provider(NamedTuple):
    name: str
    build: Build
    ours: bool = False
    package: str | None = None
    exported: bool = False  # runs fp32 inference alone
    main: bool = False  # has its turn in any budget
    patience: float = 0.0  # seconds that building it may take: it comes after all others, and where as much of the budget is left
    static: Build | None = None  # in place of `build` where a CUDA graph is captured
    uncapturable: str | None = None  # why none can be


ACCELERATED = "Hugging Face with fastattn.accelerate"
CONVERTED = "torch.nn with fastattn.nn.convert"
COUNTS = "not captured: each call asks how many real tokens there are"
BASELINES = {  # of each kind the one that is there; torch.nn calls SDPA itself, where it does not take its fast path
    "eager": ("Hugging Face eager", "reference eager", "torch.nn eager"),
    "SDPA": ("Hugging Face SDPA", "reference SDPA", "torch.nn"),
}
FASTATTN = IMPLEMENTATIONS["fastattn"]
ATTENTION_ONLY = IMPLEMENTATIONS["sdpa"]._replace(mask=FASTATTN.mask, attention=FASTATTN.attention)


def reference(implementation, case: Case, mode: str) -> Built:
    return _ready(model_cases.reference(case.config, implementation, case.state), mode)


def unpadded(case: Case, mode: str) -> Built:
    """fastattn's reference model on real tokens alone. A call packs its input and unpacks its output, also where all are real."""
    model = reference("fastattn", case, mode).module

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **images: Tensor):
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        packing = fastattn.Packing.from_mask(keep.bool())
        result = model(packing.pack(input_ids), packing=packing, **images)
        if case.is_clip:
            return result  # embeddings of texts and images, which have no padding
        return result._replace(last_hidden_state=packing.unpack(result.last_hidden_state))

    return Built(forward, model)


def hugging_face(attention: str, case: Case, mode: str) -> Built:
    import transformers
    from transformers.initialization import no_init_weights

    if attention == "fastattn":
        import fastattn.integrations.transformers  # noqa: F401  (registers the name)
    transformers.logging.set_verbosity_error()
    settings = {key: value for key, value in case.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(case.config["model_type"], **settings)
    extra = {} if case.is_clip else {"add_pooling_layer": False}
    with torch.device(case.device), no_init_weights():  # no seconds of random numbers that the case's weights replace
        model = transformers.AutoModel.from_config(config, attn_implementation=attention, **extra)
    model.to(case.device, case.dtype).load_state_dict(case.state)
    return _ready(model, mode)


def accelerated(build: Build, case: Case, mode: str) -> Built:
    built = build(case, mode)
    fastattn.accelerate(built.module, strict=True)
    return built


def accelerated_for_graphs(build: Build, case: Case, mode: str) -> Built:
    """With a capacity, so that no call asks how many real tokens there are: as many rows as this batch has, in steps of 64."""
    built = build(case, mode)
    fastattn.accelerate(built.module, strict=True, capacity=-(-int(case.lengths[0].sum()) // 64) * 64)
    return built


def compiled(build: Build, case: Case, mode: str) -> Built:
    """With constants folded into the weights ("freezing") where that exists: inference on a CPU."""
    torch._dynamo.reset()  # each case is compiled for itself
    built = build(case, mode)
    freeze = mode == "infer" and case.device.type == "cpu"
    return built._replace(forward=torch.compile(built.forward, options={"freezing": True} if freeze else None))


def _ready(model: nn.Module, mode: str) -> Built:
    model.train(mode == "train")  # dropout is 0 in every config
    model.requires_grad_(mode == "train")
    return Built(model, model)


def converted(case: Case, mode: str) -> Built:
    built = reference("torch.nn", case, mode)
    fastattn.nn.convert(built.module)
    left = [name for name, module in built.module.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    if left:
        raise RuntimeError(f"convert left torch.nn's layers: {', '.join(left)}")
    return built


def of(model: str, device: torch.device) -> list[Provider]:
    """Who runs a model of `shapes.MODELS`."""
    if model != "torch-encoder":
        return providers(device)
    return [
        Provider("torch.nn eager", functools.partial(reference, "eager"), main=True),
        Provider("torch.nn", functools.partial(reference, "torch.nn"), main=True),
        Provider(CONVERTED, converted, True, main=True, uncapturable=COUNTS),
    ]


def providers(device: torch.device) -> list[Provider]:
    """Of BERT and CLIP, as tables order them. Without transformers the reference models' own eager and SDPA are the baselines."""
    installed = importlib.util.find_spec("transformers") is not None
    whose = "Hugging Face" if installed else "reference"
    if installed:
        eager, sdpa = (functools.partial(hugging_face, kind) for kind in ("eager", "sdpa"))
    else:
        eager, sdpa = (functools.partial(reference, kind) for kind in ("eager", "sdpa"))
    linears = "+ oneDNN linears" if device.type == "cpu" else "+ linears and norms"
    found = [Provider(f"{whose} eager", eager, main=True), Provider(f"{whose} SDPA", sdpa, main=True)]
    if installed:
        found.append(Provider("reference eager", functools.partial(reference, "eager")))
    else:
        found.append(Provider("Hugging Face", functools.partial(hugging_face, "eager"), package="transformers"))
    found += [
        Provider("fastattn: attention", functools.partial(reference, ATTENTION_ONLY), True),
        Provider(f"fastattn: {linears}", functools.partial(reference, "fastattn"), True, main=not installed),
        Provider("fastattn: + unpadded", unpadded, True, uncapturable=COUNTS),
    ]
    if installed:
        fast, static = (functools.partial(one, sdpa) for one in (accelerated, accelerated_for_graphs))
        found += [
            Provider("Hugging Face with fastattn", functools.partial(hugging_face, "fastattn"), True),
            Provider(ACCELERATED, fast, True, main=True, static=static),
        ]
    return [*found, *_slow(f"{whose} torch.compile", eager, sdpa, device)]


def _slow(name: str, eager: Build, sdpa: Build, device: torch.device) -> list[Provider]:
    """Who compiles or exports the model first."""
    if device.type != "cpu":
        return [Provider(name, functools.partial(compiled, sdpa), patience=40)]
    onnx, openvino = (functools.partial(_exported, export, eager) for export in (exported.onnx_runtime, exported.openvino))
    return [
        Provider(name, functools.partial(compiled, sdpa), patience=25),
        Provider("ONNX Runtime", onnx, package="onnxruntime", exported=True, patience=15),
        Provider("OpenVINO", openvino, package="openvino", exported=True, patience=15),
    ]


def baseline(names: list[str], kind: str) -> str | None:
    """The name of the "eager" or "SDPA" baseline among those that ran."""
    return next((name for name in BASELINES[kind] if name in names), None)


def _exported(export: Callable, build: Build, case: Case, mode: str) -> Built:
    plain = _Plain(build(case, mode).forward, case)
    return Built(export(plain, case), plain)


class _Plain(nn.Module):
    """A model as exporters want it: positional tensors in, a tuple of tensors out."""

    def __init__(self, model: Forward, case: Case) -> None:
        super().__init__()
        self.model, self.case = model, case

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return exported.plain_outputs(self.model(**dict(zip(self.case.inputs, inputs, strict=True))), self.case)
