"""One picture of a suite: a panel per case, a bar per provider."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path

from benchmarks import results, tables

OURS, THEIRS, BASELINE = "#2a6f97", "#b8bec4", "#8d99a6"
COLUMNS, WIDTH = 3, 5.6  # of panels, in inches
TITLE = 52  # characters of a line above a panel


def draw(records: list[dict], path: Path, suite: str) -> str:
    """Write the PNG and say so, or say why not. The records' stamp goes into the file."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = panel_rows(records)
    if not panels:
        return "no picture: nothing was timed"
    lines = -(-len(panels) // COLUMNS)
    bars = max(len(rows) for rows in panels.values())
    size = (WIDTH * COLUMNS, (1.1 + 0.3 * bars) * lines)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    unit = tables.US if min(row["ms_median"] for rows in panels.values() for row in rows.values()) < 0.1 else tables.MS
    baselines = {name: tables.baseline_of(rows, tables.BASELINES.get(suite, tables.MODELS)) for name, rows in panels.items()}
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, name, rows, baselines[name], unit)
    whom = dict.fromkeys(baseline.provider for baseline in baselines.values() if baseline)
    figure.suptitle(f"{records[0]['device']}: {explanation(panels, unit, list(whom))}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Description": stamp(records)})
    pyplot.close(figure)
    return f"wrote {path}"


def stamp(records: list[dict]) -> str:
    """What a picture shows, in short: other rows, or another way to draw them, have another stamp."""
    shown = Path(__file__).read_text(encoding="utf-8") + json.dumps(panel_rows(records))
    return "records " + hashlib.sha256(shown.encode()).hexdigest()


def is_of(path: Path, records: list[dict]) -> bool:
    """Whether the picture was drawn from these records. A PNG holds its description as it is."""
    return path.exists() and stamp(records).encode() in path.read_bytes()


def panel_rows(records: list[dict]) -> dict[str, dict[str, dict]]:
    """Case -> provider -> row, timed rows alone."""
    kept, _ = results.without_leaks(records)
    return tables.cases([row for row in results.with_captured(kept) if row["ms_median"] is not None])


def explanation(panels: dict[str, dict[str, dict]], unit: tables.Unit, whom: list[str]) -> str:
    """What bars, whiskers and numbers are."""
    rows = [row for found in panels.values() for row in found.values()]
    name = "microseconds" if unit is tables.US else "milliseconds"
    whiskers = "; whiskers: 20th to 80th percentile of the rounds" if any(row["ms_p20"] is not None for row in rows) else ""
    ratios = f"; x: times faster than {', else than '.join(whom)}" if whom else ""
    return f"{name}, medians, shorter is better{whiskers}{ratios}"


def _panel(axis, name: str, rows: dict[str, dict], baseline: tables.Baseline | None, unit: tables.Unit) -> None:
    times = [row["ms_median"] * unit.of_ms for row in rows.values()]
    colours = [OURS if "fastattn" in n else BASELINE if n.endswith(("eager", "SDPA")) else THEIRS for n in rows]
    ends = [_percentiles(row, unit) for row in rows.values()]
    low = [time - end[0] for time, end in zip(times, ends, strict=True)]
    high = [end[1] - time for time, end in zip(times, ends, strict=True)]
    axis.barh(list(rows), times, color=colours, xerr=(low, high), error_kw={"ecolor": "#444444", "elinewidth": 0.8})
    axis.invert_yaxis()
    for position, row in enumerate(rows.values()):
        known = tables.ratio(row, rows, baseline) if baseline else None
        faster = "" if known is None else f"  {known[0]:.2f}x"
        axis.text(ends[position][1], position, f"  {unit.text(row['ms_median'])}{faster}", va="center", fontsize=8)
    axis.set_xlim(0, max(end for _, end in ends) * 1.4)
    axis.set_title(textwrap.fill(name, TITLE), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _percentiles(row: dict, unit: tables.Unit) -> tuple[float, float]:
    """The ends of a row's whiskers: its own time where the record has none."""
    known = (row["ms_p20"], row["ms_p80"]) if row["ms_p20"] is not None else (row["ms_median"],) * 2
    return known[0] * unit.of_ms, known[1] * unit.of_ms
