"""`python -m fastattn tune` without its GPU: candidates, what wins and what is left out, the table, the plan of --quick."""

# ruff: noqa: E402  (without triton nothing below can be imported)
import json
import math

import pytest
import torch

pytest.importorskip("triton")
from backends import TRITON, device_of

from fastattn import tune, tune_cases
from fastattn.__main__ import main
from fastattn.kernels.triton import ahead, attention, ffn, tuned
from fastattn.kernels.triton.launch import GPU
from fastattn.tune_cases import KERNELS, Case, Class

NAME = "NVIDIA H100 80GB HBM3"
H100 = GPU(90, NAME)
FORWARD = Class("attention_forward", (("block_d", 64), ("dtype", "half"), ("listed", False)), None, 64)
LINEAR = Class("linear_forward", (("dtype", "half"), ("odd", False), ("activation", "relu"), ("z", False)), None, 127)
DGRAD = Class("linear_dgrad", (("dtype", "half"), ("odd", False)), None, 127)
NORM = Class("norm_forward", (("block_n", 64), ("dtype", "half")), None, None)
NORM_BACKWARD = NORM._replace(kernel="norm_backward")
SMALL = {  # of each kernel a class with cases that the interpreter does
    **{
        FORWARD._replace(kernel=kernel): [Case((2, 1, 40, 64), torch.bfloat16, mask) for mask in ("none", "padding")]
        for kernel in KERNELS[:4]
    },
    **{group: [Case((40, 32, 64), torch.bfloat16)] for group in (LINEAR, DGRAD)},
    **{group: [Case((20, 64), torch.float16)] for group in (NORM, NORM_BACKWARD)},
}


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTATTN_TUNED", raising=False)
    tuned.tiles_of.cache_clear()
    yield
    tuned.tiles_of.cache_clear()


class Clock:
    """A timer that runs one call and says what it is told for each candidate, in the order of `candidates`."""

    def __init__(self, *us):
        self.us, self.taken = us, 0

    def __call__(self, calls):
        calls[-1]()
        self.taken += 1
        return self.us[(self.taken - 1) % len(self.us)]


def candidates(monkeypatch, *choices):
    monkeypatch.setattr(tune, "candidates", lambda group, gpu: list(choices))


def tuned_class(group, timer, backend="triton", broken=None, before=()):
    return tune.tune(group, SMALL[group], H100, torch.device(device_of(backend)), timer, broken or {}, before)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_candidates_can_work_and_the_shipped_choice_is_the_first(sm, quick):
    gpu = GPU(sm)
    groups = tune_cases.classes(quick, KERNELS, gpu)
    assert {group.kernel for group in groups} == set(KERNELS)
    for group, cases in groups.items():
        found = tune_cases.candidates(group, gpu)
        assert len(found) == len(set(found)) >= 2 and len(cases) == len(set(cases)) >= 1, str(group)
        for case in cases:
            size = case.sizes[2] if group.kernel.startswith("attention") else 0
            size = ffn.squares(case.sizes[0], case.sizes[2]) if group.kernel.startswith("linear") else size
            assert (group.above or 0) <= size and (group.most is None or size <= group.most)
            fields = dict(group.fields)
            assert tuned.shipped(gpu).row(group.kernel, size, group.kernel == "linear_forward", **fields).config == found[0]
        for choice in found:
            assert tuned._row({**group.row(choice), "by": "compiled"}, "here").config == choice
            if isinstance(choice, tuple) and choice != found[0]:
                assert tune_cases.fits(group, choice, sm)


def test_tiles_beyond_the_shared_memory_are_no_candidates():
    big = tuned.ProductConfig(256, 128, 64, 8, 3)  # 144 KB
    assert [tune_cases.fits(LINEAR, big, sm) for sm in (80, 86, 89, 90, 120)] == [True, False, False, True, False]
    wide = tuned.Config(128, 128, 8, 3)
    for kernel, least in (("attention_forward", 114_688), ("attention_dkdv", 131_072)):
        group = FORWARD._replace(kernel=kernel)
        assert tune_cases.fits(group, wide, 89) == (least <= 99 * 1024) and tune_cases.fits(group, wide, 90)


