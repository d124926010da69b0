"""The tables, sentences and pictures of README.md and docs/benchmarks.md: made from result files, and held to them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import plots, report, results, tables, verdicts

CPU = torch.device("cpu")
SDPA, OURS = "Hugging Face SDPA", "Hugging Face with fastattn.accelerate"


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/models.py"])


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "# t\n\n<!-- table: models-h100 -->\nold\n<!-- /table -->\n\n<!-- table: models-cpu -->\n<!-- /table -->\nend\n"
    )
    return path


def timed(provider: str, ms: float | None, **fields) -> dict:
    """A row of a whole model; SDPA takes 20 ms."""
    known = {
        "model": "bert-base", "layers": 4, "full_layers": 12, "dtype": "float32", "mode": "infer", "batch": 8, "seq": 256,
        "fill": 1.0, "device": "Some CPU, 2 threads, AVX2", "ratio_vs_sdpa": None if ms is None else 20.0 / ms,
    }  # fmt: skip
    return results.record(**{**known, "provider": provider, "ms_median": ms, **fields})


def on_gpu(provider: str, ms: float | None, **fields) -> dict:
    """A row of attention alone on a GPU, as the first measuring code wrote it; SDPA takes 20 us."""
    known = {"op": "attention", "model": "bert-base-128", "layers": None, "full_layers": None, "seq": 128, "mode": "forward"}
    known |= {"device": "NVIDIA H100", "ratio_vs_sdpa": None if ms is None else 0.02 / ms, "host_us": 20.0}
    return timed(provider, ms, **{**known, **fields})


def written(records: list[dict], suite: str, folder, device: str = "cpu-some", **extra):
    """A result file as a run leaves it, of a device that need not be here."""
    path = results.write(records, suite, CPU, quick=False, out=folder, **extra)
    content = results.read(path) | {"device": records[0]["device"]}
    target = folder / device / path.name
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    target.write_text(json.dumps(content))
    return target


def lines_of(suite: str, device: str, folder) -> list[str]:
    return report.table(suite, device, folder).splitlines()


def test_report_writes_tables_and_check_compares(readme, tmp_path) -> None:
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert readme.read_text().count(report.NOT_MEASURED) == 2 and readme.read_text().endswith("end\n")
    refused = timed("slow", None, refusal="NotImplementedError: not | today")
    path = written([timed(SDPA, 20.0), timed("fastattn: attention", 10.0), refused], "models", tmp_path)
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.index(report.NOT_MEASURED) < text.index("models-cpu") and text.count(report.NOT_MEASURED) == 1
    assert "4 of 12 layers" in text and "| 20 (1.00x) | **10 (2.00x)** | refused [1] |" in text
    assert "[1] slow: NotImplementedError: not \\| today" in text and tables.CPU_NOTE in text and "Some CPU" in text
    path.write_text(path.read_text().replace("10.0", "11.0"))
    assert report.main([*arguments, "--check"]) == 1


def test_times_that_hold_the_host_s_are_left_out_by_rule(tmp_path) -> None:
    """Beyond what the timing of rows without a method slept for, and so are the ratios that rest on them."""
    rows = [on_gpu("SDPA", 0.020, host_us=201.0), on_gpu("SDPA efficient", 0.040), on_gpu("fastattn cuda", 0.010, host_us=200.0)]
    rows += [on_gpu("SDPA", 0.020, mode="backward"), on_gpu("fastattn cuda", 0.050, mode="backward", host_us=460.0)]
    written(rows, "ops", tmp_path, "h100")
    lines = lines_of("ops", "h100", tmp_path)
    (forward,) = [line for line in lines if "forward |" in line]
    (backward,) = [line for line in lines if "backward |" in line]
    assert forward.endswith("| left out | 40 | 10 |")  # no ratios, and nobody is known to be the fastest
    assert backward.endswith("| 20 (1.00x) |  | left out |")
    (sentence,) = [line for line in lines if line.startswith("Left out: ")]
    assert sentence.startswith("Left out: 2 of 5 timed rows,") and "200 us" in sentence


@pytest.mark.parametrize("method", ["graph replay", "events behind a sleep", "wall clock"])
def test_a_method_that_keeps_the_host_out_is_believed(method, tmp_path) -> None:
    rows = [on_gpu("SDPA", 0.020), on_gpu("fastattn triton", 0.010)]
    written([row | {"method": method, "host_us": 900.0} for row in rows], "ops", tmp_path, "h100")
    text = report.table("ops", "h100", tmp_path)
    assert "| 20 (1.00x) | **10 (2.00x)** |" in text and "eft out" not in text


@pytest.mark.parametrize(("ratio", "cell"), [(2.13, "2.13x)"), (2.15, "2.15x†)"), (1.87, "1.87x)"), (1.85, "1.85x†)")])
def test_a_ratio_far_from_that_of_the_cells_is_flagged(ratio, cell, tmp_path) -> None:
    written([timed(SDPA, 20.0), timed(OURS, 10.0, ratio_vs_sdpa=ratio)], "models", tmp_path)
    text = report.table("models", "cpu", tmp_path)
    assert f"**10 ({cell}**" in text and "than Hugging Face SDPA; median of paired rounds" in text
    assert (tables.FLAG_NOTE in text) == (tables.FLAG in cell)


@pytest.mark.parametrize(
    ("words", "said"),
    [("not timed: the host came too late", "not timed [1]"), ("TypeError: no", "refused [1]"), ("x is not installed", "–")],
)
def test_a_row_without_a_time_says_why(words, said, tmp_path) -> None:
    rows = [timed(SDPA, 20.0), timed("OpenVINO", None, refusal=words), timed(SDPA, 20.0, mode="train")]
    rows.append(timed("OpenVINO", 10.0, mode="train"))
    written(rows, "models", tmp_path)
    text = report.table("models", "cpu", tmp_path)
    assert f"| **20 (1.00x)** | {said} |" in text and (f"[1] OpenVINO: {words}" in text) == ("[1]" in said)


def test_without_paired_rounds_the_cells_divide(tmp_path) -> None:
    written([timed(SDPA, 20.0, ratio_vs_sdpa=None), timed(OURS, 8.0, ratio_vs_sdpa=None)], "models", tmp_path)
    text = report.table("models", "cpu", tmp_path)
    assert "| 20 (1.00x) | **8 (2.50x)** |" in text and "than Hugging Face SDPA; ratio of medians)" in text


def test_a_model_is_shown_as_called_and_captured(tmp_path) -> None:
    """In two lines, each with its own fastest; what could not be captured says why."""
    fields = {"device": "NVIDIA H100", "host_us": 5000.0, "method": "wall clock"}
    rows = [timed(SDPA, 20.0, captured_ms=9.0, **fields), timed(OURS, 40.0, captured_ms=6.0, **fields)]
    rows += [timed("Hugging Face eager", 30.0, captured_ms=None, captured_refusal="RuntimeError: not in a graph", **fields)]
    steps = {"mode": "train", "captured_ms": None, "captured_refusal": "not captured: a training step"} | fields
    rows += [timed(SDPA, 20.0, **steps), timed(OURS, 25.0, **steps)]
    written(rows, "models", tmp_path, "h100")
    lines = lines_of("models", "h100", tmp_path)
    assert [line.split(", ")[-1] for line in lines if line.startswith("| bert")] == [
        "as called | **20 (1.00x)** | 40 (0.50x) | 30 (0.67x) |",
        "captured | 9 (1.00x) | **6 (1.50x)** | refused [1] |",
        "as called | **20 (1.00x)** | 25 (0.80x) |  |",
    ]
    text = "\n".join(lines)
    assert "[1] Hugging Face eager: RuntimeError: not in a graph" in text and tables.CAPTURED_NOTE in text
    assert "than Hugging Face SDPA; median of paired rounds, else ratio of medians)" in text
    assert verdicts.models(rows) == [
        f"{OURS}, infer, as called, is **slower**: 2.00 times the time of {SDPA}",
        f"{OURS}, infer, captured, is faster: 0.67 times the time of {SDPA}",
        f"{OURS}, train, as called, is **slower**: 1.25 times the time of {SDPA}",
    ]


def test_captured_rounds_have_a_ratio_of_their_own(tmp_path) -> None:
    fields = {"device": "NVIDIA H100", "method": "wall clock"}
    rows = [timed(SDPA, 20.0, captured_ms=9.0, captured_ratio_vs_sdpa=1.0, **fields)]
    rows += [timed(OURS, 40.0, captured_ms=6.0, captured_ratio_vs_sdpa=1.75, **fields)]
    written(rows, "models", tmp_path, "h100", left_out=["clip-vit-b-32 infer"])
    text = report.table("models", "h100", tmp_path)
    assert "captured | 9 (1.00x) | **6 (1.75x†)** |" in text and "else" not in text
    assert "Not measured in this run: clip-vit-b-32 infer." in text


def test_verdicts_say_what_the_tables_say() -> None:
    """Also where a ratio of paired rounds and the medians disagree."""
    rows = [timed(SDPA, 20.0), timed(OURS, 21.0, ratio_vs_sdpa=1.25)]
    assert verdicts.models(rows) == [f"{OURS}, infer, is faster: 0.80 times the time of {SDPA}"]


def test_verdicts_on_kernels_compare_with_the_fastest_of_torch() -> None:
    times = {"SDPA efficient": 0.03, "SDPA cudnn": 0.02, "fastattn triton": 0.01, "fastattn cuda": 0.04}
    rows = [
        on_gpu(name, ms, fill=fill, seq=seq) for name, ms in times.items() for fill, seq in ((0.5, 128), (0.5, 512), (1.0, 128))
    ]
    slow = [row | {"ms_median": 0.05} if row["seq"] == 512 and row["provider"] == "fastattn triton" else row for row in rows]
    whose = "times the time of the fastest backend of SDPA"
    assert verdicts.kernels(slow) == [
        f"fastattn triton, forward, with padding, is faster in 1 of 2 cases: 0.50 to 2.50 {whose}",
        f"fastattn triton, forward, without padding, is faster: 0.50 {whose}",
        "fastattn cuda is faster in 1 of 3 cases: 0.80 to 4.00 times the time of fastattn triton",
    ]


def test_results_that_broke_the_rule_are_counted() -> None:
    rows = [on_gpu("fastattn triton", 0.01), on_gpu("fastattn triton", None, wrong="dq: off", mode="backward")]
    rows += [on_gpu("fastattn cuda", None, refusal="NotImplementedError: no"), on_gpu("SDPA", 0.02)]
    assert verdicts.held(rows) == ["fastattn triton, attention, forward and backward, float32: 1 of 2 results kept to the rule"]


def test_embeddings_are_compared_best_against_best(tmp_path) -> None:
    """Never a good batch size of one with a bad one of the other."""
    plain, ours = "sentence-transformers", "with fastattn.accelerate"
    fields = {"op": "encode", "model": "minilm", "texts": 115}
    times = {(plain, 32): 500.0, (ours, 32): 350.0, (plain, 128): 1000.0, (ours, 128): 400.0}
    rows = [timed(name, ms, batch=batch, ratio=None, **fields) for (name, batch), ms in times.items()]
    alone = [timed(name, 5.0, batch=1, ratio=None, **{**fields, "texts": 1}) for name in (plain, ours)]
    written(rows + alone, "encode", tmp_path)
    (line,) = [line for line in lines_of("verdict-encode", "cpu", tmp_path) if line.startswith("- ")]
    assert line == (
        "- 2 rows embed the same 115 texts; best against best: 500 ms for sentence-transformers, "
        "350 ms with fastattn.accelerate, 1.43 times faster."
    )


def test_a_masks_table_compares_with_sdpa(tmp_path) -> None:
    rows = [
        timed(name, ms, op="attention", model="window(8, 0)", visible=0.106, ratio_vs_sdpa=10 / ms, full_layers=None)
        for name, ms in (("eager", 20.0), ("SDPA", 10.0), ("fastattn cpu", 4.0))
    ]
    written(rows, "masks", tmp_path)
    text = report.table("masks", "cpu", tmp_path)
    assert "ms (x = times faster than SDPA; median of paired rounds)" in text and "8 × 256, 11% of pairs visible" in text
    assert "| 20 (0.50x) | 10 (1.00x) | **4 (2.50x)** |" in text
    assert tables.MASKS_CPU_NOTE in text and tables.CPU_NOTE not in text


def test_ops_without_an_sdpa_are_compared_with_eager(tmp_path) -> None:
    fields = {"op": "ffn", "seq": None, "tokens": 616, "full_layers": None, "ratio_vs_sdpa": None}
    rows = [timed(name, ms, ratio_vs_eager=30 / ms, **fields) for name, ms in (("eager", 30.0), ("fastattn cpu", 20.0))]
    attention = {"op": "attention", "full_layers": None}
    written([timed("SDPA", 20.0, **attention), timed("fastattn cpu", 10.0, **attention), *rows], "ops", tmp_path)
    text = report.table("ops", "cpu", tmp_path)
    assert "times faster than SDPA, else than eager" in text and "616 tokens" in text
    assert "| 20 (1.00x) | **10 (2.00x)** |  |" in text and "|  | **20 (1.50x)** | 30 (1.00x) |" in text


def test_columns_are_explained_where_they_stand(tmp_path) -> None:
    written([timed(SDPA, 20.0), timed("reference eager", 10.0)], "models", tmp_path)
    text = report.table("models", "cpu", tmp_path)
    assert tables.LEGEND["reference eager"] in text and tables.LEGEND["fastattn: + unpadded"] not in text
    written([timed(SDPA, 20.0), timed("fastattn: + unpadded", 5.0)], "models", tmp_path)
    text = report.table("models", "cpu", tmp_path)
    assert tables.LEGEND["reference eager"] not in text and tables.LEGEND["fastattn: + unpadded"] in text
    assert tables.CPU_NOTE in text and "| **5 (4.00x)** |" in text


def test_every_model_provider_has_a_legend_or_a_name_that_says_it() -> None:
    from benchmarks import model_providers

    plain = ("Hugging Face eager", "Hugging Face SDPA", "Hugging Face torch.compile", "ONNX Runtime", "OpenVINO")
    for device in (CPU, torch.device("cuda")):
        names = [provider.name for provider in model_providers.providers(device)]
        if "Hugging Face SDPA" not in names:
            pytest.skip("transformers is not installed")
        assert set(names) <= {*plain, *tables.LEGEND}


def test_a_quick_result_never_enters_the_readme(readme, tmp_path) -> None:
    results.write([timed(SDPA, 20.0)], "models", CPU, quick=True, out=tmp_path)
    assert report.NOT_MEASURED in report.table("models", "cpu", tmp_path)
    assert report.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    assert "bert-base" not in readme.read_text()


def test_training_says_what_dropout_it_had(tmp_path) -> None:
    path = written([timed(SDPA, 20.0, mode="train")], "models", tmp_path)
    assert tables.TRAIN_NOTE in report.table("models", "cpu", tmp_path)
    assert tables.TRAIN_NOTE not in report.table("highlights", "cpu", tmp_path)  # the README says it once for all of them
    assert "Training steps have no dropout here" in (report.DOCS.parent / "README.md").read_text()
    written([timed(SDPA, 20.0, mode="train", dropout=0.1)], "finetune", tmp_path)
    text = report.table("finetune", "cpu", tmp_path)
    assert "no dropout" not in text and "1.00x" in text
    path.write_text(path.read_text().replace("python -m benchmarks.models", "by another script"))
    text = report.table("models", "cpu", tmp_path)
    assert tables.OTHER_TRAIN_NOTE in text and tables.TRAIN_NOTE not in text
    written([timed(SDPA, 20.0)], "models", tmp_path)
    assert "dropout" not in report.table("models", "cpu", tmp_path)


def test_a_run_that_was_cut_says_so(tmp_path) -> None:
    written([timed(SDPA, 20.0)], "models", tmp_path, complete=True)
    assert "the run was cut" not in report.table("models", "cpu", tmp_path)
    written([timed(SDPA, 20.0)], "models", tmp_path, complete=False)
    assert "the run was cut" in report.table("models", "cpu", tmp_path)


def test_highlights_are_few_rows_of_the_models(tmp_path) -> None:
    """Known models and providers, in the dtype that stands first; and not the picture, which is that of all rows."""
    rows = [
        timed(provider, ms, fill=fill, dtype=dtype, model=model)
        for model in ("bert-base", "digits-clip")
        for fill in (1.0, 0.5)
        for dtype in ("float32", "bfloat16")
        for provider, ms in ((SDPA, 20.0), ("Hugging Face eager", 30.0), ("fastattn: + unpadded", 4.0), (OURS, 5.0))
    ]
    written(rows, "models", tmp_path)
    lines = lines_of("highlights", "cpu", tmp_path)
    full, ragged = [line for line in lines if line.startswith("| bert-base")]
    assert "50% real tokens, float32" in ragged and ragged.endswith("| 20 (1.00x) | **5 (4.00x)** |") and "%" not in full
    text = "\n".join(lines)
    assert "eager" not in text and "digits" not in text and "![" not in text and tables.CPU_NOTE in text


def test_both_files_are_held_to_the_results(tmp_path, monkeypatch, capsys) -> None:
    files = tmp_path / "README.md", tmp_path / "benchmarks.md"
    monkeypatch.setattr(report, "FILES", files)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    for path in files:
        path.write_text("<!-- table: models-cpu -->\n<!-- /table -->\n")
    assert report.main(["--check", "--results", str(tmp_path)]) == 1 and capsys.readouterr().err.count("differs") == 2
    assert report.main(["--results", str(tmp_path)]) == 0 == report.main(["--check", "--results", str(tmp_path)])
    files[1].write_text("<!-- table: models-cpu -->\nby hand\n<!-- /table -->\n")
    assert report.main(["--check", "--results", str(tmp_path)]) == 1 and "benchmarks.md differs" in capsys.readouterr().err


def test_a_picture_is_never_older_than_its_results(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "FILES", ())
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    (tmp_path / "results").mkdir()
    path = written([timed(SDPA, 20.0), timed(OURS, 10.0)], "models", tmp_path / "results")
    arguments = ["--results", str(tmp_path / "results")]
    assert report.main([*arguments, "--check"]) == 1 and "does not show" in capsys.readouterr().err
    assert report.main(arguments) == 0 == report.main([*arguments, "--check"])
    picture = tmp_path / "docs" / "models-cpu-some.png"
    drawn = picture.read_bytes()
    assert report.main(arguments) == 0 and picture.read_bytes() == drawn
    path.write_text(path.read_text().replace("10.0", "11.0"))
    assert report.main([*arguments, "--check"]) == 1 and picture.read_bytes() == drawn
    assert report.main(arguments) == 0 and picture.read_bytes() != drawn
    (tmp_path / "docs" / "models-cpu-gone.png").write_bytes(drawn)
    capsys.readouterr()
    assert report.main([*arguments, "--check"]) == 1 and "belongs to no result file" in capsys.readouterr().err


def test_a_picture_has_whole_titles_and_says_what_whiskers_are(tmp_path, monkeypatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    rows = [
        timed(name, ms, fill=0.5, model=model, ms_p20=ms, ms_p80=ms * 1.1, dtype="bfloat16")
        for model in ("minilm", "clip-vit-b-32", "a-model-with-a-long-name-of-its-own")
        for name, ms in ((SDPA, 20.0), (OURS, 10.0))
    ]
    plots.draw(rows, tmp_path / "p.png", "models")
    (figure,) = figures
    figure.draw_without_rendering()
    width = figure.bbox.width
    for axis in figure.axes:
        box = axis.title.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width
        assert "50% real tokens" in axis.get_title().replace("\n", " ") and "full" not in axis.get_title()
        assert [text.get_text().strip() for text in axis.texts] == ["20  1.00x", "10  2.00x"]
    assert "whiskers: 20th to 80th percentile of the rounds; x: times faster than Hugging Face SDPA" in figure.get_suptitle()
    monkeypatch.undo()
    pyplot.close(figure)


def test_pictures_are_linked_from_where_they_lie() -> None:
    text = (report.DOCS / "benchmarks.md").read_text()
    linked = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert linked and all((report.DOCS / name).exists() for name in linked)
