"""The tables of README.md and docs/speed.md, written from result files: `python -m benchmarks.report`, and `--check` for CI.

A table stands between `<!-- table: SUITE-DEVICE -->` and `<!-- /table -->`. DEVICE is a folder of benchmarks/results such as
h100, or cpu for every folder that begins with "cpu-". SUITE is a result file's name, or `highlights`, some rows of `models`, or
`refusals`, which `ops` records, or `plans`, which is computed from the kernels' tiles.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import plans, results

DOCS = results.ROOT.parent / "docs"
FILES = (results.ROOT.parent / "README.md", DOCS / "speed.md")
FROM = {"refusals": "ops", "highlights": "models"}  # suites that are a part of another's file
MARKERS = re.compile(r"(<!-- table: (?P<suite>[\w-]+)-(?P<device>\w+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
NOT_MEASURED = "Not yet measured."
CPU_NOTE = (
    "No kernel of fastattn's runs in this table: its CPU backend calls PyTorch's own flash-attention kernel on real tokens "
    "(“attention”) and oneDNN's linears with the activation fused (“+ oneDNN linears”)."
)
MASKS_CPU_NOTE = (
    "No kernel of fastattn's runs in this table: its CPU backend calls PyTorch's own flash-attention kernel for each block of "
    "queries, on the keys that the block sees."
)
UNPADDED_NOTE = (
    "“+ unpadded” computes real tokens alone: each call packs its input and unpacks its output, both in the time. So does "
    "“Hugging Face with fastattn.accelerate”, where there is padding."
)
BASELINES = {"ratio_vs_eager": "eager"}  # field -> whom a cell is compared with
HIGHLIGHTS = ("Hugging Face SDPA", "Hugging Face with fastattn.accelerate")
MUCH_PADDING = 0.6  # share of real tokens of the highlights' rows, at most
SUITE_BASELINES = {
    "highlights": {"ratio_vs_sdpa": "SDPA"},
    "masks": {**BASELINES, "ratio_vs_sdpa": "SDPA"},
    "encode": {"ratio": "sentence-transformers alone"},
    "guards": {"ratio": "told that nothing has changed"},
}


def render(text: str, folder: Path) -> str:
    """A file's text with every table made anew from the result files in `folder`."""
    return MARKERS.sub(lambda m: m[1] + table(m["suite"], m["device"], folder) + "\n" + m[5], text)


def table(suite: str, device: str, folder: Path) -> str:
    """The body of one table, with what it was measured on above it."""
    if suite == "plans":
        return "\n".join(markdown(plans.HEAD, plans.rows()))
    found = [(path, results.read(path)) for path in paths(suite, device, folder)]
    parts = [section(suite, content) + picture(suite, path) for path, content in found if not content["quick"]]
    return "\n\n".join(parts) if parts else NOT_MEASURED


def paths(suite: str, device: str, folder: Path) -> list[Path]:
    pattern = "cpu-*" if device == "cpu" else device
    return sorted(folder.glob(f"{pattern}/{FROM.get(suite, suite)}.json"))


