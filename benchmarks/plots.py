"""One picture of a suite: a panel per model, mode and fill, a bar per provider."""

from __future__ import annotations

from pathlib import Path

OURS, THEIRS, BASELINE = "#2a6f97", "#b8bec4", "#8d99a6"
COLUMNS = 3


def draw(records: list[dict], path: Path, title: str) -> str:
    """Write the PNG and say so, or say why not."""
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
    size = (5.2 * COLUMNS, (0.9 + 0.3 * bars) * lines)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, name, rows)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"wrote {path}"


def panel_rows(records: list[dict]) -> dict[str, list[dict]]:
    """Timed rows by panel title."""
    panels: dict[str, list[dict]] = {}
    for row in records:
        if row["ms_median"] is not None:
            layers = (
                "" if row.get("full_layers") in (None, row["layers"]) else f" ({row['layers']} of {row['full_layers']} layers)"
            )
            title = f"{row['model']}{layers}, {row['batch']}×{row['seq']}, {row['fill']:.0%} full, {row['mode']}, {row['dtype']}"
            panels.setdefault(title, []).append(row)
    return panels


def _panel(axis, name: str, rows: list[dict]) -> None:
    names = [row["provider"] for row in rows]
    times = [row["ms_median"] for row in rows]
    colours = [OURS if "fastattn" in n else BASELINE if n.endswith(("eager", "SDPA")) else THEIRS for n in names]
    low = [row["ms_median"] - row["ms_p20"] for row in rows]
    high = [row["ms_p80"] - row["ms_median"] for row in rows]
    axis.barh(names, times, color=colours, xerr=(low, high), error_kw={"ecolor": "#444444", "elinewidth": 0.8})
    axis.invert_yaxis()
    for position, row in enumerate(rows):
        ratio = "" if row["ratio_vs_eager"] is None else f"  {row['ratio_vs_eager']:.2f}x"
        axis.text(row["ms_p80"], position, f"  {row['ms_median']:.3g} ms{ratio}", va="center", fontsize=8)
    axis.set_xlim(0, max(row["ms_p80"] for row in rows) * 1.45)
    axis.set_title(name, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
