"""The benchmark suite's own rules: statistics, files, the accuracy gate and refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys

import pytest
import torch

import fastattn
from benchmarks import (
    attention_providers,
    gate,
    mask_cases,
    measure,
    model_cases,
    model_measure,
    model_providers,
    models,
    ops,
    refusals,
    results,
    shapes,
    texts,
)
from fastattn import testing, timing

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(1e12, 1e10)
TINY = {**shapes.bert(2, 32, 4), "vocab_size": 30522}


@pytest.fixture
def tiny(monkeypatch):
    """`benchmarks.models` on a BERT of width 32, with the reference models as its only providers and no interpreter."""
    monkeypatch.setitem(shapes.CONFIGS, "bert-base", TINY)
    monkeypatch.setattr(models.interpreter, "run", lambda names, limit: [])
    monkeypatch.setattr(models.plots, "draw", lambda records, path, suite: "no picture")
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)
    found = [
        model_providers.Provider("reference eager", functools.partial(model_providers.reference, "eager")),
        model_providers.Provider("reference SDPA", functools.partial(model_providers.reference, "sdpa")),
        model_providers.Provider("fastattn", functools.partial(model_providers.reference, "fastattn"), True),
    ]
    monkeypatch.setattr(model_providers, "providers", lambda device: found)
    return found


def run_tiny(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    command = ["--models", "bert-base", "--batch", "3", "--seq", "12", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    code = models.main([*command, *arguments])
    (path,) = tmp_path.glob("*/models.json")
    return code, results.read(path)["records"]


# Shapes


@pytest.mark.parametrize("fill", [0.3, 0.5, 0.9, 1.0])
def test_ragged_lengths_have_the_fill(fill: float) -> None:
    lengths = shapes.ragged_lengths(64, 512, fill)
    assert lengths.double().mean() / 512 == pytest.approx(fill, abs=0.02)
    assert lengths.max() == 512 and lengths.min() >= 1
    assert shapes.ragged_lengths(1, 100, fill).tolist() == [round(100 * 0.5 ** (1 / fill - 1))]


def test_a_fill_outside_its_range_raises() -> None:
    with pytest.raises(ValueError, match="fill must be in"):
        shapes.ragged_lengths(4, 16, 0.0)


def test_useful_work_counts_visible_pairs_of_real_tokens() -> None:
    lengths, H, D = torch.tensor([3, 5]), 2, 8
    full = shapes.attention_work(lengths, H, D, False, 2)
    causal = shapes.attention_work(lengths, H, D, True, 2)
    assert full["forward"][0] == 4 * D * H * (9 + 25)
    assert causal["forward"][0] == 4 * D * H * (6 + 15)
    assert full["forward"][1] == 4 * 8 * H * D * 2 + 8 * H * 4
    assert full["backward"][0] == 2.5 * full["forward"][0]


def test_bert_base_has_its_known_size() -> None:
    (tower,) = shapes.towers(shapes.CONFIGS["bert-base"])
    flops, moved = tower.work(torch.tensor([128] * 32), 2)
    assert flops == pytest.approx(715.8e9, rel=0.01)  # 85 M weights, 4096 tokens, and 12 layers of attention
    assert moved == 2 * (12 * 12 * 768**2 + 2 * 12 * 4096 * 768)


def test_texts_are_real_sentences_padded_on_the_right() -> None:
    found, source = texts.sentences()
    assert len(found) > 50 and source
    ids, mask, said = texts.running_text(torch.tensor([4, 9]), 12, "bert")
    assert ids.shape == mask.shape == (2, 12) and mask.sum(1).tolist() == [4, 9]
    assert ids[0, 0] == 101 and ids[0, 3] == 102 and not ids[0, 4:].any() and said.startswith(source)


# Files


def test_a_rerun_replaces_its_own_file_alone(tmp_path) -> None:
    first = results.write([results.record(model="a")], "models", CPU, quick=False, out=tmp_path)
    other = results.write([results.record(model="b")], "ops", CPU, quick=True, out=tmp_path)
    kept = other.read_text()
    assert results.write([results.record(model="c")], "models", CPU, quick=False, out=tmp_path) == first
    content = json.loads(first.read_text())
    assert [row["model"] for row in content["records"]] == ["c"]
    assert {"device", "versions", "commit", "command", "quick", "records"} <= content.keys()
    assert set(results.RECORD) <= content["records"][0].keys()
    assert other.read_text() == kept and first.parent == other.parent
    assert sorted(path.name for path in first.parent.iterdir()) == ["models.json", "ops.json"]


def test_a_failed_write_leaves_the_earlier_result(tmp_path) -> None:
    path = results.write([results.record(model="a")], "models", CPU, quick=False, out=tmp_path)
    kept = path.read_text()
    with pytest.raises(ValueError):
        results.write([results.record(ms_median=float("nan"))], "models", CPU, quick=False, out=tmp_path)
    assert path.read_text() == kept


@pytest.mark.parametrize(
    ("kind", "name", "slug"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA A100-SXM4-40GB", "a100"),
        ("cuda", "NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("cpu", "AMD EPYC 9B14 96-Core Processor, 2 threads, AVX512", "cpu-amd-epyc-9b14"),
        ("cpu", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 2 threads, AVX512", "cpu-intel-xeon-platinum-8481c"),
    ],
)
def test_folders_are_named_after_the_processor(monkeypatch, kind: str, name: str, slug: str) -> None:
    monkeypatch.setattr(results, "device_name", lambda device: name)
    assert results.device_slug(torch.device(kind)) == slug


# The gate and refusals of ops


def attention_task(*contenders: measure.Contender) -> measure.Task:
    shape = shapes.AttentionShape("tiny", 2, 20, 16, fills=(0.5,))
    task = ops.attention_task(shape, 3, 0.5, torch.float32, CPU)
    return task._replace(contenders=[task.contenders[0], *contenders])


def slightly_wrong(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 1.001


@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_provider_is_not_timed(ours: bool) -> None:
    """It ignores the padding mask; the row says what is wrong, and the run fails."""
    task = attention_task(measure.Contender("wrong", lambda: slightly_wrong, ours))
    rows = measure.measure(task, CPU, seconds=0.0, modes=("forward",))
    right, wrong = sorted(rows, key=lambda row: row["provider"])
    results.add_floor(rows, {torch.float32: CEILINGS})
    floor_ms = max(right["useful_flops"] / 1e12, right["useful_bytes"] / 1e10) * 1e3
    assert right["floor_fraction"] == pytest.approx(floor_ms / right["ms_median"]) and wrong["floor_fraction"] is None
    assert right["ms_median"] > 0 and right["wrong"] is None and right["ratio_vs_eager"] == 1.0
    assert wrong["ms_median"] is None and "max error" in wrong["wrong"]
    assert results.failures(rows) == [wrong]


def test_the_gate_sees_one_part_in_a_thousand_and_nan() -> None:
    x = testing.attention_inputs(1, 2, 24, 24, 16, torch.float32)
    yardstick = testing.attention_yardstick(x)
    out = yardstick.model["out"]
    for ours in (True, False):
        assert gate.check({"out": out}, yardstick, ours=ours) < 1e-5
        for bad in (out * 1.001, torch.full_like(out, float("nan"))):
            with pytest.raises(AssertionError, match="out"):
                gate.check({"out": bad}, yardstick, ours=ours)


def test_a_refusal_is_a_row_with_the_providers_own_words() -> None:
    def refuse():
        raise NotImplementedError("no padding on Tuesdays\nand a second line")

    def crash():
        raise RuntimeError("a fault")

    contenders = [
        measure.Contender("polite", refuse, True),
        measure.Contender("crashing", crash, True),
        measure.Contender("peer", crash),
        measure.Contender("absent", refuse, package="a_package_that_nobody_has"),
    ]
    rows = measure.measure(attention_task(*contenders), CPU, seconds=0.0, modes=("backward",))
    found = {row["provider"]: (row["refusal"], row["wrong"], row["ms_median"]) for row in rows}
    assert found["polite"] == ("NotImplementedError: no padding on Tuesdays", None, None)
    assert found["crashing"] == (None, "RuntimeError: a fault", None)
    assert found["peer"] == ("RuntimeError: a fault", None, None)
    assert found["absent"] == ("a_package_that_nobody_has is not installed", None, None)
    assert found["eager"][2] > 0


def test_the_request_that_others_refuse_has_an_answer_from_everyone() -> None:
    answers = {row["provider"]: row["answer"] for row in refusals.ask(CPU, torch.float32)}
    assert answers["eager"] == answers["SDPA math"] == refusals.SERVED
    assert all(answers.values()) and answers["fastattn cpu"] == refusals.SERVED


@pytest.mark.parametrize("index", range(3))
def test_every_op_passes_its_own_gate(index: int) -> None:
    task = ops.cases(CPU, torch.float32, quick=True)[-3:][index].make()
    rows = measure.measure(task, CPU, seconds=0.0, modes=ops.MODES)
    assert not results.failures(rows)
    timed = {(row["provider"], row["mode"]) for row in rows if row["ms_median"]}
    assert ("fastattn cpu", "forward") in timed and ("fastattn cpu", "backward") in timed


# Structured masks


MASK_CASES = mask_cases.cases(mask_cases.TINY, 3, CPU)


@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: case.name)
def test_every_provider_is_asked_for_the_same_mask(case: mask_cases.MaskCase) -> None:
    """The forms for FlexAttention and flash-attn, and the bool tensor for the others, against the mask that fastattn gets."""
    B, S = 3, mask_cases.TINY.S
    visible = case.mask.dense(B, 1, S, S, CPU)
    b, i, j = torch.arange(B)[:, None, None], torch.arange(S)[:, None], torch.arange(S)
    assert torch.equal(case.mask_mod(b, torch.tensor(0), i, j).expand(B, S, S), visible[:, 0])
    keep = attention_providers.Request(B, 2, S, 16, False, None, CPU, structure=case).keep()
    assert torch.equal(keep.expand(B, 1, S, S), visible)
    assert visible.any(-1).all() and not visible.all()
    if case.window is not None:
        assert torch.equal(((i - j <= case.window[0]) & (j - i <= case.window[1])).expand(B, S, S), visible[:, 0])
    if case.lengths is not None:
        assert torch.equal(visible[:, 0].sum(-1), torch.stack([n.repeat_interleave(n) for n in case.lengths]))


def test_the_masks_suite_writes_its_own_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py"])
    monkeypatch.setattr(timing, "interleaved", functools.partial(timing.interleaved, least=1, most=1))
    monkeypatch.setattr(timing, "_repeats", lambda call, device: 1)
    assert ops.main(["--suite", "masks", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.json")
    content = results.read(path)
    assert path.name == "masks.json" and "refusals" not in content
    rows = {(row["model"], row["provider"], row["mode"]): row for row in content["records"]}
    names = [case.name for case in mask_cases.cases(mask_cases.TINY, 2, CPU)]
    providers = [provider.name for provider in attention_providers.providers(CPU)]
    assert set(rows) == {(name, provider, mode) for name in names for provider in providers for mode in ops.MODES}
    assert all(row["ratio_vs_eager"] > 0 and row["ratio_vs_sdpa"] > 0 and 0 < row["visible"] < 1 for row in rows.values())
    row = rows["window(8, 0)", "SDPA", "backward"]
    assert row["ratio_vs_sdpa"] == 1.0 and row["useful_flops"] == 10 * 64 * row["batch"] * row["heads"] * (9 * 80 - 36)


def test_a_spent_budget_leaves_cases_out(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)
    assert ops.main(["--suite", "masks", "--device", "cpu", "--quick", "--budget", "-1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/masks.json")
    content = results.read(path)
    assert content["records"] == [] and capsys.readouterr().out.count("budget was spent") == len(MASK_CASES)
    assert content["left_out"] == [f"attention {case.name}" for case in MASK_CASES]


@pytest.mark.parametrize("index", range(len(MASK_CASES)), ids=lambda index: MASK_CASES[index].name)
def test_the_gate_of_each_mask_sees_another_mask(index: int) -> None:
    """Each case is answered with the mask of the one before: the rows say that it is wrong, and the run fails."""
    case, other = MASK_CASES[index], MASK_CASES[index - 1]
    task = ops.mask_task(case, 3, 2, mask_cases.TINY.S, 16, torch.float32, CPU)
    for ours in (True, False):
        contender = measure.Contender("wrong", lambda: lambda q, k, v: fastattn.attention(q, k, v, other.mask), ours)
        rows = measure.measure(task._replace(contenders=[contender]), CPU, seconds=0.0, modes=ops.MODES)
        assert len(results.failures(rows)) == 2 and all(row["ms_median"] is None for row in rows)


# Whole models


def test_models_writes_records_for_both_modes(tiny, tmp_path) -> None:
    code, records = run_tiny(tmp_path, "--fill", "0.5")
    assert code == 0
    assert {(row["provider"], row["mode"]) for row in records} == {(p.name, mode) for p in tiny for mode in models.MODES}
    for row in records:
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] and row["tokens_per_s"] > 0
        assert (row["layers"], row["full_layers"], row["hidden"], row["heads"]) == (1, 2, 32, 4)
        assert 0 < row["max_error"] < 1e-4 and row["peak_bytes"] is None and 0 < row["fill"] < 1
        assert (row["gradient_error"] is not None) == (row["mode"] == "train")
        assert row["method"] == "wall clock" and row.get("dropout") == (0.0 if row["mode"] == "train" else None)


def test_a_step_with_dropout_is_timed_for_each_provider(tmp_path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from benchmarks import finetune

    small = functools.partial(finetune.BertConfig, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setattr(finetune, "BertConfig", small)
    monkeypatch.setattr(sys, "argv", ["benchmarks/finetune.py"])
    size = ["--layers", "1", "--batch", "2", "--seq", "16", "--seconds", "0"]
    assert finetune.main([*size, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/finetune.json")
    rows = {row["provider"]: row for row in results.read(path)["records"]}
    assert set(rows) == set(finetune.PROVIDERS)
    assert all(row["dropout"] == 0.1 and row["hidden"] == 32 and row["ratio_vs_sdpa"] > 0 for row in rows.values())
    monkeypatch.setattr(finetune, "CLOSE", -1.0)
    with pytest.raises(AssertionError, match="a loss of .* where eager has"):
        finetune.main([*size, "--out", str(tmp_path)])


@pytest.mark.parametrize("mode", models.MODES)
def test_a_wrong_model_fails_the_run(tiny, tmp_path, capsys, mode: str) -> None:
    def wrong(case, mode: str) -> model_providers.Built:
        name = "encoder.layer.0.output.LayerNorm.weight"
        state = {**case.state, name: case.state[name] * 1.001}
        return model_providers.reference("eager", dataclasses.replace(case, state=state), mode)

    tiny.append(model_providers.Provider("wrong", wrong))
    code, records = run_tiny(tmp_path, "--fill", "1.0", "--mode", mode)
    (row,) = results.failures(records)
    assert code == 1 and row["provider"] == "wrong" and row["ms_median"] is None and row["max_error"] > 1e-4
    assert "WRONG" in capsys.readouterr().err


def test_a_wrong_gradient_alone_fails_the_run(tiny, tmp_path) -> None:
    def wrong(case, mode: str) -> model_providers.Built:
        built = model_providers.reference("eager", case, mode)
        next(built.module.encoder.parameters()).register_hook(lambda grad: grad * 1.01)
        return built

    tiny.append(model_providers.Provider("wrong", wrong))
    code, records = run_tiny(tmp_path, "--mode", "train")
    assert code == 1 and "query.weight" in results.failures(records)[0]["wrong"]


def test_a_spent_budget_leaves_slow_providers_out(tiny, tmp_path) -> None:
    tiny.append(tiny[0]._replace(name="slow", patience=1e9))
    code, records = run_tiny(tmp_path, "--fill", "1.0", "--mode", "infer")
    (row,) = [row for row in records if row["provider"] == "slow"]
    assert code == 0 and row["ms_median"] is None and row["refusal"].startswith("not run")


PACKED = ("fastattn: + unpadded", "Hugging Face with fastattn.accelerate")


@pytest.mark.parametrize("fill", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("mode", models.MODES)
def test_unpadded_providers_compute_real_tokens_alone(monkeypatch, fill: float, mode: str) -> None:
    """They pass the gate against fp64 that all pass, and their FFNs get as many rows as there are tokens."""
    pytest.importorskip("transformers")
    monkeypatch.setitem(shapes.CONFIGS, "bert-base", TINY)
    case = load_tiny("bert-base", fill)
    rows = []

    def counted(x, *args, **kwargs):
        rows.append(x.numel() // x.shape[-1])
        return ffn(x, *args, **kwargs)

    ffn = fastattn.ffn
    fast = model_providers.IMPLEMENTATIONS["fastattn"]
    monkeypatch.setitem(model_providers.IMPLEMENTATIONS, "fastattn", fast._replace(ffn=counted))
    monkeypatch.setattr("fastattn.integrations.accelerate_layers.ffn", counted)
    found = {provider.name: provider for provider in model_providers.providers(CPU)}
    for name in PACKED:
        rows.clear()
        measured = model_measure.run(case, mode, [found["Hugging Face eager"], found[name]], seconds=0.0)
        timed = {row["provider"]: row for row in measured.rows}
        assert not results.failures(measured.rows) and timed[name]["ms_median"] > 0 and timed[name]["ratio_vs_eager"] > 0
        assert set(rows) == {int(case.lengths[0].sum())}


@pytest.mark.parametrize("mode", models.MODES)
def test_unpadded_providers_of_clip_pass_the_gate(mode: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    case = load_tiny("digits-clip", 1.0)
    found = [provider for provider in model_providers.providers(CPU) if provider.name.endswith(("eager", *PACKED))]
    measured = model_measure.run(case, mode, found, seconds=0.0)
    assert {row["provider"] for row in measured.rows if row["ms_median"]} == {provider.name for provider in found}
    assert set(PACKED) < {provider.name for provider in found}


def load_tiny(name: str, fill: float) -> model_cases.Case:
    return model_cases.load(name, batch=5, seq=16, fill=fill, layers=2, folder=None, dtype=torch.float32, device=CPU)


def test_a_default_run_has_each_fill_of_bert_and_its_training_step() -> None:
    for defaults in (models.CPU, models.GPU):
        asked = models.requests(models.parse([]), defaults, [torch.float32])
        first = [(request.model, request.mode, request.fill) for request in asked[1:4]]
        assert first == [("bert-base", "infer", 0.5), ("bert-base", "train", 0.5), ("clip-vit-b-32", "infer", 0.5)]
        assert asked[0].model == "minilm" and asked[0].mode == "infer"
        bert = [(request.mode, request.fill) for request in asked if request.model == "bert-base"]
        assert bert == [("infer", 0.5), ("train", 0.5), ("infer", 0.75), ("infer", 1.0)]
        assert {request.model for request in asked} == set(defaults.models)
    asked = models.requests(models.parse(["--fill", "0.25", "--mode", "train"]), models.CPU, [torch.float32])
    assert sorted((request.model, request.fill) for request in asked) == [(name, 0.25) for name in sorted(models.CPU.models)]


def test_a_dtype_follows_when_the_one_before_is_through() -> None:
    asked = models.requests(models.parse([]), models.CPU, [torch.float32, torch.bfloat16])
    half = len(asked) // 2
    assert [one._replace(dtype=torch.bfloat16) for one in asked[:half]] == asked[half:]


def test_unknown_models_and_modes_are_refused(capsys) -> None:
    for argument, value in (("--models", "gpt"), ("--mode", "dream")):
        with pytest.raises(SystemExit):
            models.parse([argument, value])
        assert f"{value!r} is not one of" in capsys.readouterr().err
