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


class Provider(NamedTuple):
    name: str
    build: Callable[[Case, str], Built]  # (case, "infer" or "train"); raises its refusal
    ours: bool = False
    package: str | None = None
    exported: bool = False  # runs fp32 inference alone
    patience: float = 0.0  # seconds that building it may take: it is left out where less of the budget remains


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
    with no_init_weights():  # seconds of random numbers, all of which the case's weights replace
        model = transformers.AutoModel.from_config(config, attn_implementation=attention, **extra)
    model.to(case.device, case.dtype).load_state_dict(case.state)
    return _ready(model, mode)


def accelerated(build: Callable[[Case, str], Built], case: Case, mode: str) -> Built:
    built = build(case, mode)
    fastattn.accelerate(built.module, strict=True)
    return built


def graphed(build: Callable[[Case, str], Built], case: Case, mode: str) -> Built:
    """CUDA graphs by torch.compile, which need static shapes: as many packed rows as there are real tokens, in steps of 64."""
    if mode == "train":
        raise NotImplementedError("not run: CUDA graphs are measured in inference alone")
    torch._dynamo.reset()
    built = build(case, mode)
    fastattn.accelerate(built.module, strict=True, capacity=-(-int(case.lengths[0].sum()) // 64) * 64)
    return built._replace(forward=torch.compile(built.forward, mode="reduce-overhead"))


def compiled(build: Callable[[Case, str], Built], case: Case, mode: str) -> Built:
    """With constants folded into the weights ("freezing") where that exists: inference on a CPU."""
    torch._dynamo.reset()  # each case is compiled for itself
    built = build(case, mode)
    freeze = mode == "infer" and case.device.type == "cpu"
    return built._replace(forward=torch.compile(built.forward, options={"freezing": True} if freeze else None))


def _ready(model: nn.Module, mode: str) -> Built:
    model.train(mode == "train")  # dropout is 0 in every config
    model.requires_grad_(mode == "train")
    return Built(model, model)


def providers(device: torch.device) -> list[Provider]:
    """In the order of the tables. Without transformers the reference models' own eager and SDPA are the baselines."""
    installed = importlib.util.find_spec("transformers") is not None
    whose = "Hugging Face" if installed else "reference"
    if installed:
        eager, sdpa = (functools.partial(hugging_face, kind) for kind in ("eager", "sdpa"))
    else:
        eager, sdpa = (functools.partial(reference, kind) for kind in ("eager", "sdpa"))
    linears = "+ oneDNN linears" if device.type == "cpu" else "+ linears and norms"
    found = [Provider(f"{whose} eager", eager), Provider(f"{whose} SDPA", sdpa)]
    if installed:
        found.append(Provider("reference eager", functools.partial(reference, "eager")))
    else:
        found.append(Provider("Hugging Face", functools.partial(hugging_face, "eager"), package="transformers"))
    found += [
        Provider("fastattn: attention", functools.partial(reference, ATTENTION_ONLY), True),
        Provider(f"fastattn: {linears}", functools.partial(reference, "fastattn"), True),
        Provider("fastattn: + unpadded", unpadded, True),
        Provider(f"{whose} torch.compile", functools.partial(compiled, sdpa), patience=25 if device.type == "cpu" else 40),
    ]
    if installed:
        found[-1:-1] = [
            Provider("Hugging Face with fastattn", functools.partial(hugging_face, "fastattn"), True),
            Provider("Hugging Face with fastattn.accelerate", functools.partial(accelerated, sdpa), True),
        ]
    if installed and device.type == "cuda":
        name = "Hugging Face with fastattn.accelerate and CUDA graphs"
        found.append(Provider(name, functools.partial(graphed, sdpa), True, patience=20))
    if device.type == "cpu":
        for name, export, package in (
            ("ONNX Runtime", exported.onnx_runtime, "onnxruntime"),
            ("OpenVINO", exported.openvino, "openvino"),
        ):
            build = functools.partial(_exported, export, eager)
            found.append(Provider(name, build, package=package, exported=True, patience=15))
    return found


def baseline(names: list[str], kind: str) -> str | None:
    """The name of the "eager" or "SDPA" baseline among those that ran."""
    return next((name for who in ("Hugging Face", "reference") for name in names if name == f"{who} {kind}"), None)


def _exported(export: Callable, build: Callable[[Case, str], Built], case: Case, mode: str) -> Built:
    plain = _Plain(build(case, mode).forward, case)
    return Built(export(plain, case), plain)


class _Plain(nn.Module):
    """A model as exporters want it: positional tensors in, a tuple of tensors out."""

    def __init__(self, model: Forward, case: Case) -> None:
        super().__init__()
        self.model, self.case = model, case

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return exported.plain_outputs(self.model(**dict(zip(self.case.inputs, inputs, strict=True))), self.case)
