"""docs/migrating.md: what a user had and what replaces it are both run, section by section, and give the same numbers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peers
import pytest
import torch
from torch import Tensor

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = r"```python\n(?P<code>.*?)```"
TABLE = r"^(?P<table>\|[^\n]*\|\n\|[-|]+\|\n(?:\|[^\n]*\|\n)+)"
PIECES = re.compile(f"{BLOCK}|{TABLE}", re.MULTILINE | re.DOTALL)
PARTS = re.compile(r"(?P<common>.*?)^# before\n(?P<before>.*?)^# after\n(?P<after>.*)", re.MULTILINE | re.DOTALL)
MODULE = "what_a_user_wrote"


@pytest.fixture
def names(monkeypatch) -> dict[str, Any]:
    """Those of a module in which code can be run, where the other libraries can be imported."""
    module = ModuleType(MODULE)
    for name, one in {MODULE: module, **peers.modules()}.items():
        monkeypatch.setitem(sys.modules, name, one)
    return vars(module)


def first_code(row: str) -> list[str]:
    """The code at the beginning of each cell, or nothing."""
    found = [re.match(r"`([^`]*)`", cell.strip()) for cell in row.strip("|").split(" | ")]
    return [match[1] if match else "" for match in found]


def comparisons(table: str) -> list[str]:
    """Each row as a block of code: of calls before and after, or of what takes the place of the dots in the calls of the head.
    Other tables are there to be read."""
    head, _, *rows = table.splitlines()
    templates = first_code(head)
    if head == "| before | after |":
        templates = ["...", "..."]
    if not all("..." in template for template in templates):
        return []
    blocks = []
    for row in rows:
        cells = first_code(row)
        assert len(cells) == 2 and all(cells), f"no code before and after: {row}"
        before, after = (template.replace("...", cell) for template, cell in zip(templates, cells, strict=True))
        blocks.append(f"# before\ny = {before}\n# after\ny = {after}\n")
    return blocks


def pieces(text: str) -> list[str]:
    """Blocks of code, in order."""
    found: list[str] = []
    for match in PIECES.finditer(text):
        found += [match["code"]] if match["code"] else comparisons(match["table"])
    return found


def run(code: str, names: dict[str, Any]) -> None:
    """Of a block with two parts each is run on what was there before it, and the tensors that both make are compared."""
    parts = PARTS.fullmatch(code)
    if parts is None:
        exec(code, names)
        return
    exec(parts["common"], names)
    given, made = dict(names), []
    for part in ("before", "after"):
        names.clear()
        names.update(given)
        exec(parts[part], names)
        made.append({name: x for name, x in names.items() if isinstance(x, Tensor) and x is not given.get(name)})
    before, after = made
    both = before.keys() & after.keys()
    assert both, f"nothing to compare:\n{code}"
    for name in both:
        different = f"{name} differs:\n{code}\n"
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5, msg=lambda said, at=different: at + said)


def run_all(text: str, names: dict[str, Any]) -> None:
    for code in pieces(text):
        run(code, names)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if pieces(text)])
def test_before_and_after_agree(title, names):
    run_all(SECTIONS[title], names)


def test_nothing_of_the_page_is_left_out():
    """Blocks, and rows of tables that begin with a call or an argument, counted without the expressions above."""
    rows = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    runnable = [code for code in rows if ("(" in code or "=" in code) and "..." not in code]
    assert PAGE.count("```python") + len(runnable) == sum(len(pieces(text)) for text in SECTIONS.values())
    assert runnable


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("title", "right", "wrong"),
    [
        ("torch.nn", 'masks.causal("top_left")', "masks.causal()"),
        ("torch.nn", "masks.key_padding(~padding)", "masks.key_padding(padding)"),
        ("torch.nn", "eps=1e-5", "eps=1e-2"),
        ("FlexAttention", "masks.window(2, 2)", "masks.window(2, 1)"),
        ("xFormers", "masks.window(2, 0)", "masks.window(3, 0)"),
        ("xFormers", "masks.causal(), key_packing", 'masks.causal("top_left"), key_packing'),
        ("flash-attn", "masks.window(2, None)", "masks.window(3, None)"),
        ("flash-attn", "bias=biases.alibi(slopes)`:", 'bias=biases.alibi(slopes, "top_left")`:'),
        ("flash-attn", 'activation="gelu_tanh"', 'activation="gelu"'),
        ("timm", "scale=self.scale", "scale=1.0"),
    ],
)
def test_a_wrong_replacement_is_seen(title, right, wrong, names):
    assert right in SECTIONS[title]
    with pytest.raises(AssertionError, match="differs"):
        run_all(SECTIONS[title].replace(right, wrong), names)


def test_stand_ins_hide_what_the_documentation_shows():
    """The pictures that flash-attn and xFormers have in their docstrings."""
    ones = "11110 11111", "00 00 00 10 11", "11110 01111 00111 00011"

    def seen(pattern: str) -> Tensor:
        return torch.tensor([[digit == "1" for digit in row] for row in pattern.split()])

    for pattern in ones[:2]:
        M, N = seen(pattern).shape
        weights = peers.flash_attn_func(
            torch.zeros(1, M, 1, N), torch.zeros(1, N, 1, N), torch.eye(N)[None, :, None], causal=True
        )
        assert torch.equal(weights[0, :, 0] > 0, seen(pattern))
    assert torch.equal(peers.local_mask(1, 2).materialize(4, 5) == 0, seen(ones[2]))