def test_every_length_width_and_mask_of_the_full_run():
    groups = tune_cases.classes(False, KERNELS, H100)
    for kernel in ("attention_forward", "attention_dq", "attention_dkdv"):
        found = {
            (c.sizes[2], c.sizes[3], c.mask, c.dtype) for group, cases in groups.items() if group.kernel == kernel for c in cases
        }
        assert len(found) == 8 * 3 * 3 * 2
    assert {dict(group.fields)["activation"] for group in groups if group.kernel == "linear_forward"} == set(ffn.ACTIVATIONS)


def test_quick_is_planned_to_fit_in_two_minutes_on_an_h100():
    """By times of that machine: a core of its 16 compiles a variant in 5 s, and five candidates are timed in a second."""
    groups = tune_cases.classes(True, KERNELS, H100)
    variants, timings = tune.size(groups, H100)
    assert timings == sum(len(cases) * len(tune_cases.candidates(group, H100)) for group, cases in groups.items())
    assert tune.estimate(variants, timings, 16) == pytest.approx(15 + variants * 5 / 16 + timings / 5)
    assert tune.estimate(variants, timings, 16) <= tune.QUICK_SECONDS
    full = tune.size(tune_cases.classes(False, KERNELS, H100), H100)
    assert full[0] > 4 * variants and full[1] > 4 * timings


def test_what_is_compiled_is_what_is_launched(monkeypatch):
    """One job for each variant, and no variant of a candidate without one."""
    seen = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda jobs, sm, processes: seen.extend(jobs) or ahead.Compiled(0, []))
    groups = tune_cases.classes(True, KERNELS, H100)
    assert tune.compile_all(groups, H100) == {}
    assert len(seen) == tune.size(groups, H100)[0]
    for job in seen:
        (found,) = job()
        group, case, (choice,), _ = job.args
        assert found.config == choice and found.kernel.__name__ == f"_{group.kernel}_kernel" and found.programs > 0


@pytest.mark.parametrize("group", SMALL, ids=str)
@pytest.mark.parametrize("backend", [TRITON])
def test_what_is_compiled_is_specialised_as_what_runs(backend, group):
    """Meta tensors lead to the variants that real ones call, alignment included."""
    choice = next(choice for choice in tune_cases.candidates(group, H100) if isinstance(choice, tuple))
    for case in SMALL[group]:
        (compiled,) = tune_cases.launches(group, case, (choice,), H100)
        runs = tune_cases.prepare(group, case, torch.device(device_of(backend)), H100)(choice).launch
        assert ahead._variant(compiled) == ahead._variant(runs)


def test_some_of_quick_s_kernels_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = tuned.Config(64, 48, 4, 1)
    candidates(monkeypatch, tuned.Config(64, 32, 4, 1), wrong)
    case = Case((32, 12, 50, 64), torch.bfloat16, "padding")
    broken = tune.compile_all({FORWARD: [case, case._replace(sizes=(32, 12, 64, 64))]}, H100, processes=1)
    assert list(broken) == [tune._variant(FORWARD, case, wrong)] and "power of 2" in str(broken)
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


@pytest.mark.parametrize("group", SMALL, ids=str)
@pytest.mark.parametrize("backend", [TRITON])
def test_each_kernel_is_timed_and_the_fastest_wins(backend, group, monkeypatch):
    """Every candidate gives what the shipped tiles give, here in the interpreter."""
    shipped, *others = tune_cases.candidates(group, H100)
    others = [choice for choice in others if choice is not None][:2]
    candidates(monkeypatch, shipped, *others)
    timer = Clock(10.0, *[20.0] * (len(others) - 1), 5.0)
    outcome = tuned_class(group, timer, backend)
    assert outcome.refused == {} and timer.taken == (1 + len(others)) * len(SMALL[group])
    assert outcome.chosen == others[-1] and outcome.gain == pytest.approx(0.5)
    assert f"{tune.words(others[-1])}, 5.0 us against 10.0 of {tune.words(shipped)} as shipped: 50% less" in tune.line(outcome)


