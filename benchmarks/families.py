"""What `accelerate` gives each family of encoders on this device: `python -m benchmarks.families`.

A few layers with the sizes of a common checkpoint and random weights, in inference and fp32: the model of transformers as it
comes, and the same accelerated, in turns. What the second gives is held to a run in fp64 before it is timed, and where the
model's own code ran, whole or in part, there is no time for it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from benchmarks import family_cases, gate, measure, model_measure, results, selection
from benchmarks.family_cases import Case, Inputs
from fastattn import timing
from fastattn.integrations.accelerate_forward import Report

PLAIN, OURS = "as it comes", "accelerated"
FFN_WIDTHS = ("intermediate_size", "hidden_dim", "encoder_ffn_dim", "d_ff")  # what configs call it
COLUMNS = {"model": "", "layers": "", "hidden": "", "batch": "", "seq": "", "fill": ".2f", "provider": "", "implementation": "",
           "ms_median": ".1f", "ratio": ".2f", "max_error": ".1e"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--only", help="names or parts of names of transformers' classes, comma-separated")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each family (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run of small batches; written only where --out says")
    parser.add_argument("--out", type=Path, help="folder of results; default benchmarks/results")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [case.name for case in family_cases.CASES]
    chosen = names if args.only is None else selection.chosen(args.only, names, "--only")
    cases = [case for case in family_cases.CASES if case.name in chosen]
    records: list[dict] = []
    for case in results.progress(cases, "families"):
        records += run(case._replace(batch=1) if args.quick else case, 0.0 if args.quick else args.seconds, device)
    results.print_table(records, COLUMNS)
    if args.out or not args.quick:
        print(f"wrote {results.write(records, 'families', device, quick=args.quick, out=args.out)}")
    wrong = results.failures(records)
    for row in wrong:
        print(f"WRONG: {row['model']}: {row['wrong']}", file=sys.stderr)
    return 1 if wrong else 0


def run(case: Case, seconds: float, device: torch.device) -> list[dict]:
    """A row for each of the two; words in place of a time for one that is not timed."""
    cls, missing = measure.attempt(case.transformers_class)
    if cls is None:
        fields = {"model": case.name, "batch": case.batch, "device": results.device_name(device)}
        return [results.record(**fields, provider=name, refusal=f"not run: {missing}") for name in (PLAIN, OURS)]
    config, full_layers = case.config(cls)
    plain = family_cases.build(cls, config).to(device)
    given = {name: x.to(device) for name, x in case.given(config, case.batch).items()}
    ours = copy.deepcopy(plain)
    exact = exact_outputs(plain, given)
    errors = {PLAIN: errors_of(outputs(plain, given), exact)}
    tried, refusal = measure.attempt(functools.partial(accelerated, ours, given))
    if tried is None:
        untimed = {"wrong" if measure.is_failure(True, refusal) else "refusal": refusal}
    else:
        report, found = tried
        errors[OURS] = errors_of(found, exact)
        untimed = judged(errors, exact)
    calls = {name: called(model, given) for name, model in ((PLAIN, plain), (OURS, ours)) if name == PLAIN or not untimed}
    samples = timing.interleaved(calls, device, seconds=seconds, least=5 if seconds else 2)
    if tried is not None:
        untimed = untimed or own_code(report)  # in a call that was timed, too
    fields = described(case, plain, full_layers, given, exact) | {"device": results.device_name(device)}
    rows = [_row(fields, name, samples, errors[name]) for name in samples if name == PLAIN or not untimed]
    return rows + ([results.record(**fields, provider=OURS, **untimed)] if untimed else [])


@torch.inference_mode()
def outputs(model: nn.Module, given: Inputs) -> dict[str, Tensor]:
    """What is compared: hidden states, which at padding are nobody's result and become 0, and what is pooled of them."""
    found = model(**given)
    pooled = found.get("pooler_output")
    hidden = found.last_hidden_state
    if "input_ids" in given:
        hidden = hidden * real_tokens(given, hidden.shape[1])[..., None]
    return {"last_hidden_state": hidden, **({} if pooled is None else {"pooler_output": pooled})}


