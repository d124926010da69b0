"""A CLIP for scikit-learn's handwritten digits: captions, images, held-out split and accuracy, for its training and its tests.

The trained weights lie in `fastattn/data/digits_clip`; `examples/train_digits_clip.py` makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.models.clip import CLIPModel

DIRECTORY = Path(__file__).parent.parent / "data" / "digits_clip"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}", "an image of {}", "the number {} written by hand")

# One token per character. An end-of-text id of 2 would mean something else to CLIP: see `CLIPTextModel.end_of_text`.
PAD, START, FIRST_CHARACTER = 0, 1, 3
CHARACTERS = " abcdefghijklmnopqrstuvwxyz"
END = FIRST_CHARACTER + len(CHARACTERS)
VOCAB_SIZE = END + 1
MAX_TOKENS = 40
HELD_OUT = 6  # every sixth image is held out: 300 of 1797


class Images(NamedTuple):
    pixel_values: Tensor  # (images, 1, 8, 8) fp32, of mean 0 and deviation 1 over the training images
    labels: Tensor  # (images,) int64


def tokenize(captions: list[str]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (captions, MAX_TOKENS) int64 each, padded on the right.

    Raises ValueError for a caption that is too long or has a character other than a space or a small letter.
    """
    input_ids = torch.full((len(captions), MAX_TOKENS), PAD)
    for row, caption in enumerate(captions):
        if len(caption) + 2 > MAX_TOKENS or not set(caption) <= set(CHARACTERS):
            raise ValueError(f"a caption has at most {MAX_TOKENS - 2} small letters and spaces, got {caption!r}")
        tokens = [START, *(FIRST_CHARACTER + CHARACTERS.index(c) for c in caption), END]
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
    return input_ids, (input_ids != PAD).long()


def captions(template: str = TEMPLATES[0]) -> tuple[Tensor, Tensor]:
    """The tokens of ten captions, one per digit in order."""
    return tokenize([template.format(name) for name in NAMES])


def load_images() -> tuple[Images, Images]:
    """scikit-learn's digits (Alpaydin & Kaynak, 1998) as training and held-out images. The split has no randomness."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    train = pixels[~held_out]
    pixels = (pixels - train.mean()) / train.std()
    return Images(pixels[~held_out], labels[~held_out]), Images(pixels[held_out], labels[held_out])


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, images: Images, template: str = TEMPLATES[0]) -> float:
    """The share of images whose nearest caption names their digit: CLIP's zero-shot protocol, with no classifier trained.

    The captions were among those of the training; the held-out images were not. The model should be in evaluation mode.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask = (x.to(device) for x in captions(template))
    nearest = model(input_ids, images.pixel_values.to(device), attention_mask).logits_per_image.argmax(1)
    return (nearest.cpu() == images.labels).double().mean().item()
