"""The trained CLIP of digits: its accuracy, its equality with Hugging Face's, and the script that trains it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from fastattn.models import digits
from fastattn.models.clip import CLIPModel
from fastattn.models.implementations import IMPLEMENTATIONS

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_digits_accuracy(implementation):
    _, held_out = digits.load_images()
    model = CLIPModel.from_pretrained(digits.DIRECTORY, implementation=implementation)
    assert model.config.text_config.eos_token_id == digits.END != 2
    accuracies = [digits.zero_shot_accuracy(model, held_out, template) for template in digits.TEMPLATES]
    assert min(accuracies) >= 0.95, accuracies


@torch.no_grad()
def test_digits_logits_equal_those_of_transformers():
    _, held_out = digits.load_images()
    input_ids, mask = digits.captions()
    expected = transformers.CLIPModel.from_pretrained(digits.DIRECTORY)(input_ids, held_out.pixel_values, mask)
    for implementation in IMPLEMENTATIONS:
        result = CLIPModel.from_pretrained(digits.DIRECTORY, implementation)(input_ids, held_out.pixel_values, mask)
        torch.testing.assert_close(result.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-4)


def test_digits_split_and_captions():
    train, held_out = digits.load_images()
    assert (len(train.labels), len(held_out.labels)) == (1497, 300)
    assert held_out.labels.bincount(minlength=10).min() >= 20
    input_ids, mask = digits.tokenize(["a b"])
    assert input_ids[0, :6].tolist() == [digits.START, 4, 3, 5, digits.END, digits.PAD]
    assert mask[0].tolist() == [1] * 5 + [0] * (digits.MAX_TOKENS - 5)
    for caption in ("Upper case", "a" * digits.MAX_TOKENS):
        with pytest.raises(ValueError, match="caption"):
            digits.tokenize([caption])


def test_training_example_runs(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parent.parent / "examples" / "train_digits_clip.py"
    monkeypatch.setattr("sys.argv", [str(script), "--epochs", "1", "--batch", "500", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert "held-out images" in capsys.readouterr().out
    model, start = CLIPModel.from_pretrained(tmp_path), CLIPModel.from_pretrained(digits.DIRECTORY)
    assert model.config == start.config