def real_tokens(given: Inputs, length: int) -> Tensor:
    """(batch, length): those of the text, and all of an image that follows it."""
    mask = given["attention_mask"]
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


def exact_outputs(model: nn.Module, given: Inputs) -> dict[str, Tensor]:
    """Of the same weights in fp64."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    return outputs(copy.deepcopy(model).double(), wide)


def errors_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name].double() - x).abs().max()) for name, x in exact.items()}


def accelerated(model: nn.Module, given: Inputs) -> tuple[Report, dict[str, Tensor]]:
    """What was done to it, and what its second call gives: in the first, layers are computed both ways."""
    handle = fastattn.accelerate(model)
    outputs(model, given)
    return handle.report, outputs(model, given)


def judged(errors: dict[str, dict[str, float]], exact: dict[str, Tensor]) -> dict[str, str]:
    """What is wrong with the accelerated model's outputs, by the rule that whole models are held to, or {}."""
    for name, x in exact.items():
        scale, plain, ours = float(x.abs().max()), errors[PLAIN][name], errors[OURS][name]
        limit = gate.eager_limit(scale, torch.float32)
        bound = gate.model_bound(plain, scale, torch.float32) if plain <= limit else limit
        if not ours <= bound:
            return {"wrong": f"{name}: max error {ours:.3e} over {bound:.3e}"}
    return {}


def own_code(report: Report) -> dict[str, str]:
    """The report's own words where the model's own code ran, or {}."""
    left = [f"{name or 'model'}: {why}" for name, why in report.left.items()]
    said = [*left, *report.fallbacks] or ([] if report.accelerated else ["nothing was accelerated"])
    return {"refusal": f"not timed: the model's own code ran: {'; '.join(said)}"} if said else {}


def called(model: nn.Module, given: Inputs) -> timing.Call:
    return torch.inference_mode()(functools.partial(model, **given))


def described(case: Case, model: Any, full_layers: int, given: Inputs, exact: dict[str, Tensor]) -> dict:
    """What a record says of the model and its input. tokens: real ones, of sounds as many as samples are; of a model in stages
    sizes are the last one's."""
    config = model.config
    batch, seq = exact["last_hidden_state"].shape[0], case.length or exact["last_hidden_state"].shape[1]
    heads, ratio = config.num_attention_heads, getattr(config, "mlp_ratio", 4)  # which is in XLM's code
    layers = full_layers if hasattr(config, "depths") else config.num_hidden_layers
    mask = real_tokens(given, seq) if "input_ids" in given else given.get("attention_mask")
    fill = 1.0 if mask is None else float(mask.float().mean())
    width = next((getattr(config, name) for name in FFN_WIDTHS if hasattr(config, name)), None)
    return {
        "model": case.name, "layers": layers, "full_layers": full_layers, "hidden": config.hidden_size,
        "heads": heads if isinstance(heads, int) else heads[-1], "intermediate": width or int(ratio * config.hidden_size),
        "implementation": config._attn_implementation, "input_source": "seeded random", "dtype": "float32", "mode": "infer",
        "batch": batch, "seq": seq, "fill": round(fill, 3), "tokens": round(batch * seq * fill),
    }  # fmt: skip


def _row(fields: dict, name: str, samples: dict[str, timing.Samples], errors: dict[str, float]) -> dict:
    taken = samples[name]
    return results.record(
        **fields, provider=name, ms_median=taken.median, ms_p20=taken.quantile(0.2), ms_p80=taken.quantile(0.8),
        rounds=len(taken.ms), method=taken.method, host_us=taken.host_us, tokens_per_s=fields["tokens"] / taken.median * 1e3,
        ratio=timing.speedup(taken, samples[PLAIN]), max_error=model_measure.finite(max(errors.values())),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
