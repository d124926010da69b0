"""README.md and docs, written from result files: `python -m benchmarks.report`, and `--check` for CI.

A table stands between `<!-- table: SUITE-DEVICE -->` and `<!-- /table -->`. DEVICE is a folder of benchmarks/results such as
h100, or cpu for every folder that begins with "cpu-". SUITE is a result file's name (`tests` holds counts, of tests and of
`verify`), or `highlights`, some rows of `models`, or `refusals`, which the suite `training` records, or `verdict-` and a result
file's name: sentences. Some are of no device: `plans-compiled`, from the kernels' tiles, `families-transformers` and
`families-names`, from what `accelerate` goes by. The pictures of docs/benchmarks.md are drawn anew with it where their
result file changed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import encoders, plans, plots, results, tables, verdicts

DOCS = results.ROOT.parent / "docs"
FILES = (results.ROOT.parent / "README.md", DOCS / "benchmarks.md", DOCS / "accelerate.md", DOCS / "layers.md")
COMPUTED = {  # from no result file: a table's head, and what gives its rows
    "plans-compiled": (plans.HEAD, plans.rows),
    "families-transformers": (encoders.HEAD, encoders.rows),
    "families-names": (encoders.NAMES, encoders.names),
}
FROM = {"refusals": "training", "highlights": "models"}  # suites that are a part of another's file
MARKERS = re.compile(r"(<!-- table: (?P<suite>[\w-]+)-(?P<device>\w+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
NOT_MEASURED = "Not yet measured."
VERDICTS = {"models": verdicts.models, "kernels": verdicts.kernels, "ops": verdicts.held, "encode": verdicts.encode}
PICTURED = ("models", "kernels")


def render(text: str, folder: Path) -> str:
    """A file's text with every table made anew from the result files in `folder`."""
    return MARKERS.sub(lambda m: m[1] + table(m["suite"], m["device"], folder) + "\n" + m[5], text)


def table(suite: str, device: str, folder: Path) -> str:
    """The body of one table, with what it was measured on above it."""
    if (computed := COMPUTED.get(f"{suite}-{device}")) is not None:
        head, rows = computed
        return "\n".join(tables.markdown(head, rows()))
    parts = [part(suite, path, content) for path, content in found(suite, device, folder)]
    return "\n\n".join(text for text in parts if text) or NOT_MEASURED


def found(suite: str, device: str, folder: Path) -> list[tuple[Path, dict]]:
    """The result files of a table. A quick run is none."""
    pattern = "cpu-*" if device == "cpu" else device
    name = FROM.get(suite, suite.removeprefix("verdict-"))
    contents = [(path, results.read(path)) for path in sorted(folder.glob(f"{pattern}/{name}.json"))]
    return [(path, content) for path, content in contents if not content["quick"]]


def part(suite: str, path: Path, content: dict) -> str:
    """What one result file adds to a table: "" where it has nothing of this suite."""
    if suite == "refusals" and not content.get("refusals"):
        return ""
    if suite.startswith("verdict-"):
        records, _ = results.without_leaks(content["records"])
        lines = VERDICTS[suite.removeprefix("verdict-")](records)
        return "\n".join([f"{content['device']}, commit {content['commit']}:", "", *(f"- {line}." for line in lines)])
    text = tables.section(suite, content)
    return f"{text}\n\n![{suite} on {content['device']}]({picture(suite, path).name})" if suite in PICTURED else text


def picture(suite: str, path: Path) -> Path:
    """Where the picture of a result file lies."""
    return DOCS / f"{suite}-{path.parent.name}.png"


def pictures(folder: Path, check: bool) -> list[str]:
    """Draw what a result file does not agree with, or only look; what is still wrong, in sentences."""
    drawn, wrong = set(), []
    for suite in PICTURED:
        for path, content in found(suite, "*", folder):
            target = picture(suite, path)
            drawn.add(target)
            if not check and not plots.is_of(target, content["records"]):
                print(plots.draw(content["records"], target, suite))
            if not plots.is_of(target, content["records"]):
                wrong.append(f"{target} does not show {path}: run python -m benchmarks.report")
    others = {path for suite in PICTURED for path in DOCS.glob(f"{suite}-*.png")} - drawn
    return wrong + [f"{path} belongs to no result file: delete it" for path in sorted(others)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a file differs from the result files; write nothing")
    parser.add_argument("--readme", type=Path, help="one file, in place of README.md, those of docs and the pictures")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    wrong = []
    for path in [args.readme] if args.readme else FILES:
        old = path.read_text(encoding="utf-8")
        new = render(old, args.results)
        if args.check and old != new:
            wrong.append(f"{path} differs from the result files: run python -m benchmarks.report")
        elif not args.check:
            path.write_text(new, encoding="utf-8")
    if not args.readme:
        wrong += pictures(args.results, args.check)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
