"""What a run of the benchmarks selects, in which order, what it leaves out for want of time, and what it says of itself."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch

from benchmarks import budget, measure, model_measure, model_providers, models, ops, results, selection, shapes, summary
from benchmarks.model_providers import Provider
from fastattn import timing

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(1e12, 1e10)
TINY = {**shapes.bert(2, 32, 4), "vocab_size": 30522}
QUICK = ["--batch", "3", "--seq", "12", "--device", "cpu", "--quick"]


INTERLEAVED = timing.interleaved


def one_round(calls, device, **_):
    return INTERLEAVED(calls, device, seconds=0.0, least=1, most=1)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The budget's clock, which tests move; what is timed takes next to nothing."""
    clock = Clock()
    monkeypatch.setattr(budget.Budget.__init__, "__defaults__", (clock,))
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(timing, "interleaved", one_round)
    monkeypatch.setattr(timing, "_repeats", lambda call, device: 1)
    return clock


@pytest.fixture
def tiny(monkeypatch, clock) -> list[Provider]:
    """A BERT of width 32; `Hugging Face` stands for nobody here, and the slow provider for one that compiles."""
    monkeypatch.setitem(shapes.CONFIGS, "bert-base", TINY)
    monkeypatch.setattr(models.interpreter, "run", lambda names, limit: [])
    monkeypatch.setattr(models.plots, "draw", lambda records, path, title: "no picture")
    build = {kind: functools.partial(model_providers.reference, kind) for kind in ("eager", "sdpa", "fastattn")}
    found = [
        Provider("reference eager", build["eager"], main=True),
        Provider("reference SDPA", build["sdpa"], main=True),
        Provider("slow", build["sdpa"], patience=30),
        Provider("another", build["sdpa"]),
        Provider("fastattn", build["fastattn"], True, main=True),
    ]
    monkeypatch.setattr(model_providers, "providers", lambda device: found)
    return found


def taking(seconds: float, clock: Clock, build, order: list[str], name: str):
    """The provider's `build`, which takes so long by the clock, and tells who began when."""

    def slowly(case, mode):
        clock.seconds += seconds
        order.append(name)
        return build(case, mode)

    return slowly