def section(suite: str, content: dict) -> str:
    """One result file as Markdown."""
    versions = content["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name))
    cpu = content["device"] if not content["records"] else content["records"][0]["device"]
    head = f"{cpu}; {known}; commit {content['commit']}; `{content['command']}`"
    if suite == "refusals":
        rows = [[row["provider"], escape(row["answer"])] for row in content.get("refusals", [])]
        return "\n".join([head, "", *markdown(["provider", "answer"], rows)])
    records = highlights(content["records"]) if suite == "highlights" else content["records"]
    note = {"masks": MASKS_CPU_NOTE, "guards": None, "highlights": None}.get(suite, CPU_NOTE)
    above = [note] if note and "threads" in cpu else []
    if any(row["provider"].endswith("+ unpadded") for row in records):
        above.append(UNPADDED_NOTE)
    table, notes = comparison(records, SUITE_BASELINES.get(suite, BASELINES))
    return "\n".join([head, *(line for text in above for line in ("", text)), "", *table, *(["", *notes] if notes else [])])


def highlights(records: list[dict]) -> list[dict]:
    """Whole models on batches that are much padded, in the dtype that was measured first."""
    dtype = records[0]["dtype"] if records else None
    return [row for row in records if row["provider"] in HIGHLIGHTS and row["dtype"] == dtype and row["fill"] <= MUCH_PADDING]


def picture(suite: str, path: Path) -> str:
    """A link, from a file in docs, to the plot that the run left there, if it did."""
    name = f"{suite}-{path.parent.name}.png"
    return f"\n\n![{suite}: milliseconds per provider]({name})" if (DOCS / name).exists() else ""


def comparison(records: list[dict], baselines: dict[str, str]) -> tuple[list[str], list[str]]:
    """(Markdown lines, footnotes): a line per case, a column per provider; cells hold ms and times faster than the baselines."""
    providers = list(dict.fromkeys(row["provider"] for row in records))
    cases: dict[str, dict[str, dict]] = {}
    for row in records:
        cases.setdefault(case_name(row), {})[row["provider"]] = row
    notes: list[str] = []
    lines: list[list[str]] = []
    for name, found in cases.items():
        fastest = min((row["ms_median"] for row in found.values() if row["ms_median"] is not None), default=None)
        lines.append([name, *(cell(found.get(provider), fastest, notes, baselines) for provider in providers)])
    kept = [n for n in range(len(providers)) if any(line[n + 1] not in ("", "–") for line in lines)]
    lines = [[line[0], *(line[n + 1] for n in kept)] for line in lines]
    head = [f"ms (x = times faster than {', than '.join(baselines.values())})", *(providers[n] for n in kept)]
    return markdown(head, lines), [f"[{n + 1}] {note}  " for n, note in enumerate(notes)]


def case_name(row: dict) -> str:
    layers = ""
    if row.get("full_layers") is not None:
        layers = (
            f", {row['layers']} layers"
            if row["layers"] == row["full_layers"]
            else f", {row['layers']} of {row['full_layers']} layers"
        )
    size = f"{row['batch']} × {row['seq']}" if row["seq"] is not None else f"{row['tokens']} tokens"
    fill = "" if row["fill"] == 1 else f", {row['fill']:.0%} real tokens"
    fill = fill if "visible" not in row else f", {row['visible']:.0%} of pairs visible"
    op = f"{row['op']}, " if "op" in row else ""
    return f"{op}{row['model']}{layers}, {size}{fill}, {row['dtype']}, {row['mode']}"


def cell(row: dict | None, fastest: float | None, notes: list[str], baselines: dict[str, str]) -> str:
    """Milliseconds and ratios, bold where fastest; a footnote's number where it refused; a dash where it is not installed."""
    if row is None:
        return ""
    if row["ms_median"] is None:
        words = row["wrong"] or row["refusal"] or ""
        if words.endswith("is not installed"):
            return "–"
        note = f"{row['provider']}: {escape(words)}"
        if note not in notes:
            notes.append(note)
        verdict = "wrong" if row["wrong"] else "not run" if words.startswith("not run") else "refused"
        return f"{verdict} [{notes.index(note) + 1}]"
    ratios = [f"{row[field]:.2f}x" if row[field] is not None else "–" for field in baselines]
    ratio = "" if all(row[field] is None for field in baselines) else f" ({', '.join(ratios)})"
    text = f"{row['ms_median']:.3g}{ratio}" if row["ms_median"] < 1000 else f"{row['ms_median']:.0f}{ratio}"
    return f"**{text}**" if row["ms_median"] == fastest else text


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a file differs from the result files; write nothing")
    parser.add_argument("--readme", type=Path, help="one file, in place of README.md and docs/speed.md")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    differ = False
    for path in [args.readme] if args.readme else FILES:
        old = path.read_text(encoding="utf-8")
        new = render(old, args.results)
        differ = differ or old != new
        if args.check and old != new:
            print(f"{path} differs from the result files: run python -m benchmarks.report", file=sys.stderr)
        elif not args.check:
            path.write_text(new, encoding="utf-8")
    return int(args.check and differ)


if __name__ == "__main__":
    sys.exit(main())
