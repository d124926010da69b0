"""`python -m benchmarks.families` on tiny models: what is timed, what is not, and how the table says so."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from benchmarks import families, family_cases, report, results
from benchmarks.families import OURS, PLAIN
from benchmarks.family_cases import Case
from fastattn import timing
from fastattn.integrations.accelerate_blocks import kind_of
from fastattn.integrations.accelerate_families import FAMILIES, own_class

pytest.importorskip("transformers")

SHIPPED = family_cases.CASES
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
BERT = Case("BertModel", "bert", functools.partial(family_cases.text, length=24), options={**SIZES, "vocab_size": 60}, batch=3)
VIT = Case("ViTModel", "vit", family_cases.images, options={**SIZES, "image_size": 16, "patch_size": 4}, batch=2)
HUBERT = {**SIZES, "conv_dim": (8, 8), "conv_kernel": (400, 4), "conv_stride": (320, 2), "num_feat_extract_layers": 2}
HUBERT |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SOUND = Case("HubertModel", "hubert", family_cases.sound, options=HUBERT, batch=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/families.py"])
    monkeypatch.setattr(family_cases, "CASES", (BERT, VIT, SOUND))


def run(tmp_path, *arguments: str, code: int = 0) -> dict[tuple[str, str], dict]:
    """(model, provider) -> its row."""
    assert families.main(["--seconds", "0", "--out", str(tmp_path), *arguments]) == code
    (path,) = tmp_path.glob("*/families.json")
    records = results.read(path)["records"]
    rows = {(row["model"], row["provider"]): row for row in records}
    assert len(rows) == len(records)
    return rows


def lines(tmp_path) -> list[str]:
    """Of the table for CPUs."""
    return report.table("families", "cpu", tmp_path).splitlines()


def test_each_model_is_timed_as_it_comes_and_accelerated(tmp_path) -> None:
    rows = run(tmp_path)
    assert list(rows) == [(case.name, name) for case in (BERT, VIT, SOUND) for name in (PLAIN, OURS)]
    for row in rows.values():
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] and row["rounds"] == 2
        assert 0 < row["max_error"] < 1e-4 and row["ratio"] > 0 and row["implementation"] == "sdpa"
        assert (row["layers"], row["full_layers"], row["hidden"], row["heads"], row["intermediate"]) == (2, 3, 32, 2, 48)
    assert [rows[case.name, OURS]["seq"] for case in (BERT, VIT, SOUND)] == [24, 17, 23]
    bert = rows["BertModel", OURS]
    assert bert["tokens"] == 4 + 12 + 24 and bert["fill"] == 0.556 and rows["ViTModel", OURS]["fill"] == 1
    said = lines(tmp_path)
    assert any(line.startswith("| `BertModel` | 2 of 3 layers, width 32, 2 heads, FFN 48 | 3 × 24, ") for line in said)
    assert any(line.startswith("| `ViTModel` | 2 of 3 layers, width 32, 2 heads, FFN 48 | 2 × 17 | ") for line in said)
    assert report.table("families", "cpu", tmp_path / "empty") == report.NOT_MEASURED


def test_names_choose_and_a_smoke_run_is_in_no_table(tmp_path) -> None:
    rows = run(tmp_path, "--only", "vitm", "--quick")
    assert {model for model, _ in rows} == {"ViTModel"} and rows["ViTModel", PLAIN]["batch"] == 1
    assert lines(tmp_path) == [report.NOT_MEASURED]
    with pytest.raises(SystemExit, match="--only: 'gpt' is in none of BertModel"):
        families.main(["--only", "gpt"])


def test_a_wrong_acceleration_is_not_timed(tmp_path, monkeypatch, capsys) -> None:
    right = families.accelerated

    def wrong(model, given):
        with torch.no_grad():
            model.encoder.layer[1].output.dense.bias[3] += 1e-4
        return right(model, given)

    monkeypatch.setattr(families, "accelerated", wrong)
    rows = run(tmp_path, "--only", "BertModel", code=1)
    row = rows["BertModel", OURS]
    assert row["ms_median"] is None and row["wrong"].startswith("last_hidden_state: max error ")
    assert rows["BertModel", PLAIN]["ms_median"] > 0
    assert "WRONG: BertModel: last_hidden_state" in capsys.readouterr().err
    assert any(line.endswith(" | wrong [1] |") for line in lines(tmp_path))


def test_one_that_raises_is_a_fault(tmp_path, monkeypatch) -> None:
    def broken(model, given):
        raise ValueError("a tensor is amiss")

    monkeypatch.setattr(families, "accelerated", broken)
    rows = run(tmp_path, "--only", "BertModel", code=1)
    assert rows["BertModel", OURS]["wrong"] == "ValueError: a tensor is amiss"


def test_own_code_is_said_in_place_of_a_time(tmp_path, monkeypatch) -> None:
    built = family_cases.build

    def hooked(cls, config):
        model = built(cls, config)
        model.encoder.layer[1].attention.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(family_cases, "build", hooked)
    rows = run(tmp_path, "--only", "BertModel")
    row = rows["BertModel", OURS]
    assert row["ms_median"] is None and row["wrong"] is None
    assert row["refusal"].startswith("not timed: the model's own code ran: ") and "hook" in row["refusal"]
    said = lines(tmp_path)
    assert any(line.endswith(" | not timed [1] |") for line in said) and said[-1].startswith("[1] accelerated: not timed: ")


def test_own_code_while_it_is_timed_is_seen(tmp_path, monkeypatch) -> None:
    """The gate's calls were accelerated, one of those that were timed was not."""
    reports = []
    honest, interleaved = families.accelerated, timing.interleaved

    def kept(model, given):
        reports.append(honest(model, given))
        return reports[-1]

    def late(*args, **options):
        reports[-1][0].fallbacks["since then"] += 1
        return interleaved(*args, **options)

    monkeypatch.setattr(families, "accelerated", kept)
    monkeypatch.setattr(timing, "interleaved", late)
    row = run(tmp_path, "--only", "BertModel")["BertModel", OURS]
    assert row["ms_median"] is None and row["refusal"] == "not timed: the model's own code ran: since then"


def test_what_transformers_lacks_is_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(family_cases, "CASES", (BERT, Case("BertOfTomorrow", "bert", family_cases.text)))
    rows = run(tmp_path)
    assert rows["BertModel", OURS]["ms_median"] > 0
    assert all("AttributeError" in rows["BertOfTomorrow", name]["refusal"] for name in (PLAIN, OURS))
    assert "| `BertOfTomorrow` |  |  | not run [1] | not run [2] |" in lines(tmp_path)


def test_every_case_is_of_a_family_that_is_known() -> None:
    """At its size, without memory for its weights: no option is one that the config does not have."""
    seen = set()
    for case in SHIPPED:
        cls = case.transformers_class()
        defaults = cls.config_class()
        assert all(hasattr(defaults, option) for option in case.options), case.name
        config, full_layers = case.config(cls)
        with torch.device("meta"):
            model = cls(config)
        assert hasattr(config, "depths") or config.num_hidden_layers == min(case.layers, full_layers)
        found = {known.__name__ for known in map(own_class, model.modules()) if known is not None}
        assert found <= FAMILIES.keys()
        seen |= found | {kind.models for kind in map(kind_of, model.modules()) if kind is not None}
    assert len(seen) == len(SHIPPED)