@pytest.mark.parametrize("backend", [TRITON])
def test_a_candidate_that_differs_or_fails_cannot_win(backend, monkeypatch):
    good, wrong, broken, fails = (tuned.Config(rows, 32, 4, 1) for rows in (16, 32, 64, 128))
    candidates(monkeypatch, good, wrong, broken, fails)
    launch = attention.forward_with

    def seeded(config, q, k, v, out, lse, mask, scale):
        if config == fails:
            raise RuntimeError("out of resource")
        return launch(config, q, k, v, out, lse, mask, scale * 1.05 if config == wrong else scale)

    monkeypatch.setattr(attention, "forward_with", seeded)
    case = SMALL[FORWARD][0]
    outcome = tuned_class(FORWARD, Clock(10.0), backend, {tune._variant(FORWARD, case, broken): "CompilationError: no"})
    assert outcome.chosen == good and set(outcome.us) == {good}
    assert "differs from what the shipped tiles give" in outcome.refused[wrong]
    assert outcome.refused[broken] == "RuntimeError: CompilationError: no" and "out of resource" in outcome.refused[fails]
    printed = tune.line(outcome)
    assert "as shipped, of 1 candidates" in printed and printed.count("left out: ") == 3


@pytest.mark.parametrize("backend", [TRITON])
def test_results_that_are_not_written_are_seen(backend, monkeypatch):
    good, lazy = tuned.Config(16, 32, 4, 1), tuned.Config(32, 32, 4, 1)
    candidates(monkeypatch, good, lazy)
    launch = attention.forward_with
    monkeypatch.setattr(
        attention, "forward_with", lambda config, *a: launch(config, *a)._replace(programs=1 if config == lazy else 6)
    )
    assert "out is finite elsewhere" in tuned_class(FORWARD, Clock(10.0), backend).refused[lazy]


@pytest.mark.parametrize("backend", [TRITON])
def test_one_backward_kernel_competes_with_what_two_take(backend, monkeypatch):
    groups = [FORWARD._replace(kernel=kernel) for kernel in ("attention_dq", "attention_dkdv", "attention_backward")]
    before = [tune.Outcome(group, "a", "b", {"a": [9.0, 9.0], "b": [4.0, 8.0]}, {}) for group in groups[:2]]
    single = tuned.Config(16, 64, 4, 1)
    candidates(monkeypatch, single, None)
    for us, chosen in ((7.0, single), (20.0, None)):
        outcome = tuned_class(groups[2], Clock(us, 1.0), backend, before=before)
        assert outcome.us == {single: [us, us], None: [8.0, 16.0]} and outcome.chosen == chosen
    outcome = tuned_class(groups[2], Clock(20.0, 12.0), backend)
    assert outcome.us[None] == [12.0, 12.0], "timed with the shipped tiles where the two are not in this run"


def test_the_winner_is_by_geometric_mean_and_noise_wins_nothing():
    assert tune.choose({"a": [10.0, 10.0], "b": [1.0, 90.0]}, "a") == "b"
    assert tune.choose({"a": [10.0, 10.0], "b": [1.0, 110.0]}, "a") == "a"
    assert tune.choose({"a": [10.0], "b": [9.9]}, "a") == "a" and tune.choose({"a": [10.0], "b": [9.7]}, "a") == "b"


def test_classes_after_the_deadline_are_left_out(capsys, monkeypatch):
    now, kept = iter(range(100)), []
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(tune, "tune", lambda group, *rest: tune.Outcome(group, "a", "a", {"a": [1.0]}, {}))
    found = tune.tune_all(SMALL, H100, torch.device("cpu"), Clock(1.0), {}, 3, kept.append)
    assert [outcome.group for outcome in found] == list(SMALL)[:3]
    assert kept == [found] * 3, "a run that is cut keeps what it has"
    assert "3 times taken" in (printed := capsys.readouterr().out) and "5 classes not tuned" in printed


