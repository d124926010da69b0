"""Every test that CHECKLIST.md names is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
LINES = [" ".join(line.split()) for line in re.split(r"\n(?=- \[)", (TESTS / "CHECKLIST.md").read_text())[1:]]


def test_every_line_stands_once_and_names_its_tests():
    defined = {
        name for path in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    numbers = []
    for line in LINES:
        ticked, number = re.match(r"- \[([ x])\] (\d+)\.", line).groups()
        numbers.append(int(number))
        named = re.findall(r"`(test_\w+)`", line)
        assert set(named) <= defined, set(named) - defined
        assert named or ticked == " ", f"line {number} is ticked and names no test"
    assert numbers == list(range(1, len(LINES) + 1)) and len(LINES) == 24
