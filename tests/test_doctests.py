"""The examples of docstrings: each public name has one, and it gives what it says."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastattn

MODULES = [x for x in (getattr(fastattn, name) for name in fastattn.__all__) if inspect.ismodule(x)]


def is_object(x: object) -> bool:
    return inspect.isfunction(x) or inspect.isclass(x)


def public() -> dict[str, object]:
    """The functions and classes that a user finds: by fastattn.__all__, and in the modules that it names."""
    found = {name: getattr(fastattn, name) for name in fastattn.__all__ if is_object(getattr(fastattn, name))}
    for module in MODULES:
        own = [name for name, x in vars(module).items() if is_object(x) and x.__module__ == module.__name__]
        names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
        found |= {f"{module.__name__.removeprefix('fastattn.')}.{name}": getattr(module, name) for name in names}
    return found


PUBLIC = public()


def is_for_users(name: str) -> bool:
    """In fastattn.masks and biases what makes one, and in graphs two functions; the rest there is what these are made of."""
    module, _, short = name.rpartition(".")
    if module in ("masks", "biases"):
        return getattr(PUBLIC[name], "__annotations__", {}).get("return") in ("Mask", "Bias")
    return module != "graphs" or short in ("bucket", "graphed")


def examples_of(name: str) -> list[doctest.DocTest]:
    """Those of a function; of a class and its methods. Each docstring is run in names of its own."""
    found = doctest.DocTestFinder(exclude_empty=True).find(PUBLIC[name], name, globs={"torch": torch, "fastattn": fastattn})
    return [test for test in found if test.examples]


EXAMPLES = {test.name: test for name in PUBLIC for test in examples_of(name)}


def run(test: doctest.DocTest) -> str:
    """What went wrong, in doctest's words; nothing if nothing did."""
    torch.manual_seed(0)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=said.append, clear_globs=False)
    return "".join(said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    test = EXAMPLES[name]
    if any("transformers" in example.source for example in test.examples):
        pytest.importorskip("transformers")
    said = run(test)
    assert not said, said


@pytest.mark.parametrize("name", [name for name in PUBLIC if is_for_users(name)])
def test_each_public_name_is_shown(name):
    shown = examples_of(name)
    assert shown, f"the docstring of {name} has no example"
    assert any(example.want for test in shown for example in test.examples), f"no example of {name} says what it gives"


def test_no_example_is_left_out():
    """None is in the docstring of a module, or of something that is not public, where it would not be run."""
    package = Path(fastattn.__file__).parent
    written = sum(len(re.findall(r"^ *>>> ", path.read_text(), re.MULTILINE)) for path in package.rglob("*.py"))
    assert written == sum(len(test.examples) for test in EXAMPLES.values()) > 0


def test_a_wrong_example_is_seen():
    text = ">>> fastattn.masks.causal().dense(1, 1, 1, 2).tolist()\n[[[[True, {}]]]]\n"
    for last, right in (("True", True), ("False", False)):
        test = doctest.DocTestParser().get_doctest(text.format(last), {"fastattn": fastattn}, "causal", None, 0)
        assert (run(test) == "") == right
