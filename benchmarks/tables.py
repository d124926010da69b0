"""One result file as Markdown: a line per case, a column per provider, and what a reader must know beside them."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import results

NO_TIME = ("not run", "not timed", "not captured")  # how words begin that are no refusal of the provider's
APART = 0.07  # a ratio of paired rounds and that of the two medians may differ by this much before a cell says so
FLAG = "†"
FLAG_NOTE = f"{FLAG} more than {APART:.0%} away from the ratio of the two cells, whose medians are of different rounds."
CPU_NOTE = (
    "No kernel of fastattn's runs in this table: its CPU backend calls PyTorch's own flash-attention kernel on real tokens, and "
    "oneDNN's linears with the activation fused."
)
MASKS_CPU_NOTE = (
    "No kernel of fastattn's runs in this table: its CPU backend calls PyTorch's own flash-attention kernel for each block of "
    "queries, on the keys that the block sees."
)
TRAINING_NOTE = (
    "fastattn is given a seed, and held to fp64 with the very weights that it drops. The others draw their own: they are held to "
    "fp64 without dropout, and with it to the mean and the variance of the sums of their weights. “bits” is the draw alone, once "
    "for a forward and its backward; it is in the forward's time. Where a bias and a mask have to be one tensor, making it is in "
    "the call."
)
FAMILIES_NOTE = (
    "Random weights in the sizes of a common checkpoint; float32, inference. As it comes, attention is PyTorch's SDPA; of "
    "classes for which transformers has none, it is what stands beside the time."
)
FAMILIES_CPU_NOTE = (
    "No kernel of fastattn's runs in this table: its CPU backend calls PyTorch's own flash-attention kernel, or where there is a "
    "bias of distances PyTorch's products for blocks of rows, and oneDNN's linears with the activation fused."
)
CAPTURED_NOTE = "“captured” is the replay of a CUDA graph of the same call: the time without the host."
TRAIN_NOTE = "Training steps have no dropout: `benchmarks.models` sets it to 0; `benchmarks.finetune` times a step with it."
OTHER_TRAIN_NOTE = "Training steps have no dropout in attention."  # of a run that says no more
LEGEND = {  # provider -> what its column is
    "reference eager": "“reference eager”: `fastattn.models`, attention in plain PyTorch",
    "fastattn: attention": "“fastattn: attention”: the same model with fastattn's attention",
    "fastattn: + oneDNN linears": "“+ oneDNN linears”: and linears of packed weights with the activation fused",
    "fastattn: + linears and norms": "“+ linears and norms”: and fastattn's linears and norms",
    "fastattn: + unpadded": "“+ unpadded”: and real tokens alone, packed and unpacked in each call",
    "Hugging Face with fastattn": '“Hugging Face with fastattn”: `attn_implementation="fastattn"`',
    "Hugging Face with fastattn.accelerate": "“Hugging Face with fastattn.accelerate”: real tokens alone, where there is padding",
    "Hugging Face with fastattn.accelerate and CUDA graphs": "“and CUDA graphs”: captured by torch.compile, in a static capacity",
}


class Baseline(NamedTuple):
    """Whom a case's cells are compared with, and the field of a record that holds the ratio of paired rounds, if one does."""

    provider: str
    field: str | None = None


class Unit(NamedTuple):
    name: str
    of_ms: float  # how many make a millisecond

    def text(self, ms: float) -> str:
        """Three digits."""
        value = ms * self.of_ms
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


MS, US = Unit("ms", 1), Unit("us", 1000)
SDPA, EAGER = Baseline("SDPA", "ratio_vs_sdpa"), Baseline("eager", "ratio_vs_eager")
MODELS = (Baseline("Hugging Face SDPA", "ratio_vs_sdpa"), Baseline("reference SDPA", "ratio_vs_sdpa"))
BASELINES = {  # suite -> the first that stands among a case's providers
    "models": MODELS,
    "highlights": MODELS,
    "finetune": MODELS,
    "ops": (SDPA, EAGER),  # eager is what everybody has of an FFN and a norm
    "masks": (SDPA,),
    "training": (SDPA,),
    "kernels": (Baseline("SDPA cudnn"),),  # what PyTorch chooses on an H100
    "encode": (Baseline("sentence-transformers", "ratio"),),
    "guards": (Baseline("told that nothing has changed", "ratio"),),
    "families": (Baseline("as it comes", "ratio"),),
    "layers": (Baseline("torch.nn", "ratio_vs_sdpa"),),
}
HIGHLIGHTS = {  # kind of device -> (models, providers) of the README's table
    "cpu": (
        ("minilm", "bert-base"),
        ("SDPA", "with fastattn.accelerate", "torch.compile", "ONNX Runtime", "OpenVINO"),
    ),
    "gpu": (
        ("bert-base", "clip-vit-b-32"),
        ("SDPA", "with fastattn", "with fastattn.accelerate", "torch.compile"),
    ),
}