def run_models(tmp_path, *arguments: str) -> dict:
    models.main([*QUICK, "--models", "bert-base", "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*/models.json")
    return results.read(path)


# Shares of the time


def test_each_case_has_its_share_of_what_is_left() -> None:
    clock = Clock()
    whole = budget.Budget(60.0, clock)
    first = whole.share(3)
    assert first.seconds == 20 and first.open and first.timing(5.0) == 5.0
    clock.seconds = 9.0
    assert first.open and first.timing(15.0) == 11.0
    clock.seconds = 16.0
    assert not first.open and first.timing(15.0) == 4.0
    clock.seconds = 30.0
    assert first.timing(15.0) == 0.0 and whole.share(2).seconds == 15 and whole.left == 30


def test_main_providers_have_their_turn_and_others_while_there_is_time(tiny, tmp_path, clock) -> None:
    """12 s a case: the main ones take 9 of them, though `another` stands before the last of them in the table."""
    order: list[str] = []
    tiny[:] = [one._replace(build=taking(3.0, clock, one.build, order, one.name)) for one in tiny]
    content = run_models(tmp_path, "--mode", "infer", "--fill", "1.0", "--budget", "24")
    assert order == ["reference eager", "reference SDPA", "fastattn"]
    found = {row["provider"]: row for row in content["records"]}
    assert list(found) == [one.name for one in tiny]
    assert found["another"]["refusal"] == budget.SPENT and found["fastattn"]["ms_median"] > 0
    assert found["slow"]["refusal"] == "not run: less than 30 s of the time budget were left"


def test_slow_providers_wait_until_every_case_had_its_turn(tiny, tmp_path, clock, capsys) -> None:
    """The first case's then has the time that it needs, and the second's has not."""
    order: list[str] = []
    tiny[:] = [one._replace(build=taking(31.0 if one.patience else 1.0, clock, one.build, order, one.name)) for one in tiny]
    content = run_models(tmp_path, "--mode", "infer", "--fill", "0.5,1.0", "--budget", "70")
    baselines = ["reference eager", "reference SDPA"]
    assert order == [*2 * [*baselines, "fastattn", "another"], *baselines, "slow"]
    ragged, full = (row for row in content["records"] if row["provider"] == "slow")
    assert ragged["ms_median"] > 0 and ragged["ratio_vs_sdpa"] > 0 and ragged["fill"] < 1
    assert full["refusal"].startswith("not run: less than 30 s")
    assert len(content["records"]) == 2 * len(tiny)
    progress = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(progress) == 3 and progress[2].startswith("[1/2, ") and ", ms: slow " in progress[2]


def test_a_spent_budget_leaves_cases_out_by_name(tiny, tmp_path, clock, capsys) -> None:
    tiny[0] = tiny[0]._replace(build=taking(50.0, clock, tiny[0].build, [], ""))
    content = run_models(tmp_path, "--fill", "0.5", "--budget", "40")
    assert {row["mode"] for row in content["records"]} == {"infer"} and content["complete"]
    assert content["left_out"] == ["bert-base train float32 fill 0.5"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{results.device_name(CPU)}: 2 cases in about 40 s") and "threads" in said[0]
    assert said[1].startswith("[1/2, 50 s] bert-base infer float32 fill 0.5, ms: reference eager ")
    assert "not run: bert-base train float32 fill 0.5: the time budget was spent" in said[2]
    assert said[-1].startswith("left out: bert-base train float32 fill 0.5; 1 rows (")


@pytest.mark.parametrize("command", ["models", "ops"])
def test_a_run_that_is_cut_keeps_what_it_has(tiny, tmp_path, monkeypatch, command: str) -> None:
    """Of two cases the first is on disk when the second begins, and says that the run has not ended."""
    module, name = (model_measure, "run") if command == "models" else (measure, "measure")
    whole, begun = getattr(module, name), []

    def cut(*args, **kwargs):
        begun.append(1)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, cut)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{command}.py"])
    arguments = {
        "models": [*QUICK, "--models", "bert-base", "--fill", "0.5"],
        "ops": ["--quick", "--device", "cpu", "--rows", "attention"],
    }
    with pytest.raises(KeyboardInterrupt):
        {"models": models, "ops": ops}[command].main([*arguments[command], "--out", str(tmp_path)])
    (path,) = tmp_path.glob(f"*/{command}.json")
    content = results.read(path)
    assert content["complete"] is False and len({row["fill"] for row in content["records"]}) == 1
    assert any(row["ms_median"] for row in content["records"])
    assert all(row["floor_fraction"] for row in content["records"] if row["ms_median"])


def test_a_case_that_needs_too_much_memory_is_left_out(tiny, tmp_path, monkeypatch, capsys) -> None:
    begun: list[int] = []

    def lacking(whole):
        def run(*args, **kwargs):
            begun.append(1)
            if len(begun) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(*args, **kwargs)

        return run

    monkeypatch.setattr(model_measure, "exact_run", lacking(model_measure.exact_run))
    content = run_models(tmp_path, "--fill", "0.5")
    assert content["left_out"] == ["bert-base infer float32 fill 0.5"] and content["complete"]
    assert {row["mode"] for row in content["records"]} == {"train"}
    assert "bert-base infer float32 fill 0.5: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    begun.clear()
    monkeypatch.setattr(measure, "input_sets", lacking(measure.input_sets))
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py"])
    assert ops.main(["--quick", "--device", "cpu", "--rows", "attention", "--out", str(tmp_path)]) == 0
    content = results.read(next(tmp_path.glob("*/ops.json")))
    assert content["left_out"] == ["attention bert-base-128 fill 0.5 (memory)"] and {
        row["fill"] for row in content["records"]
    } == {1.0}


# Rows and providers


def test_names_select_exactly_or_in_part(capsys) -> None:
    known = ["eager", "SDPA", "SDPA math", "fastattn cpu", "SDPA"]
    assert selection.chosen("SDPA", known, "--providers") == ["SDPA"]
    assert selection.chosen("sdpa", known, "--providers") == ["SDPA", "SDPA math"]
    assert selection.chosen("fast, math", known, "--providers") == ["SDPA math", "fastattn cpu"]
    for text in ("", "flash", "eager,"):
        with pytest.raises(SystemExit, match="--providers: '(flash)?' is in none of eager; SDPA; SDPA math; fastattn cpu"):
            selection.chosen(text, known, "--providers")


def test_a_models_run_of_some_providers_has_the_baselines_too(tiny, tmp_path) -> None:
    content = run_models(tmp_path, "--mode", "infer", "--fill", "1.0", "--providers", "another")
    assert [row["provider"] for row in content["records"]] == ["reference eager", "reference SDPA", "another"]
    with pytest.raises(SystemExit, match="--providers: 'nobody' is in none of reference eager; "):
        models.main([*QUICK, "--models", "bert-base", "--providers", "nobody"])


def test_an_ops_run_of_some_rows_and_providers(clock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py"])
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert ops.main([*arguments, "--rows", "fill 0.5", "--providers", "fastattn"]) == 0
    (path,) = tmp_path.glob("*/ops.json")
    content = results.read(path)
    assert {row["provider"] for row in content["records"]} == {"eager", "SDPA", "fastattn cpu"} and content["complete"]
    assert len({(row["model"], row["fill"]) for row in content["records"]}) == 1 and content["records"][0]["fill"] < 1
    for option, value, words in (("--rows", "gpt", "attention bert-base-128 fill 0.5; "), ("--providers", "gpt", "eager; SDPA")):
        with pytest.raises(SystemExit, match=f"{option}: 'gpt' is in none of {words}"):
            ops.main([*arguments, option, value])


def test_a_part_of_a_suite_replaces_no_whole_one(clock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(ops, "cases", lambda *args: CASES(CPU, torch.float32, True))
    monkeypatch.setitem(ops.SUITES, "ops", ops.cases)
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py"])
    assert ops.main(["--device", "cpu", "--rows", "layer_norm"]) == 0
    assert not list(tmp_path.iterdir())


CASES = ops.cases


def test_bert_comes_first_in_ops_and_its_ragged_batches_before_the_full() -> None:
    for device in (CPU, torch.device("cuda")):
        names = [case.name for case in ops.cases(device, torch.float32, False)]
        assert names[:4] == [f"attention bert-base-{S} fill {fill}" for S in (128, 512) for fill in (0.5, 1.0)]
        assert len(names) == len(set(names)) and all("bert" not in name for name in names[6:])


def test_what_compiles_for_long_waits_to_be_asked_for(clock) -> None:
    shape = shapes.AttentionShape("tiny", 2, 20, 16)
    task = ops.attention_task(shape, 3, 1.0, torch.float32, CPU)
    begun: list[str] = []

    def compiles():
        begun.append("flex")
        return torch.nn.functional.scaled_dot_product_attention

    task = task._replace(contenders=[*task.contenders, measure.Contender("FlexAttention, compiled", compiles, slow=True)])
    rows = measure.measure(task, CPU, seconds=0.0, modes=("forward",))
    assert [row["refusal"] for row in rows if row["provider"].startswith("Flex")] == ["not run: --slow"] and not begun
    rows = measure.measure(task, CPU, seconds=0.0, modes=("forward",), slow=True)
    assert begun and all(row["ms_median"] > 0 for row in rows)


def test_slow_providers_are_those_that_compile() -> None:
    cuda = torch.device("cuda")
    pytest.importorskip("transformers")
    slow = [one.name for one in ops.attention_providers.providers(cuda) if one.slow]
    assert slow == ["FlexAttention, compiled"]
    assert [one.name for one in model_providers.providers(cuda) if one.patience] == ["Hugging Face torch.compile"]
    main = [one.name for one in model_providers.providers(CPU) if one.main]
    assert main == ["Hugging Face eager", "Hugging Face SDPA", model_providers.ACCELERATED]


# Five lines


def row(mode: str, provider: str, ms: float | None, sdpa: float | None, **fields) -> dict:
    base = {"model": "bert", "batch": 8, "seq": 64, "fill": 0.5, "dtype": "float32", "mode": mode, "provider": provider}
    return results.record(**{**base, "ms_median": ms, "ratio_vs_sdpa": sdpa, "ratio_vs_eager": 3.0, **fields})


def test_five_lines_say_what_was_gained_and_what_was_not() -> None:
    records = [
        row("infer", "SDPA", 4.0, 1.0),
        row("infer", "with fastattn", 2.0, 2.0),
        row("infer", "fastattn, slower", 5.0, 0.8),
        row("infer", "SDPA", 4.0, 1.0, fill=1.0),
        row("infer", "with fastattn", 3.9, 1.03, fill=1.0),
        row("train", "SDPA", 4.0, 1.0),
        row("train", "with fastattn", 5.0, 0.8),
        row("train", "flex", None, None, refusal="not run: --slow"),
        row("train", "dear", None, None, refusal="not run: --slow"),
        row("train", "unable", None, None, refusal="NotImplementedError: no"),
    ]
    assert summary.lines(records, "fastattn", ["clip train"]) == [
        "forward passes: 1 of 2 cases more than 5% faster than SDPA: 2.00x in bert 8 x 64, 50% real tokens float32 infer",
        "training steps: 0 of 1 cases more than 5% faster than SDPA",
        "fastest of all: with fastattn in 2, SDPA in 1",
        "no gain: bert 8 x 64, 50% real tokens float32 train 0.80x, bert 8 x 64 float32 infer 1.03x",
        "left out: clip train; 2 rows (--slow)",
    ]
    records[1]["captured_ms"], records[1]["captured_ratio_vs_sdpa"] = 1.0, 1.5
    assert summary.lines(records, "fastattn")[2] == (
        "both in CUDA graphs: 1 of 1 cases more than 5% faster than SDPA: 1.50x in bert 8 x 64, 50% real tokens float32 infer"
    )
    ffn = row("backward", "fastattn cpu", 2.0, None, op="ffn", seq=None, tokens=512, fill=1)
    assert summary.lines([ffn], "fastattn")[1] == (
        "backward passes: 1 of 1 cases more than 5% faster than SDPA or, where there is none, eager: 3.00x in "
        "ffn bert 512 tokens float32 backward"
    )
    assert summary.lines([], "fastattn")[:4] == [
        "forward passes: nothing was timed", "training steps: nothing was timed", "fastest of all: nothing was timed",
        "no gain: nothing was timed",
    ]  # fmt: skip


# CUDA graphs of whole models, with a stand-in for what replays them


def test_a_captured_model_is_held_to_the_gate(tiny, monkeypatch) -> None:
    case = models.model_cases.load("bert-base", batch=3, seq=12, fill=0.5, layers=1, folder=None, dtype=torch.float32, device=CPU)
    exact = model_measure.exact_run(case, "infer")
    build = functools.partial(model_providers.reference, "sdpa")
    scale = "encoder.layer.0.output.LayerNorm.weight"
    wrong = {**case.state, scale: case.state[scale] * 1.01}

    def other_weights(case, mode):
        return model_providers.reference("sdpa", dataclasses.replace(case, state=wrong), mode)

    def refuses(case, mode):
        raise NotImplementedError("no static shapes")

    def crashes(case, mode):
        raise RuntimeError("a fault")

    providers = {
        "reference SDPA": Provider("reference SDPA", build),
        "wrong": Provider("wrong", build, True, static=other_weights),
        "refuses": Provider("refuses", build, True, static=refuses),
        "crashes": Provider("crashes", build, True, static=crashes),
        "counts": Provider("counts", build, True, uncapturable="not captured: it counts"),
        "waits": Provider("waits", build),
    }

    def kernels(calls, device, *, seconds, graphs_alone):
        assert graphs_alone
        for (call,) in calls.values():
            call()
        found = {name: timing.Samples([2.0, 2.0], 1.0, timing.GRAPH) for name in calls}
        return {**found, "waits": timing.Samples([], 1.0, timing.GRAPH, "not captured: it waits")}

    monkeypatch.setattr(timing, "kernels", kernels)
    accepted = {name: (one, build(case, "infer")) for name, one in providers.items()}
    bound = model_measure.Bound(1e-5, {})
    rows = [{"provider": name, "ms_median": 3.0} for name in providers] + [{"provider": "none", "ms_median": None}]
    found = {row["provider"]: row for row in model_measure.with_graphs(rows, case, "infer", accepted, exact, bound, 0.0)}
    graph = {"captured_ms": 2.0, "captured_refusal": None, "captured_ratio_vs_sdpa": 1.0}
    assert found["reference SDPA"] == {"provider": "reference SDPA", "ms_median": 3.0, **graph}
    assert found["wrong"]["captured_ms"] is None and found["wrong"]["wrong"].startswith("in a CUDA graph: max error")
    assert found["refuses"]["captured_refusal"] == "NotImplementedError: no static shapes" and "wrong" not in found["refuses"]
    assert found["crashes"]["wrong"] == "RuntimeError: a fault"
    assert found["counts"]["captured_refusal"] == "not captured: it counts" and "wrong" not in found["counts"]
    assert found["waits"]["captured_refusal"] == "not captured: it waits" and found["waits"]["captured_ms"] is None
    assert found["none"] == {"provider": "none", "ms_median": None}
    trained = model_measure.with_graphs(rows, case, "train", accepted, exact, bound, 0.0)
    assert {row.get("captured_refusal") for row in trained} == {model_measure.TRAINING, None}
