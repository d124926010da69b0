"""One model on one batch through every provider: gate against fp64, then a forward pass or a training step, as records."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gate, measure, model_cases, model_providers, results
from benchmarks.budget import Share
from benchmarks.model_cases import Case
from benchmarks.model_providers import Built, Provider
from fastattn import timing

SEQUENCES = 4  # of a training step that the fp64 run takes at a time
TRAINING = "not captured: a training step is timed as called"


class Exact(NamedTuple):
    """What the fp64 run of the reference model on the same weights gives, and the gradients of the outputs that all use."""

    outputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    grads: dict[str, Tensor]  # of the parameters, {} without a training step


class Error(NamedTuple):
    output: float  # largest absolute error of any output
    gradients: dict[str, float]  # relative Frobenius error of each parameter's gradient, {} without a training step

    @property
    def gradient(self) -> float | None:
        return max(self.gradients.values()) if self.gradients else None


class Bound(NamedTuple):
    output: float
    gradients: dict[str, float]


class Measured(NamedTuple):
    rows: list[dict]
    outputs: dict[str, dict[str, Tensor]]  # of each provider that passed


def run(
    case: Case, mode: str, providers: list[Provider], *, seconds: float, share: Share | None = None,
    refuse: Callable[[Provider], str | None] = lambda provider: None,
) -> Measured:  # fmt: skip
    """`refuse` is asked before a provider begins, the main ones first: it gives the words why this one does not, or None."""
    share = share or Share(math.inf)
    exact = exact_run(case, mode)
    accepted: dict[str, tuple[Provider, Built]] = {}
    outputs, errors, rows = {}, {}, []
    bound: Bound | None = None
    for provider in sorted(providers, key=lambda one: not one.main):
        trial, refusal, wrong = _attempt(provider, case, mode, exact, refuse)
        if trial is not None:
            built, outputs[provider.name], errors[provider.name] = trial
            accepted[provider.name] = provider, built
            if provider.name.endswith("eager"):
                bound = _bounds(errors[provider.name], exact, case.dtype, bound)
        else:
            rows.append(_row(case, provider.name, mode, refusal=refusal or None, wrong=wrong or None))
    for name in list(accepted):
        wrong = _judge(errors[name], bound)
        if wrong:
            del accepted[name], outputs[name]
            rows.append(_row(case, name, mode, wrong=wrong, max_error=finite(errors[name].output)))
    calls = {name: _call(built, case, mode, exact) for name, (_, built) in accepted.items()}
    rows += _time(case, mode, calls, errors, share.timing(seconds))
    if case.device.type == "cuda":
        rows = with_graphs(rows, case, mode, accepted, exact, bound, share.timing(seconds))
    order = [provider.name for provider in providers]
    return Measured(sorted(rows, key=lambda row: order.index(row["provider"])), outputs)


def exact_run(case: Case, mode: str) -> Exact:
    """In fp64. A training step goes through it a few sequences at a time, whose gradients add up: its graph is large."""
    state = {name: x.double() for name, x in case.state.items()}
    model = model_cases.reference(case.config, "eager", state).train(mode == "train").requires_grad_(mode == "train")
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.items()}
    g = torch.Generator().manual_seed(0)
    if mode == "infer":
        return Exact(case.outputs(model(**wide)), {}, {})
    sizes = {len(x) for x in wide.values()}
    step = SEQUENCES if len(sizes) == 1 else max(sizes)
    parts, cotangents = [], []
    for rows in (slice(start, start + step) for start in range(0, max(sizes), step)):
        part = dataclasses.replace(case, inputs={name: x[rows] for name, x in wide.items()})
        outputs = part.outputs(model(**part.inputs))
        cotangents.append({name: torch.randn(x.shape, generator=g).to(case.device, case.dtype) for name, x in outputs.items()})
        torch.autograd.backward(list(outputs.values()), [c.double() for c in cotangents[-1].values()])
        parts.append({name: x.detach() for name, x in outputs.items()})
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return Exact(_joined(parts), _joined(cotangents), grads)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _attempt(provider: Provider, case: Case, mode: str, exact: Exact, refuse: Callable[[Provider], str | None]):
    """((built, outputs, errors), None, None), or (None, the refusal, what is wrong) with one of the two empty."""
    if provider.package is not None and importlib.util.find_spec(provider.package) is None:
        return None, f"{provider.package} is not installed", ""
    if provider.exported and (mode == "train" or case.dtype != torch.float32):
        return None, "not run: exported models are measured in float32 inference alone", ""
    refused = refuse(provider)
    if refused:
        return None, refused, ""
    trial, refusal = measure.attempt(lambda: _trial(provider, case, mode, exact))
    if trial is None and measure.is_failure(provider.ours, refusal):
        return None, "", refusal
    return trial, refusal, ""


def _trial(provider: Provider, case: Case, mode: str, exact: Exact) -> tuple[Built, dict[str, Tensor], Error]:
    built = provider.build(case, mode)
    with torch.set_grad_enabled(mode == "train"):
        outputs = case.outputs(built.forward(**case.inputs))
    output_error = _output_error(outputs, exact)
    if mode == "infer":
        return built, outputs, Error(output_error, {})
    torch.autograd.backward(list(outputs.values()), list(exact.cotangents.values()))
    errors = _gradient_errors(built.module, exact.grads)
    built.module.zero_grad()
    return built, {name: x.detach() for name, x in outputs.items()}, Error(output_error, errors)


def _output_error(outputs: dict[str, Tensor], exact: Exact) -> float:
    return max(float((outputs[name].double() - x).abs().max()) for name, x in exact.outputs.items())


def _gradient_errors(module: torch.nn.Module, exact: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter: a small gradient is held to its own size, so that a fault in it does not hide behind the large ones.

    One that is zero but for rounding, as that of a key's bias (softmax does not see it), is held to the size of all together.
    """
    norms = {name: float(x.norm()) for name, x in exact.items()}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {}
    for name, parameter in module.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        difference = found.double() - exact[name] if name in exact else found.double()  # unused parameters have none, or zeros
        norm = norms.get(name, 0.0)
        errors[name] = float(difference.norm()) / (norm if norm > 1e-10 * total else total)
    missing = exact.keys() - errors.keys()
    if missing:
        raise ValueError(f"the model lacks parameters of the reference: {', '.join(sorted(missing))}")
    return errors


