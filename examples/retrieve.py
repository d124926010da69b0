"""Find the images that fit a caption best: a small CLIP, accelerated, among handwritten digits that it was not trained on.

    python examples/retrieve.py                                      # the 30 best images for each digit, in docs/retrieve.png
    python examples/retrieve.py --template "an image of {}" --k 10

The model is Hugging Face's CLIPModel with the weights that examples/train_digits_clip.py made; nothing is downloaded.
`pip install '.[bench]'` has everything it needs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from torch import Tensor

import fastattn
from fastattn.models import digits
from fastattn.pictures import check_place

DOCS = Path(__file__).parent.parent / "docs"
MOST = 50  # images for each caption; there are fewer of any digit
RIGHT, WRONG = "#2a6f97", "#c8553d"


@torch.no_grad()
def rank(model: transformers.CLIPModel, images: digits.Images, template: str) -> tuple[Tensor, Tensor]:
    """For each of the ten captions: indices of the images, the best first, (10, images), and whether they show its digit."""
    input_ids, attention_mask = digits.captions(template)
    scores = model(input_ids=input_ids, pixel_values=images.pixel_values, attention_mask=attention_mask).logits_per_text
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order, images.labels[order] == torch.arange(len(digits.NAMES))[:, None]


def draw(images: digits.Images, order: Tensor, right: Tensor, template: str, path: Path) -> None:
    """A row per caption: its best images from left to right, those of another digit framed and named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (rows, k), known = order.shape, images.labels.bincount(minlength=len(digits.NAMES))
    width, height = max(7.2, 1.6 + 0.36 * k), 0.6 + 0.46 * rows  # inches
    figure, axes = pyplot.subplots(rows, k, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(left=1.5 / width, right=0.995, top=1 - 0.5 / height, bottom=0.01, hspace=0.35)
    for row in range(rows):
        for column in range(k):
            axis, index = axes[row, column], order[row, column]
            axis.imshow(-images.pixel_values[index, 0].numpy(), cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=RIGHT if right[row, column] else WRONG, linewidth=0.7 if right[row, column] else 2.5)
            if not right[row, column]:
                axis.set_title(f"✗ {images.labels[index]}", fontsize=7, color=WRONG, pad=1.5)
        label = f"“{digits.NAMES[row]}”  {right[row].sum()} of its {known[row]}"
        axes[row, 0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center", labelpad=6)
    caption = template.format("…")
    figure.suptitle(f"the {k} held-out images nearest to “{caption}”, best first; ✗ shows another digit", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "retrieve.png", help="a .png (default: docs/retrieve.png)")
    parser.add_argument("--k", type=int, default=30, help="images for each caption (default: %(default)s)")
    parser.add_argument("--template", choices=digits.TEMPLATES, default=digits.TEMPLATES[0], help="(default: %(default)r)")
    args = parser.parse_args()
    if not 1 <= args.k <= MOST:
        parser.error(f"--k must be from 1 to {MOST}, got {args.k}")
    if args.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    try:
        check_place(args.out)
    except OSError as error:
        parser.error(str(error))
    _, images = digits.load_images()

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # CLIP's defaults for tokens that are not in this vocabulary
    model = transformers.CLIPModel.from_pretrained(digits.DIRECTORY).eval()
    handle = fastattn.accelerate(model, strict=True)
    print(f"{handle.report}\n")

    order, right = rank(model, images, args.template)
    known = images.labels.bincount(minlength=len(digits.NAMES))
    print(f"{len(images.labels)} held-out images\n{'caption':<42} {'images of it':>12} {f'precision@{args.k}':>14}")
    for name, count, hits in zip(digits.NAMES, known, right[:, : args.k], strict=True):
        print(f"{args.template.format(name):<42} {count:>12} {hits.double().mean():>14.3f}")
    for k in sorted({1, min(10, args.k), min(20, args.k), args.k}):
        print(f"mean precision@{k}: {right[:, :k].double().mean():.3f}")
    draw(images, order[:, : args.k], right[:, : args.k], args.template, args.out)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
