"""What a newcomer copies from README.md and docs: code that runs, commands that parse, links that lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastattn

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
MOST_LINES = 250  # two screens for a newcomer; the rest is for docs
TABLE = re.compile(r"<!-- table: .*?<!-- /table -->", re.DOTALL)


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def commands() -> list[str]:
    """`python -m ...` of every page, but for those in tables, which are of runs that were."""
    found = [re.findall(r"`(python -m [^`]*)`", TABLE.sub("", path.read_text())) for path in PAGES]
    return sorted({command for of_page in found for command in of_page})


class Parsed(Exception):
    """The arguments were understood."""


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, heading = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
        assert not heading or heading in anchors, link


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command, monkeypatch):
    """Up to the moment at which they would begin."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    _, _, module, *arguments = shlex.split(command.replace("--out DIR", "--out out"))
    name = "fastattn.__main__" if module == "fastattn" else module
    with pytest.raises(Parsed):
        importlib.import_module(name).main(arguments)


def test_the_first_code_runs():
    names: dict = {}
    exec(blocks(README)[0], names)
    q, lengths, out = names["q"], names["lengths"], names["out"]
    assert out.shape == q.shape and all(bool((out[b, :, n:] == 0).all()) for b, n in enumerate(lengths.tolist()))
    assert bool((out[-1, :, : lengths[-1]] != 0).all())


def test_code_that_accelerates_a_model_runs(capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    names = {"fastattn": fastattn, "model": transformers.BertModel(config).eval()}
    code = next(code for code in blocks(README) if "accelerate" in code)
    exec(code, names)
    assert "real tokens alone" in capsys.readouterr().out
    names["handle"].restore()


def ported() -> list[tuple[str, str]]:
    """The first code of both cells, of those lines of the porting table whose left cell is a call."""
    section = README.read_text().split("## Porting")[1].split("## ")[0]
    cells = re.findall(r"^\| `([^`]*)`[^|]*\| `([^`]*)`", section, re.MULTILINE)
    return [(left, right) for left, right in cells if left.endswith(")")]


@pytest.mark.parametrize(("left", "right"), ported())
def test_both_sides_of_the_porting_table_agree(left, right):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16) for n in (6, 9, 9))
    names = {
        "F": F, "fastattn": fastattn, "masks": fastattn.masks, "flash_attn_varlen_func": one_by_one, "q": q, "k": k, "v": v,
        "keep": torch.arange(9) < torch.tensor([9, 5])[:, None, None, None], "d": 16,
        "x": torch.randn(6, 16), "residual": torch.randn(6, 16), "weight": torch.randn(16), "bias": torch.randn(16),
    }  # fmt: skip
    if "varlen" in left:
        names |= {name: torch.randn(14, 4, 16) for name in "qkv"} | {"cu": torch.tensor([0, 9, 14], dtype=torch.int32), "L": 9}
    torch.testing.assert_close(eval(right, names), eval(left, names), rtol=1e-5, atol=1e-5)


def one_by_one(q, k, v, starts, *_):
    """What flash-attn's function gives: each sequence through torch's attention."""
    ends = starts.tolist()
    parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in zip(ends, ends[1:], strict=False)]
    return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])


def test_the_porting_table_has_calls():
    assert len(ported()) == 4