def test_a_class_whose_shipped_choice_fails_keeps_no_other_from_being_tuned(capsys, monkeypatch):
    def fails(group, *rest):
        if group.kernel == "attention_dq":
            raise RuntimeError("out of memory")
        return tune.Outcome(group, "a", "a", {"a": [1.0]}, {})

    monkeypatch.setattr(tune, "tune", fails)
    found = tune.tune_all(SMALL, H100, torch.device("cpu"), Clock(1.0), {}, math.inf, lambda outcomes: None)
    assert len(found) == len(SMALL) - 1
    printed = capsys.readouterr().out
    assert "attention_dq block_d=64 dtype=half longest<=64: not tuned: RuntimeError: out of memory" in printed
    assert "1 classes not tuned" in printed


def outcome(group, chosen, **us):
    shipped, *_ = tune_cases.candidates(group, H100)
    return tune.Outcome(group, shipped, chosen, {shipped: [10.0], chosen: [5.0], **us}, {})


def test_the_table_is_read_back_and_obeyed(tmp_path):
    config, dq = tuned.Config(32, 64, 4, 2), FORWARD._replace(kernel="attention_dq")
    single = FORWARD._replace(kernel="attention_backward")
    found = [
        outcome(FORWARD, config),
        outcome(dq, config),
        outcome(single, None),
        outcome(LINEAR, tuned.LIBRARY),
        outcome(NORM, tuned.Config(2, 64, 2, 1)),
    ]
    path = tune.table_path(None, H100)
    tune.write(path, NAME, "python -m fastattn tune --quick", found)
    bf16 = torch.bfloat16
    assert attention.configs(H100, bf16, 64, 64, False)[:2] == (config, config)
    assert attention.configs(H100, bf16, 64, 65, False) == attention.configs(GPU(90), bf16, 64, 65, False)
    assert (
        attention.single_config(H100, bf16, 64, 64, 64, False)
        is None
        != attention.single_config(GPU(90), bf16, 64, 64, 64, False)
    )
    row = tuned.tiles_of(H100).row("linear_forward", 127, True, **dict(LINEAR.fields))
    assert row.config == tuned.LIBRARY and row.source.startswith(f"{NAME}, python -m fastattn tune --quick, 20")
    tiles = tuned.tiles_of(H100).row("linear_forward", 127, False, **dict(LINEAR.fields))
    assert tiles.config == tune_cases.candidates(LINEAR, H100)[0] and tiles.by == "measured"
    head = json.loads(path.read_text())
    assert head["device"] == NAME and head["versions"]["torch"] == torch.__version__ and head["date"] in row.source
    assert path == tuned.user_table(NAME)


