"""Pictures of masks: which query sees which key, and which tiles a kernel skips."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fastattn import masks
from fastattn.lowering import EMPTY, FULL, tile_status
from fastattn.masks import Mask

M, N, TILE = 40, 40, 8  # kernels take larger tiles; these can be told apart by eye
COLUMNS = 4
SHADES = ("#ffffff", "#e3e6ea", "#7fb2d0", "#2a6f97")  # hidden, hidden in a skipped tile, visible, visible in a full tile


def examples() -> dict[str, Mask]:
    """The expression that makes a mask, and the mask, for one sequence of 40 queries and keys."""
    ids = torch.tensor([[0] * 13 + [1] * 16 + [2] * 8 + [-1] * 3])
    keep = torch.arange(40)[None] >= 11
    lengths = torch.tensor([29])
    return {
        "full()": masks.full(),
        "causal()": masks.causal(),
        "window(6, 2)": masks.window(6, 2),
        "padding([29])": masks.padding(lengths),
        "padding([29], [29])": masks.padding(lengths, lengths),
        "key_padding(keep)": masks.key_padding(keep),
        "prefix_lm([12])": masks.prefix_lm([12]),
        "documents(ids)": masks.documents(ids),
        "rows(4, 8, prefix=8)": masks.rows(4, 8, prefix=8),
        "columns(4, 8, prefix=8)": masks.columns(4, 8, prefix=8),
        "conv(4, 8, 3, prefix=8)": masks.conv(4, 8, 3, prefix=8),
        "dense(random)": masks.dense(torch.rand(1, 1, M, N, generator=torch.Generator().manual_seed(0)) < 0.3),
        "causal() & padding([29])": masks.causal() & masks.padding(lengths),
        "documents(ids) & causal()": masks.documents(ids) & masks.causal(),
        "window(3, 3) | padding([5])": masks.window(3, 3) | masks.padding([5]),
        "window(9, None) & prefix_lm([16])": masks.window(9, None) & masks.prefix_lm([16]),
    }


def draw(folder: Path) -> list[Path]:
    """Write a PNG for each example and a sheet of all; returns their paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    shown = examples()
    paths = []
    for name, mask in shown.items():
        figure, axis = pyplot.subplots(figsize=(3.2, 3.4), layout="constrained")
        _panel(axis, name, mask)
        paths.append(folder / f"{_file_name(name)}.png")
        figure.savefig(paths[-1], dpi=110)
        pyplot.close(figure)
    lines = -(-len(shown) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(3 * COLUMNS, 3.15 * lines), squeeze=False, layout="constrained")
    for axis, (name, mask) in zip(axes.flat, shown.items(), strict=False):
        _panel(axis, name, mask)
    figure.suptitle("query (down) sees key (across); white and blue: computed, dark: computed without a mask, grey: skipped")
    paths.append(folder / "masks.png")
    figure.savefig(paths[-1], dpi=80)
    pyplot.close(figure)
    return paths


def shades(mask: Mask) -> torch.Tensor:
    """An index into SHADES for each pair, (M, N)."""
    visible = mask.dense(1, 1, M, N)[0, 0]
    pairs = mask.pairs(M, N, None)
    status = tile_status(mask.lower(M, N), M, N, None, pairs, TILE, TILE)[0, 0]
    status = status.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:M, :N]
    return torch.where(visible, torch.where(status == FULL, 3, 2), torch.where(status == EMPTY, 1, 0))


def _panel(axis, name: str, mask: Mask) -> None:
    from matplotlib.colors import ListedColormap

    axis.imshow(shades(mask).numpy(), cmap=ListedColormap(SHADES), vmin=0, vmax=3, interpolation="nearest")
    axis.set_title(name, fontsize=9, family="monospace")
    axis.set_xticks(range(0, N, TILE))
    axis.set_yticks(range(0, M, TILE))
    axis.tick_params(labelsize=6, length=2)
    for n in range(TILE, N, TILE):
        axis.axvline(n - 0.5, color="#c3c8ce", linewidth=0.4)
        axis.axhline(n - 0.5, color="#c3c8ce", linewidth=0.4)


def _file_name(expression: str) -> str:
    """The names and numbers in an expression, joined."""
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in expression).split())


def check_place(path: Path) -> None:
    """Make the folder of a file that is to be written. Raises OSError if it cannot be, which is better known before the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.open("ab").close()
    else:
        tempfile.TemporaryFile(dir=path.parent).close()
