"""`python -m benchmarks.ops --suite training`: its gates let the right ones through and no others, and what its records say."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch
import torch.nn.functional as F

import fastattn
from benchmarks import attention_providers, measure, ops, refusals, report, results, shapes, tables, training_cases
from fastattn import biases, timing

CPU = torch.device("cpu")
RECIPES = [recipe.small() for recipe in training_cases.RECIPES]
DROPPED = dataclasses.replace(RECIPES[2], H=8, S=96)  # half of its tokens are padding
CEILINGS = timing.Ceilings(1e12, 1e10)


def task_of(recipe: training_cases.Recipe) -> measure.Task:
    return ops.training_task(recipe, recipe.cpu_batch, torch.float32, CPU)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name}, fill {recipe.fill}")
def test_everyone_serves_every_recipe(recipe: training_cases.Recipe) -> None:
    rows = measure.measure(task_of(recipe), CPU, seconds=0.0, modes=ops.MODES)
    assert not results.failures(rows) and not any(row["refusal"] for row in rows)
    providers = [provider.name for provider in attention_providers.providers(CPU)]
    expected = {(name, mode) for name in providers for mode in ops.MODES}
    expected |= {("fastattn cpu", ops.BITS)} if recipe.dropout else set()
    assert {(row["provider"], row["mode"]) for row in rows if row["ms_median"] > 0} == expected
    for row in rows:
        random = recipe.dropout > 0 and not row["provider"].startswith("fastattn")
        assert row.get("gate") == (training_cases.GATE if random else None)
        assert (row["max_error"] is None) == (row["mode"] == ops.BITS)


def test_a_seed_on_the_host_is_in_no_graph_of_a_backward_pass(monkeypatch) -> None:
    """PyTorch's own kernels leave it there unless their forward pass is captured too: their backward pass is queued."""
    told: list[dict] = []
    honest = timing.kernels

    def kernels(*args, uncapturable=None, **options):
        told.append(uncapturable or {})
        return honest(*args, **options)

    monkeypatch.setattr(timing, "kernels", kernels)
    measure.measure(task_of(DROPPED), CPU, seconds=0.0, modes=ops.MODES)
    backward = {"SDPA", "SDPA math", "SDPA flash"} & {provider.name for provider in attention_providers.providers(CPU)}
    assert "SDPA" in backward and told == [{}, dict.fromkeys(backward, training_cases.SEED_ON_HOST), {}]


def dropping(rate: float, rescaled_for: float):
    """Eager attention that drops at one rate and rescales for another."""

    def build():
        eager = attention_providers.eager(dataclasses.replace(DROPPED.request(2, CPU), dropout=0.0))
        keep = DROPPED.request(2, CPU).keep()

        def run(q, k, v):
            p = torch.softmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf")), -1)
            return F.dropout(p, rate) * (1 - rate) / (1 - rescaled_for) @ v if rate else eager(q, k, v)

        return run

    return build


@pytest.mark.parametrize(
    ("rate", "rescaled_for", "words"),
    [
        (0.1, 0.1, None),
        (0.0, 0.0, "variance"),  # it drops nothing
        (0.02, 0.02, "variance"),
        (0.3, 0.3, "variance"),
        (0.1, 0.0, "on average"),  # kept weights stay as they are
        (0.1, 0.2, "on average"),
    ],
)
def test_a_random_provider_is_held_to_its_rate(rate: float, rescaled_for: float, words: str | None) -> None:
    torch.manual_seed(0)
    task = task_of(DROPPED)
    random = next(one for one in task.contenders if one.name == "eager")
    rows = measure.measure(
        task._replace(contenders=[random._replace(build=dropping(rate, rescaled_for))]), CPU, seconds=0.0, modes=("forward",)
    )
    assert (rows[0]["wrong"] is None) == (rows[0]["ms_median"] is not None) == (words is None)
    assert words is None or words in rows[0]["wrong"]