def test_a_run_from_end_to_end(monkeypatch, capsys, tmp_path):
    """But for the GPU: times are made up, and nothing compiles."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.launch, "gpu_of", lambda device: H100)
    monkeypatch.setattr(ahead, "compile_ahead", lambda jobs, sm, processes: ahead.Compiled(0, [ahead.Failure(jobs[0], 0, "no")]))
    monkeypatch.setattr(tune, "prepare", lambda *case: lambda choice: choice)
    monkeypatch.setattr(tune, "_results", lambda choice: {})
    monkeypatch.setattr(tune, "_turns", lambda ready: ready)
    us = {tuned.Config(2, 512, 4, 1): 10.0, tuned.Config(1, 1024, 4, 1): 10.0, tuned.Config(4, 512, 4, 1): 6.0}
    monkeypatch.setattr(tune, "graph_us", lambda device, ready: us.get(ready[0], 20.0))
    assert main(["tune", "--quick", "--kernels", "norm_forward", "--out", str(tmp_path / "mine.json")]) == 0
    printed = capsys.readouterr().out
    assert (
        NAME in printed and "1 did not compile" in printed and f"FASTATTN_TUNED={tmp_path}/mine.json makes calls look" in printed
    )
    assert "norm_forward block_n=512 dtype=half: 4 x 512 with 4 warps, 1 stages, 6.0 us against 10.0 of 2 x 512" in printed
    assert "norm_forward block_n=1024 dtype=half: 1 x 1024 with 4 warps, 1 stages, 10.0 us, as shipped" in printed
    found = {row.fields["block_n"]: row for row in tuned.read(tmp_path / "mine.json", NAME).rows}
    assert found[512].config == tuned.Config(4, 512, 4, 1) and found[1024].config == tuned.Config(1, 1024, 4, 1)
    assert found[512].source.startswith(f"{NAME}, python -m fastattn tune --quick, ") and list(tmp_path.iterdir()) == [
        tmp_path / "mine.json"
    ]


def test_a_class_that_was_not_tuned_keeps_the_shipped_tiles():
    """Though a row for longer sequences could serve it."""
    config = tuned.Config(32, 64, 4, 2)
    long = FORWARD._replace(above=128, most=256)
    tune.write(tune.table_path(None, H100), NAME, "python -m fastattn tune", [outcome(long, config)])
    found = [attention.configs(H100, torch.bfloat16, 64, N, False)[0] for N in (64, 128, 129, 256, 257)]
    shipped = attention.configs(GPU(90), torch.bfloat16, 64, 64, False)[0]
    assert found == [shipped, shipped, config, config, shipped]


def test_a_second_run_replaces_the_rows_of_its_kernels_alone(tmp_path):
    path = tune.table_path(tmp_path / "deep" / "mine.json", H100)
    first, second = tuned.Config(32, 64, 4, 2), tuned.Config(64, 32, 4, 2)
    tune.write(path, NAME, "first", [outcome(FORWARD, first), outcome(NORM, tuned.Config(2, 64, 2, 1))])
    tune.write(path, NAME, "second", [outcome(FORWARD, second)])
    rows = {row.kernel: row for row in tuned.read(path, NAME).rows}
    assert rows["attention_forward"].config == second and "second" in rows["attention_forward"].source
    assert rows["norm_forward"].config == tuned.Config(2, 64, 2, 1) and "first" in rows["norm_forward"].source


@pytest.mark.parametrize(
    ("words", "arguments", "content"),
    [
        ("tune times kernels on a GPU, and PyTorch finds no CUDA device here", [], None),
        ("--kernels: 'softmax' is not one of attention_forward, attention_dq", ["--kernels", "norm_forward,softmax"], None),
        ("this table is of another, but the GPU is " + NAME, ["--out", "mine.json"], '{"device": "another", "rows": []}'),
        ("mine.json: this is not a table of tiles", ["--out", "mine.json"], "tiles"),
        ("--out: [Errno 17] File exists: 'mine.json'", ["--out", "mine.json/table.json"], ""),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_is_timed(words, arguments, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(arguments))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.launch, "gpu_of", lambda device: H100)
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(SystemExit) as exit:
        main(["tune", *arguments])
    assert exit.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
@pytest.mark.gpu
def test_times_are_those_of_the_device():
    """Of a product of eight times the work, more than twice the time; and the host's few calls in a graph are not in it."""
    device = torch.device("cuda")
    small, large = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (4096, 8192))
    us = [tune.graph_us(device, [lambda x=x: x @ x] * 2) for x in (small, large)]
    assert us[0] > 20 and us[1] > 2 * us[0]


def test_comparison_sees_a_small_difference():
    right = {"out": torch.randn(64, 64).bfloat16(), "lse": torch.full((64,), -math.inf)}
    tune.compare(right, right)
    tune.compare({**right, "out": (right["out"].float() * (1 + 2**-9)).bfloat16()}, right)
    with pytest.raises(ValueError, match="out differs"):
        tune.compare({**right, "out": (right["out"].float() * 1.02).bfloat16()}, right)
    with pytest.raises(ValueError, match="lse is finite elsewhere"):
        tune.compare({**right, "lse": torch.zeros(64)}, right)
