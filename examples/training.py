"""What the training examples share: a loop with a progress bar, checkpoints that continue bit for bit, the picture of the loss.

    args = training.parse(training.arguments(__doc__, steps=500, picture=DOCS / "pretrain_bert.png"))
    losses = training.run(model, optimizer, schedule, loss_of, args)

`loss_of()` draws a batch and gives its loss. What it draws comes from PyTorch's default generator, whose state a checkpoint has;
so do the seeds of fastattn's dropout, and a run that continues sees the batches and drops the weights that it would have.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastattn.pictures import check_place

PALE, DARK, GREY = "#cfe2ee", "#2a6f97", "#8a9199"
PLACES = ("out", "checkpoint", "every", "device")  # arguments on which no number of a run depends


def arguments(text: str, steps: int, picture: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=picture, help=f"a .png (default: docs/{picture.name})")
    parser.add_argument("--steps", type=int, default=steps, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--checkpoint", type=Path, help="a file; where it exists, the run continues from it")
    parser.add_argument("--every", type=int, default=100, help="steps from checkpoint to checkpoint (default: %(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, of which the wrong ones end the program with a sentence; and the seed is set."""
    args = parser.parse_args()
    for name in ("steps", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    try:
        for path in filter(None, (args.out, None if args.checkpoint is None else _beside(args.checkpoint))):
            check_place(path)
    except OSError as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    return args


def warm_up(optimizer: torch.optim.Optimizer, steps: int, share: float = 0.1) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over a share of the steps, then falls to 0, both in a straight line."""
    rising = max(1, round(share * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))
    )


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay, biases and the parameters of norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss_of: Callable[[], Tensor],
    args: argparse.Namespace,
) -> list[float]:
    """Train for `args.steps` steps, or for those that a checkpoint leaves; the loss of each, from the first on."""
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses = restore(args.checkpoint, state, args)
    progress = tqdm(range(len(losses), args.steps), initial=len(losses), total=args.steps, desc="steps", disable=None)
    for step in progress:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if args.checkpoint is not None and (step + 1 == args.steps or (step + 1) % args.every == 0):
            save(args.checkpoint, state, losses, args)
    return losses


def save(path: Path, state: dict[str, Any], losses: list[float], args: argparse.Namespace) -> None:
    """Written beside `path` and moved there: a run that dies while it writes leaves the earlier checkpoint whole."""
    generators = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    content = {name: part.state_dict() for name, part in state.items()}
    torch.save({**content, "generators": generators, "losses": losses, "settings": settings(args)}, _beside(path))
    os.replace(_beside(path), path)


def restore(path: Path | None, state: dict[str, Any], args: argparse.Namespace) -> list[float]:
    """Put everything back as it was, the generators too; the losses so far, [] where there is no checkpoint yet.

    Ends the program with a sentence for one of a run with other settings.
    """
    if path is None or not path.exists():
        return []
    content = torch.load(path, weights_only=True, map_location=args.device)
    if content["settings"] != settings(args):
        raise SystemExit(f"{path} is of a run with other settings: {content['settings']}")
    for name, part in state.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["generators"]["cpu"].cpu())
    torch.cuda.set_rng_state_all([x.cpu() for x in content["generators"]["cuda"]])
    return content["losses"]


def settings(args: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(args).items() if name not in PLACES}


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def smooth(losses: Sequence[float], width: int) -> list[float]:
    """The mean of each loss and those before it, `width` at most."""
    return [sum(part) / len(part) for n in range(len(losses)) for part in [losses[max(0, n + 1 - width) : n + 1]]]


def draw_curve(axis: Any, losses: Sequence[float], title: str, lines: dict[str, float] | None = None) -> None:
    """The loss of each step, their running mean, and what to compare them with as dashed lines; on an axis of matplotlib."""
    axis.plot(losses, color=PALE, linewidth=1)
    axis.plot(smooth(losses, max(1, len(losses) // 40)), color=DARK, linewidth=1.8)
    for words, value in (lines or {}).items():
        axis.axhline(value, color=GREY, linestyle="--", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "bottom"}
        axis.annotate(words, (0.5, value), fontsize=8, color=GREY, **place)
    axis.set(xlabel="step", ylabel="loss", title=title)
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)


def save_curve(losses: Sequence[float], title: str, path: Path, lines: dict[str, float] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    draw_curve(axis, losses, title, lines)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
