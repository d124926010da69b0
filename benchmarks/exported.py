"""Models exported to ONNX Runtime and OpenVINO, fp32 inference on a CPU."""

from __future__ import annotations

import io
import logging
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model_cases import Case

BERT_OUTPUTS, CLIP_OUTPUTS = ("last_hidden_state",), ("text_embeds", "image_embeds")


def plain_outputs(result, case: Case) -> tuple[Tensor, ...]:
    return tuple(getattr(result, name) for name in _names(case))


def onnx_runtime(model: nn.Module, case: Case):
    """Session options are ONNX Runtime's defaults, with PyTorch's number of threads."""
    import onnxruntime

    buffer: Any = io.BytesIO()  # accepted, though the annotation of export says otherwise
    names = list(case.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, tuple(case.inputs.values()), buffer, input_names=names, output_names=_names(case), dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])

    def forward(**inputs: Tensor) -> SimpleNamespace:
        return _result(session.run(None, {name: x.numpy() for name, x in inputs.items()}), case)

    return forward


def openvino(model: nn.Module, case: Case):
    """In fp32, which must be asked for: OpenVINO's own default is bf16 where the processor has it."""
    import openvino as ov

    logging.getLogger("openvino").setLevel(logging.ERROR)
    graph = ov.convert_model(model, example_input=tuple(case.inputs.values()))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = ov.Core().compile_model(graph, "CPU", settings)

    def forward(**inputs: Tensor) -> SimpleNamespace:
        found = compiled([x.numpy() for x in inputs.values()])
        return _result([found[n] for n in range(len(_names(case)))], case)

    return forward


def _result(arrays, case: Case) -> SimpleNamespace:
    return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in zip(_names(case), arrays, strict=True)})


def _names(case: Case) -> list[str]:
    return list(CLIP_OUTPUTS if case.is_clip else BERT_OUTPUTS)
