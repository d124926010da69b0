"""Training with dropout: the examples continue bit for bit and learn, and fastattn's losses are those of plain PyTorch."""

from __future__ import annotations

import importlib
import os
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastattn.dropout import draw_seed, dropout_mask
from fastattn.models.bert import BertConfig, BertForMaskedLM
from fastattn.models.implementations import IMPLEMENTATIONS, Ops
from fastattn.packing import Packing

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {  # example -> arguments of a run of seconds
    "pretrain_bert": [],
    "train_t5": ["--batch", "6"],
    "image_tokens": ["--batch", "2"],
    "train_clip": ["--groups", "1"],
    "caption": ["--batch", "2"],
}
NEEDS = {"image_tokens": "sklearn", "train_clip": "sklearn", "caption": "sklearn"}


@pytest.fixture
def load(monkeypatch):
    """An example as a module, made small."""

    def imported(name):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module(name)
        if name == "pretrain_bert":
            monkeypatch.setattr(module, "TOKENS", 200)
        if name == "image_tokens":
            monkeypatch.setattr(module, "SAMPLES", 1)
        if name == "caption":
            monkeypatch.setattr(module, "JUDGED", 12)
            monkeypatch.setattr(module, "SEEN", 12)
        return module

    yield imported
    for name in ("training", *SMALL):
        sys.modules.pop(name, None)


@pytest.fixture
def run(load, monkeypatch, capsys, tmp_path):
    """The losses of an example, the content of its last checkpoint, and what it printed."""

    def ran(name, *arguments, checkpoint="one.pt"):
        module, losses = load(name), []
        original = module.training.run
        monkeypatch.setattr(module.training, "run", lambda *given: losses.append(original(*given)) or losses[-1])
        where = ["--checkpoint", str(tmp_path / checkpoint), "--out", str(tmp_path / "curve.png")]
        monkeypatch.setattr(sys, "argv", [name, *SMALL[name], *where, *arguments])
        try:
            module.main()
        finally:
            monkeypatch.setattr(module.training, "run", original)
        captured = capsys.readouterr()
        assert captured.err == ""  # no progress bar but on a terminal
        return losses[0], torch.load(tmp_path / checkpoint, weights_only=True), captured.out

    return ran


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("name", SMALL)
def test_a_run_that_was_killed_continues_bit_for_bit(name, run, load, monkeypatch, tmp_path) -> None:
    """Killed right after its first checkpoint; then weights, moments, generators and losses are those of the run that was not."""
    losses, whole, _ = run(name, "--steps", "4", "--every", "4", checkpoint="whole.pt")
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses) and len(set(losses)) == 4
    replace = os.replace

    def killed(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(name, "--steps", "4", "--every", "2", checkpoint="cut.pt")
    monkeypatch.setattr(os, "replace", replace)
    assert len(torch.load(tmp_path / "cut.pt", weights_only=True)["losses"]) == 2
    torch.manual_seed(77)  # what the process has drawn by then does not matter
    losses, continued, printed = run(name, "--steps", "4", "--every", "2", checkpoint="cut.pt")
    assert losses == whole["losses"] and equal(continued, whole)
    assert "wrote " in printed and (tmp_path / "curve.png").stat().st_size > 5000
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_of_other_settings_is_refused(run) -> None:
    run("train_t5", "--steps", "1")
    with pytest.raises(SystemExit, match="one.pt is of a run with other settings: .*'seed': '0'"):
        run("train_t5", "--steps", "1", "--seed", "3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--every", "-1"], "--every must be at least 1, got -1"),
        (["--out", "curve.pdf"], "--out must end in .png, got curve.pdf"),
        (["--out", "a_file/curve.png"], "a_file"),
        (["--checkpoint", "a_file/one.pt"], "a_file"),
        (["--device", "abacus"], "--device: invalid choice: 'abacus'"),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_bad_arguments_end_in_a_sentence(name, arguments, words, load, monkeypatch, capsys, tmp_path) -> None:
    module = load(name)
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--out", "curve.png", *arguments])
    with pytest.raises(SystemExit) as exit:
        module.main()
    *_, sentence = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and words in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_the_learning_rate_warms_up(load) -> None:
    training = load("train_t5").training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = training.warm_up(optimizer, 20), []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:2] == [1.0, 2.0] and rates[2] == 2.0 and optimizer.param_groups[0]["lr"] == 0
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.12


def test_the_running_mean(load) -> None:
    assert load("train_t5").training.smooth([4.0, 2.0, 3.0, 7.0], 2) == [4.0, 3.0, 2.5, 5.0]