def _bounds(error: Error, exact: Exact, dtype: torch.dtype, known: Bound | None) -> Bound:
    """From eager runs in the dtype, the worse one where there are two; an eager run that is itself out of scale sets none."""
    scale = max(float(x.abs().max()) for x in exact.outputs.values())
    limit = gate.eager_limit(scale, dtype)
    if not error.output <= limit:
        return known or Bound(limit, dict.fromkeys(error.gradients, gate.eager_limit(1.0, dtype)))
    gradients = {name: gate.model_bound(found, 1.0, dtype) for name, found in error.gradients.items()}
    bound = Bound(gate.model_bound(error.output, scale, dtype), gradients)
    if known is None:
        return bound
    return Bound(max(bound.output, known.output), {name: max(x, known.gradients[name]) for name, x in gradients.items()})


def _judge(error: Error, bound: Bound | None) -> str | None:
    if bound is None:
        return "no eager run to compare with"
    if not error.output <= bound.output:
        return f"max error {error.output:.3e} over {bound.output:.3e}"
    for name, found in error.gradients.items():
        if not found <= bound.gradients[name]:
            return f"relative error of the gradient of {name} {found:.3e} over {bound.gradients[name]:.3e}"
    return None


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _call(built: Built, case: Case, mode: str, exact: Exact) -> timing.Call:
    forward: Callable = built.forward
    if mode == "infer":
        return torch.no_grad()(lambda: forward(**case.inputs))
    cotangents = list(exact.cotangents.values())

    def step() -> None:
        built.module.zero_grad()
        torch.autograd.backward(list(case.outputs(forward(**case.inputs)).values()), cotangents)

    return step