def section(suite: str, content: dict) -> str:
    """A result file: what was measured on, notes, the table, legends and footnotes."""
    if suite == "refusals":
        rows = [[row["provider"], escape(row["answer"]), *asked_errors(row)] for row in content["refusals"]]
        return "\n".join([head(content), "", *markdown(["provider", "answer", "error forward", "backward"], rows)])
    if suite == "tests":
        columns = "commit", "command", "passed", "failed", "skipped"
        rows = [[escape(str(row[name])) for name in columns] + ["yes" if row["cut"] else ""] for row in content["records"]]
        return "\n".join([content["device"], "", *markdown([*columns, "cut before its end"], rows)])
    records, left_out = results.without_leaks(content["records"])
    records = highlights(records) if suite == "highlights" else records
    unit = MS if on_cpu(content) or suite not in ("kernels", "ops", "masks", "training") else US
    if suite == "families":
        table, footnotes = families(records, BASELINES[suite][0])
    else:
        table, footnotes = comparison(results.with_captured(records), BASELINES[suite], unit)
    paragraphs = [head(content), *([left_out] if left_out else []), *notes_on(suite, content, records), "\n".join(table)]
    return "\n\n".join([*paragraphs, *(["\n".join(footnotes)] if footnotes else [])])


def asked_errors(row: dict) -> list[str]:
    """Of the output, and the greatest of the gradients; empty where the weights that were dropped are not known."""
    errors = row.get("errors")
    return ["", ""] if not errors else [f"{errors['out']:.2f}", f"{max(e for name, e in errors.items() if name != 'out'):.2f}"]


def notes_on(suite: str, content: dict, records: list[dict]) -> list[str]:
    """What a reader must know of these rows, a paragraph each."""
    notes = []
    if on_cpu(content) and suite in ("models", "highlights", "ops", "encode", "layers"):
        notes.append(CPU_NOTE)
    if on_cpu(content) and suite == "masks":
        notes.append(MASKS_CPU_NOTE)
    if suite == "training":
        notes.append(TRAINING_NOTE)
    if suite == "families":
        notes += [*([FAMILIES_CPU_NOTE] if on_cpu(content) else []), FAMILIES_NOTE]
    if suite != "highlights" and any(row["mode"] == "train" and not row.get("dropout") for row in records):
        notes.append(TRAIN_NOTE if content["command"].startswith("python -m benchmarks.models") else OTHER_TRAIN_NOTE)
    if any(map(results.was_captured, records)):
        notes.append(CAPTURED_NOTE)
    legends = [words for provider, words in LEGEND.items() if any(row["provider"] == provider for row in records)]
    if suite == "models" and legends:
        notes.append("; ".join(legends) + ".")
    if suite == "models" and content.get("left_out"):
        notes.append(f"Not measured in this run: {', '.join(content['left_out'])}.")
    return notes


