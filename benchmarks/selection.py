"""What a command line selects by name."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def add_providers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--providers", help="names or parts of names, comma-separated; the baselines eager and SDPA run with them"
    )


def chosen(asked: str, known: Iterable[str], what: str) -> list[str]:
    """The known names that are one of the comma-separated texts, or else contain it. A text that is in none ends the program."""
    names = list(dict.fromkeys(known))
    found: set[str] = set()
    for text in (part.strip() for part in asked.split(",")):
        matching = [name for name in names if name == text] or [name for name in names if text and text.lower() in name.lower()]
        if not matching:
            raise SystemExit(f"{what}: {text!r} is in none of {'; '.join(names)}")
        found.update(matching)
    return [name for name in names if name in found]