def _time(case: Case, mode: str, calls: dict[str, timing.Call], errors: dict[str, Error], seconds: float) -> list[dict]:
    samples = timing.interleaved(calls, case.device, seconds=seconds, least=3 if seconds else 2)
    eager, sdpa = (model_providers.baseline(list(calls), kind) for kind in ("eager", "SDPA"))
    flops, moved = case.work(mode)
    rows = []
    for name, taken in samples.items():
        ms = taken.median
        row = _row(
            case, name, mode,
            ms_median=ms, ms_p20=taken.quantile(0.2), ms_p80=taken.quantile(0.8), rounds=len(taken.ms),
            method=taken.method, host_us=taken.host_us,
            tokens_per_s=case.fields()["tokens"] / ms * 1e3, peak_bytes=measure.peak_bytes(calls[name], case.device),
            ratio_vs_eager=timing.speedup(taken, samples[eager]) if eager else None,
            ratio_vs_sdpa=timing.speedup(taken, samples[sdpa]) if sdpa else None,
            useful_flops=flops, useful_bytes=moved,
            max_error=errors[name].output, gradient_error=errors[name].gradient,
        )  # fmt: skip
        rows.append(row)
    return rows


def with_graphs(
    rows: list[dict], case: Case, mode: str, accepted: dict[str, tuple[Provider, Built]], exact: Exact, bound: Bound | None,
    seconds: float,
) -> list[dict]:  # fmt: skip
    """The rows; those that have a time with that of a CUDA graph of the same call beside it, or why there is none."""
    if mode == "train":
        graphs = {name: _without_graph(TRAINING) for name in accepted}
    else:
        graphs = captured(case, accepted, exact, bound, seconds)
    return [row if row["ms_median"] is None else {**row, **graphs[row["provider"]]} for row in rows]


def captured(
    case: Case, accepted: dict[str, tuple[Provider, Built]], exact: Exact, bound: Bound | None, seconds: float
) -> dict[str, dict]:
    """Fields of each provider's row. A graph is held to the same bound, by what its last replay has left in its outputs."""
    calls: dict[str, list[timing.Call]] = {}
    results_of: dict[str, object] = {}
    fields = {}
    for name, (provider, built) in accepted.items():
        build = functools.partial(provider.static, case, "infer") if provider.static else lambda built=built: built
        found, refusal = (None, provider.uncapturable) if provider.uncapturable else measure.attempt(build)
        if found is not None:
            calls[name] = [functools.partial(_keep, results_of, name, found.forward, case)]
        else:
            failed = measure.is_failure(provider.ours, refusal) and not provider.uncapturable
            fields[name] = {**_without_graph(refusal), **({"wrong": refusal} if failed else {})}
    samples = timing.kernels(dict(calls), case.device, seconds=seconds, graphs_alone=True)
    sdpa = model_providers.baseline([name for name, taken in samples.items() if taken.ms], "SDPA")
    for name, taken in samples.items():
        fields[name] = _without_graph(taken.reason or "")
        if taken.ms:
            wrong = _judge(Error(_output_error(case.outputs(results_of[name]), exact), {}), bound)
            ratio = timing.speedup(taken, samples[sdpa]) if sdpa else None
            fields[name] = {"captured_ms": taken.median, "captured_refusal": None, "captured_ratio_vs_sdpa": ratio}
            fields[name] |= {**_without_graph(wrong), "wrong": f"in a CUDA graph: {wrong}"} if wrong else {}
    return fields


def _without_graph(why: str) -> dict:
    return {"captured_ms": None, "captured_refusal": why, "captured_ratio_vs_sdpa": None}


@torch.no_grad()
def _keep(results_of: dict[str, object], name: str, forward: Callable, case: Case) -> None:
    """What a capture makes here is memory that each replay writes again."""
    results_of[name] = forward(**case.inputs)


def _row(case: Case, provider: str, mode: str, **fields) -> dict:
    device = results.device_name(case.device)
    dropout = {"dropout": case.dropout} if mode == "train" else {}
    return results.record(**case.fields(), provider=provider, device=device, mode=mode, **dropout, **fields)