def test_fastattn_is_held_to_the_weights_that_its_seed_drops() -> None:
    request = DROPPED.request(2, CPU)
    others = functools.partial(attention_providers.ours, "eager", dataclasses.replace(request, seed=request.seed + 1))
    task = task_of(DROPPED)
    task = task._replace(contenders=[measure.Contender("another seed", others, True)], parts=())
    (row,) = measure.measure(task, CPU, seconds=0.0, modes=("forward",))
    assert "max error" in row["wrong"]


@pytest.mark.parametrize("S", [5, 300])
def test_a_table_is_the_same_bias_for_all(S: int) -> None:
    recipe = dataclasses.replace(next(one for one in RECIPES if one.bias == attention_providers.TABLE), S=S)
    table = torch.randn(recipe.learned(), requires_grad=True)
    made = recipe.request(2, CPU).dense_bias()(table)
    assert torch.equal(made, biases.relative(table).dense(S, S))
    assert torch.autograd.grad(made.sum(), table)[0].sum() == recipe.H * S * S


def test_pairs_and_tokens_of_a_recipe() -> None:
    for recipe in RECIPES:
        request = recipe.request(2, CPU)
        mask = request.mask() or fastattn.masks.full()
        visible = mask.dense(2, 1, recipe.S, recipe.S)
        tokens = 2 * recipe.S if request.lengths is None else int(request.lengths.sum())
        assert training_cases.visible_pairs(request) == (float(visible.sum()), tokens)


def test_the_memory_of_a_call_on_a_cpu() -> None:
    x = torch.ones(1000, 1000)

    def call():
        y = x + 1
        z = (y * 2).sum()
        return y, z

    peak = measure.cpu_peak_bytes(call)
    assert peak is None or 8_000_000 <= peak < 8_001_000
    q = torch.randn(1, 2, 128, 16)
    held = measure.cpu_peak_bytes(lambda: fastattn.attention(q, q, q))
    assert held is None or q.numel() * 4 <= held < 2 * 128 * 128 * 4


def test_the_suite_writes_its_own_file_and_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py"])
    monkeypatch.setattr(timing, "interleaved", functools.partial(timing.interleaved, least=1, most=1))
    monkeypatch.setattr(timing, "_repeats", lambda call, device: 1)
    assert ops.main(["--suite", "training", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.json")
    content = results.read(path)
    assert path.name == "training.json"
    answers = {row["provider"]: row for row in content["refusals"]}
    assert all(row["answer"] == refusals.SERVED for row in answers.values())
    assert set(answers["fastattn cpu"]["errors"]) == {"out", "dq", "dk", "dv", "dbias"} and "errors" not in answers["SDPA"]
    bits = [row for row in content["records"] if row["mode"] == ops.BITS]
    assert len(bits) == sum(recipe.dropout > 0 for recipe in RECIPES)
    row = bits[0]
    assert row["useful_bytes"] == row["batch"] * row["heads"] * row["seq"] * -(-row["seq"] // 32) * 4 and row["dropout"] == 0.1
    results.write(content["records"], "training", CPU, quick=False, out=tmp_path)
    text = report.table("training", "cpu", tmp_path)
    assert tables.TRAINING_NOTE in text and "(x = times faster than SDPA; " in text
    line = next(line for line in text.splitlines() if ", bits |" in line)
    assert (
        line.startswith("| attention, bert-base-512, dropout, 2 × 48, float32, bits |") and "**" not in line and "x)" not in line
    )


def test_the_recipes_are_those_of_whole_models() -> None:
    base, text = shapes.CONFIGS["bert-base"], shapes.CLIP_B_TEXT
    named = {recipe.name: recipe for recipe in training_cases.RECIPES}
    bert, clip = named["bert-base-512, dropout"], named["clip-text-77"]
    sizes = base["num_attention_heads"], base["hidden_size"], base["max_position_embeddings"]
    assert sizes == (bert.H, bert.H * bert.D, bert.S)
    assert (clip.H, clip.H * clip.D, clip.S, clip.causal) == (text.heads, text.hidden, text.positions, True)
    axial = next(recipe for recipe in training_cases.RECIPES if recipe.rows)
    assert axial.S == 1280 and {recipe.fill for recipe in training_cases.RECIPES if "bert" in recipe.name} == {1.0, 0.5}