def test_numbers_have_their_names(load) -> None:
    module = load("train_t5")
    names = {0: "zero", 13: "thirteen", 40: "forty", 105: "one hundred five", 90_010: "ninety thousand ten"}
    names[777_777] = "seven hundred seventy seven thousand seven hundred seventy seven"
    for n, name in names.items():
        assert " ".join(module.words(n)) == name
    assert max(len(module.words(n)) for n in range(10**module.DIGITS)) == module.MOST - 1
    torch.manual_seed(0)
    assert all(module.is_held_out(n) == held_out for held_out in (True, False) for n in module.draw(50, held_out))


def test_letters_are_hidden_as_bert_hides_them(load) -> None:
    module = load("pretrain_bert")
    torch.manual_seed(0)
    tokens = torch.randint(module.SPECIAL, 100, (20_000,))
    batch = module.hide([torch.tensor([module.BEGIN]), *tokens.split(module.LONGEST)], 100, "cpu")
    told = batch.targets[1:] != -100
    assert batch.targets[0] == -100 and torch.equal(batch.targets[1:][told], tokens[told])
    assert torch.equal(batch.input_ids[1:][~told], tokens[~told])
    shown, own = batch.input_ids[1:][told], tokens[told]
    shares = [told, shown == module.MASK, (shown != module.MASK) & (shown != own)]
    for share, expected in zip(shares, (module.CHOSEN, 0.8, 0.1), strict=True):
        assert abs(float(share.double().mean()) - expected) < 0.025


def test_pixels_do_not_see_what_comes_after_them(load) -> None:
    module = load("image_tokens")
    torch.manual_seed(0)
    model, (tokens, _) = module.Decoder().eval(), module.load()
    changed = tokens[:2, :-1].clone()
    changed[:, 40:] = 0
    with torch.no_grad():
        a, b = model(tokens[:2, :-1]), model(changed)
    torch.testing.assert_close(a[:, :40], b[:, :40], rtol=0, atol=1e-5)
    assert not torch.allclose(a[:, 40:], b[:, 40:], atol=1e-2)


def test_captions_and_questions_of_known_rows(load) -> None:
    """The questions that have one answer, and no other; those of digits that are not there in the same words."""
    module = load("caption")
    there = {
        ((3, 7),): {
            "which digit is on the left": "three", "which digit is on the right": "seven", "what is right of the three": "seven",
            "what is left of the seven": "three", "where is the three": "on the left", "where is the seven": "on the right",
            "is there a three": "yes", "is there a seven": "yes", "how many digits are there": "two",
        },
        ((8,), (8, 2)): {
            "which digit is on top": "eight", "what is left of the two": "eight", "what is above the two": "eight",
            "where is the two": "at the bottom", "is there an eight": "yes", "is there a two": "yes",
            "how many digits are there": "three",
        },
        ((1, 9), (5,)): {
            "which digit is at the bottom": "five", "what is right of the one": "nine", "what is left of the nine": "one",
            "what is below the one": "five", "what is below the nine": "five", "where is the one": "on top",
            "where is the nine": "on top", "where is the five": "at the bottom", "is there a one": "yes",
            "is there a nine": "yes", "is there a five": "yes", "how many digits are there": "three",
        },
    }  # fmt: skip
    captions = ["a three left of a seven", "an eight above an eight left of a two", "a one left of a nine above a five"]
    for (rows, expected), words in zip(there.items(), captions, strict=True):
        assert module.caption(rows) == ("[CAPTION]", words)
        found = {" ".join(given.split()[1:-1]): answer for group in module.questions(rows) for given, answer in group}
        absent = [n for n in range(10) if not any(n in row for row in rows)]
        for n in absent:
            expected[f"is there {module.named(n)}"], expected[f"where is the {module.NAMES[n]}"] = "no", "nowhere"
        assert found == expected


def test_captions_are_of_their_images(load) -> None:
    """Digits drawn as squares of their own shade are found in the image, in the rows and the order of its caption."""
    module = load("caption")
    labels = torch.arange(10)
    shades = (labels[:, None, None, None] + 1.0).expand(10, 1, module.GLYPH, module.GLYPH).clone()
    shades[0, :, 0, 0] = 0  # the ground of every image
    torch.manual_seed(0)
    scenes, shapes = module.draw(module.digits.Images(shades, labels), 60), set()
    for image, (_, said) in zip(scenes.images[:, 0].long(), scenes.texts[:: module.TEXTS], strict=True):
        rows = said.split(" above ")
        shapes.add(tuple(row.count(" of ") + 1 for row in rows))
        for part, row in zip([image] if len(rows) == 1 else image.split(module.CELL), rows, strict=True):
            columns = part.max(0).values
            found = [module.NAMES[shade - 1] for shade in columns[columns > 0].unique_consecutive().tolist()]
            assert found == [name for name, _ in groupby(word for word in row.split() if word in module.NAMES)]
    assert shapes == set(module.SHAPES)