def head(content: dict) -> str:
    """The device, versions, commit and command of a result file."""
    versions = content["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name))
    command = content["command"]
    command = f"`{command}`" if command.startswith("python") else command
    cut = "" if content.get("complete", True) else "; the run was cut, this is what it had"
    return f"{content['device']}; {known}; commit {content['commit']}; {command}{cut}"


def on_cpu(content: dict) -> bool:
    return "threads" in content["device"]


def highlights(records: list[dict]) -> list[dict]:
    """The most telling models and providers, in the dtype that was measured first."""
    if not records:
        return []
    models, providers = HIGHLIGHTS["cpu" if "threads" in records[0]["device"] else "gpu"]
    return [
        row
        for row in records
        if row["model"] in models
        and row["dtype"] == records[0]["dtype"]
        and row["provider"].removeprefix("Hugging Face ").removeprefix("reference ") in providers
    ]


def comparison(records: list[dict], baselines: tuple[Baseline, ...], unit: Unit) -> tuple[list[str], list[str]]:
    """(Markdown lines, footnotes): a line per case, a column per provider; cells hold times, and how often the baseline's."""
    providers = list(dict.fromkeys(row["provider"] for row in records))
    notes: list[str] = []
    lines: list[list[str]] = []
    used: dict[str, None] = {}  # in order
    kinds: set[bool] = set()
    for name, found in cases(records).items():
        baseline = baseline_of(found, baselines)
        if baseline is not None:
            used[baseline.provider] = None
            kinds |= {paired(row, baseline) is not None for row in found.values() if row["ms_median"] is not None}
        lines.append([name, *(cell(provider, found, baseline, unit, notes) for provider in providers)])
    kept = [n for n in range(len(providers)) if any(line[n + 1] not in ("", "–") for line in lines)]
    lines = [[line[0], *(line[n + 1] for n in kept)] for line in lines]
    return markdown([unit.name + _legend(list(used), kinds), *(providers[n] for n in kept)], lines), _footnotes(lines, notes)


def families(records: list[dict], baseline: Baseline) -> tuple[list[str], list[str]]:
    """(Markdown lines, footnotes): a line per model."""
    notes: list[str] = []
    lines = []
    for name in dict.fromkeys(row["model"] for row in records):
        found = {row["provider"]: row for row in records if row["model"] == name}
        plain = found[baseline.provider]
        beside = "" if plain["ms_median"] is None or plain["implementation"] == "sdpa" else f", {plain['implementation']}"
        own, ours = cell(baseline.provider, found, None, MS, notes), cell("accelerated", found, baseline, MS, notes)
        lines.append([f"`{name}`", *_sizes(plain), own + beside, ours])
    columns = ["transformers' class", "layers", "batch × length", f"{baseline.provider}, ms"]
    return markdown([*columns, "accelerated, ms (x = times faster; median of paired rounds)"], lines), _footnotes(lines, notes)


def _sizes(row: dict) -> list[str]:
    """Of a family's layers and of its batch; nothing is known where transformers lacks the class."""
    if row["hidden"] is None:
        return ["", ""]
    of_layers = f"{layers(row)[0]}, width {row['hidden']}, {row['heads']} heads, FFN {row['intermediate']}"
    real = "" if row["fill"] == 1 else f", {row['fill']:.0%} real"
    return [of_layers, f"{row['batch']} × {row['seq']}{real}"]


def _footnotes(lines: list[list[str]], notes: list[str]) -> list[str]:
    flagged = any(FLAG in text for line in lines for text in line)
    return [*([FLAG_NOTE + "  "] if flagged else []), *(f"[{n + 1}] {note}  " for n, note in enumerate(notes))]


def _legend(whom: list[str], paired_kinds: set[bool]) -> str:
    """What a cell's ratio is."""
    if not whom:
        return ""
    kinds = {frozenset((True,)): "median of paired rounds", frozenset((False,)): "ratio of medians"}
    kind = kinds.get(frozenset(paired_kinds), "median of paired rounds, else ratio of medians")
    return f" (x = times faster than {', else than '.join(whom)}; {kind})"


def cases(records: list[dict]) -> dict[str, dict[str, dict]]:
    """Case -> provider -> row."""
    found: dict[str, dict[str, dict]] = {}
    for row in records:
        found.setdefault(case_name(row), {})[row["provider"]] = row
    return found


def case_name(row: dict) -> str:
    size = f"{row['batch']} × {row['seq']}" if row["seq"] is not None else f"{row['tokens']} tokens"
    parts = [row["op"]] if "op" in row else []
    parts += [row["model"] + (", causal" if row.get("causal") else ""), *layers(row), size]
    if "visible" in row:
        parts.append(f"{row['visible']:.0%} of pairs visible")
    elif row["fill"] != 1:
        parts.append(f"{row['fill']:.0%} real tokens")
    return ", ".join([*parts, row["dtype"], row["mode"]])


def layers(row: dict) -> list[str]:
    """How many, and of how many, where the record says so."""
    if row.get("full_layers") is None:
        return []
    of = "" if row["layers"] == row["full_layers"] else f" of {row['full_layers']}"
    return [f"{row['layers']}{of} layers"]


def baseline_of(found: dict[str, dict], baselines: tuple[Baseline, ...]) -> Baseline | None:
    return next((baseline for baseline in baselines if baseline.provider in found), None)


def paired(row: dict, baseline: Baseline) -> float | None:
    return row[baseline.field] if baseline.field is not None else None


def ratio(row: dict, found: dict[str, dict], baseline: Baseline | None) -> tuple[float, bool] | None:
    """(times faster than the baseline, whether the two medians say something else); None where there is none to compare with.

    The ratio of paired rounds, where there were such, is what the run's drift does not touch; else that of the medians.
    """
    against = found[baseline.provider]["ms_median"] if baseline is not None else None
    if baseline is None or against is None or row["ms_median"] is None:
        return None
    of_medians = against / row["ms_median"]
    of_rounds = paired(row, baseline)
    if of_rounds is None:
        return of_medians, False
    return of_rounds, not 1 - APART <= of_rounds / of_medians <= 1 + APART


def cell(provider: str, found: dict[str, dict], baseline: Baseline | None, unit: Unit, notes: list[str]) -> str:
    """The time and the ratio, bold where fastest of a whole line; a footnote's number where it refused; a dash where it is not
    installed."""
    row = found.get(provider)
    if row is None:
        return ""
    if row["ms_median"] is None:
        return _without_a_time(row, notes)
    known = ratio(row, found, baseline)
    text = unit.text(row["ms_median"]) + ("" if known is None else f" ({known[0]:.2f}x{FLAG * known[1]})")
    fastest = min(other["ms_median"] for other in found.values() if other["ms_median"] is not None)
    alone = len(found) == 1 and baseline is None
    known_fastest = row["ms_median"] == fastest and not alone and not any(other.get("left_out") for other in found.values())
    return f"**{text}**" if known_fastest else text


def _without_a_time(row: dict, notes: list[str]) -> str:
    if row.get("left_out"):
        return "left out"
    words = row["wrong"] or row["refusal"] or ""
    if words.endswith("is not installed"):
        return "–"
    if not words:
        return ""
    note = f"{row['provider']}: {escape(words)}"
    if note not in notes:
        notes.append(note)
    verdict = "wrong" if row["wrong"] else next((said for said in NO_TIME if words.startswith(said)), "refused")
    return f"{verdict} [{notes.index(note) + 1}]"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