def test_texts_are_written_alike_alone_and_in_a_batch(load) -> None:
    """Beginnings of unequal length, padded; and what is given counts nothing in the loss, what is written all."""
    module = load("caption")
    torch.manual_seed(0)
    model, (glyphs, _) = module.Captioner(width=32, heads=2).eval(), module.digits.load_images()
    torch.nn.init.normal_(model.positions)  # an untrained model that says more than one word
    scenes = module.draw(glyphs, 12)
    said, losses, words = module.write(model, scenes), [], []
    assert len(set(said)) > 3
    for n, (given, answer) in enumerate(scenes.texts):
        memory = model.encode(scenes.images[n // module.TEXTS][None])
        row = [module.IDS[word] for word in given.split()]
        start = len(row)
        while len(row) < module.LONGEST and row[-1] != module.END:
            tokens = torch.tensor([row])
            row.append(int(model.decode(tokens, torch.tensor([len(row)]), memory)[0, -1].argmax()))
        assert said[n] == " ".join(module.WORDS[token] for token in row[start:] if token != module.END)
        whole = torch.tensor([[module.IDS[word] for word in f"{given} {answer} [END]".split()]])
        logits = model.decode(whole[:, :-1], torch.tensor([whole.shape[1] - 1]), memory)[0, start - 1 :]
        losses.append(F.cross_entropy(logits, whole[0, start:], reduction="sum"))
        words.append(whole.shape[1] - start)
    torch.testing.assert_close(module.loss_of(model, scenes), sum(losses) / sum(words))


def test_guesses_without_the_image(load, capsys) -> None:
    module = load("caption")
    seen = [module.Text("[QUESTION] is there a one [ANSWER]", word) for word in ("no", "yes", "no")]
    texts = [module.Text(seen[0].given, "no"), module.Text(seen[0].given, "yes"), module.Text("[CAPTION]", "a one left of a two")]
    blind = module.guesses(texts, seen)
    assert blind == ["no", "no", ""]
    assert module.report(texts, ["yes", "yes", "a one left of a two"], blind) == {
        "captions": 1,
        "questions": 0.5,
        "is there": 0.5,
    }
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[-3:] for row in rows] == [["1", "100.0%", "0.0%"], ["2", "50.0%", "50.0%"], ["2", "50.0%", "50.0%"]]


# Losses against plain PyTorch

STEPS = 30


def plain(drawn: list) -> Ops:
    """Attention in plain PyTorch, which drops what fastattn would drop with the same seeds."""

    def attention(q, k, v, mask, p):
        packing, _ = mask
        q, k, v = (packing.unpack(x).transpose(1, 2) for x in (q, k, v))
        keys = torch.arange(k.shape[2]) < packing.lengths[:, None]
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keys[:, None, None], float("-inf"))
        drawn.append(draw_seed(None, q.device))
        kept = dropout_mask(drawn[-1], *s.shape, p)
        return packing.pack((s.softmax(-1) * kept / (1 - p) @ v).transpose(1, 2))

    return IMPLEMENTATIONS["sdpa"]._replace(attention=attention)


def trained(implementation: str | Ops, seed: int) -> list[float]:
    """Losses of a BERT of ragged sequences, of which attention alone has dropout: from one set of weights on the same batches,
    with dropout from `seed`."""
    torch.manual_seed(0)
    config = BertConfig(
        40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.2, initializer_range=0.15,
    )  # fmt: skip
    model = BertForMaskedLM(config, implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    batches = torch.Generator().manual_seed(1)
    losses = []
    torch.manual_seed(seed)
    for _ in range(STEPS):
        lengths = torch.randint(4, 25, (12,), generator=batches)
        packing = Packing.from_lengths(lengths, 24)
        tokens = (torch.arange(packing.total) + torch.randint(40, (1,), generator=batches)) % 40
        shown = torch.where(torch.rand(tokens.shape, generator=batches) < 0.3, 0, tokens)
        loss = torch.nn.functional.cross_entropy(model(shown, packing=packing).logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_plain_pytorch() -> None:
    """With the same weights dropped as closely as rounding lets them; with others within what seeds differ by."""
    drawn: list = []
    ours, same = torch.tensor(trained("fastattn", 5)), torch.tensor(trained(plain(drawn), 5))
    assert len({int(seed) for seed in drawn}) == 2 * STEPS  # a draw of its own for each call
    others = torch.tensor([trained("sdpa", seed) for seed in (6, 7, 8)])
    assert ours[-5:].mean() < 0.7 * ours[:5].mean()
    noise = (others[0] - others[1]).abs().mean()
    assert noise > 1e-3
    assert (ours - same).abs().max() < noise / 50
    assert (ours - others.mean(0)).abs().mean() < 2 * noise
