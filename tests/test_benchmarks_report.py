"""The tables of the README and of docs/speed.md: made from result files, and held to them."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import report, results

CPU = torch.device("cpu")


@pytest.fixture
def readme(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/models.py"])
    path = tmp_path / "README.md"
    path.write_text(
        "# t\n\n<!-- table: models-h100 -->\nold\n<!-- /table -->\n\n<!-- table: models-cpu -->\n<!-- /table -->\nend\n"
    )
    return path


def timed(provider: str, ms: float, **fields) -> dict:
    known = {
        "model": "bert-base",
        "layers": 4,
        "full_layers": 12,
        "dtype": "float32",
        "mode": "infer",
        "batch": 8,
        "seq": 256,
        "fill": 1.0,
    }
    device = "Some CPU, 2 threads, AVX2"
    return results.record(**known, provider=provider, device=device, ms_median=ms, ratio_vs_eager=20.0 / ms, **fields)


def test_report_writes_tables_and_check_compares(readme, tmp_path) -> None:
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert readme.read_text().count(report.NOT_MEASURED) == 2 and readme.read_text().endswith("end\n")
    refused = results.record(**{**timed("slow", 1.0), "ms_median": None, "refusal": "NotImplementedError: not | today"})
    rows = [timed("eager", 20.0), timed("fastattn: attention", 10.0), refused]
    path = results.write(rows, "models", CPU, quick=False, out=tmp_path)
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.index(report.NOT_MEASURED) < text.index("models-cpu") and text.count(report.NOT_MEASURED) == 1
    assert "4 of 12 layers" in text and "| 20 (1.00x) | **10 (2.00x)** | refused [1] |" in text
    assert "[1] slow: NotImplementedError: not \\| today" in text and report.CPU_NOTE in text and "Some CPU" in text
    path.write_text(path.read_text().replace("10.0", "11.0"))
    assert report.main([*arguments, "--check"]) == 1


def test_a_masks_table_compares_with_sdpa_as_well(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py"])
    rows = [
        {**timed(name, ms), "op": "attention", "model": "window(8, 0)", "visible": 0.106, "ratio_vs_sdpa": 10 / ms}
        for name, ms in (("eager", 20.0), ("SDPA", 10.0), ("fastattn cpu", 4.0))
    ]
    results.write(rows, "masks", CPU, quick=False, out=tmp_path)
    text = report.table("masks", "cpu", tmp_path)
    assert "ms (x = times faster than eager, than SDPA)" in text and "8 × 256, 11% of pairs visible" in text
    assert "| 20 (1.00x, 0.50x) | 10 (2.00x, 1.00x) | **4 (5.00x, 2.50x)** |" in text
    assert report.MASKS_CPU_NOTE in text and report.CPU_NOTE not in text


def test_an_unpadded_column_is_explained_where_there_is_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/models.py"])
    rows = [timed("Hugging Face eager", 20.0), timed("fastattn: attention", 10.0)]
    results.write(rows, "models", CPU, quick=False, out=tmp_path)
    assert report.UNPADDED_NOTE not in report.table("models", "cpu", tmp_path)
    results.write([*rows, timed("fastattn: + unpadded", 5.0)], "models", CPU, quick=False, out=tmp_path)
    text = report.table("models", "cpu", tmp_path)
    assert report.UNPADDED_NOTE in text and report.CPU_NOTE in text and "| **5 (4.00x)** |" in text


def test_a_quick_result_never_enters_the_readme(readme, tmp_path) -> None:
    results.write([timed("eager", 20.0)], "models", CPU, quick=True, out=tmp_path)
    assert report.NOT_MEASURED in report.table("models", "cpu", tmp_path)
    assert report.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    assert "bert-base" not in readme.read_text()


def test_highlights_are_few_rows_of_the_models(tmp_path, monkeypatch) -> None:
    """Two columns, batches with much padding, the dtype that stands first; and not the plot, which is that of all rows."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/models.py"])
    rows = [
        {**timed(provider, ms), "fill": fill, "dtype": dtype, "ratio_vs_sdpa": 20 / ms}
        for fill in (1.0, 0.5)
        for dtype in ("float32", "bfloat16")
        for provider, ms in (("Hugging Face eager", 30.0), *zip(report.HIGHLIGHTS, (20.0, 5.0), strict=True))
    ]
    results.write(rows, "models", CPU, quick=False, out=tmp_path)
    text = report.table("highlights", "cpu", tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| bert-base")]
    assert "50% real tokens, float32" in row and row.endswith("| 20 (1.00x) | **5 (4.00x)** |")
    assert "ms (x = times faster than SDPA)" in text and "eager" not in text and "![" not in text


def test_both_files_are_held_to_the_results(tmp_path, monkeypatch, capsys) -> None:
    files = tmp_path / "README.md", tmp_path / "speed.md"
    monkeypatch.setattr(report, "FILES", files)
    for path in files:
        path.write_text("<!-- table: models-cpu -->\n<!-- /table -->\n")
    assert report.main(["--check", "--results", str(tmp_path)]) == 1 and capsys.readouterr().err.count("differs") == 2
    assert report.main(["--results", str(tmp_path)]) == 0 == report.main(["--check", "--results", str(tmp_path)])
    files[1].write_text("<!-- table: models-cpu -->\nby hand\n<!-- /table -->\n")
    assert report.main(["--check", "--results", str(tmp_path)]) == 1 and "speed.md differs" in capsys.readouterr().err


def test_pictures_are_linked_from_where_they_lie() -> None:
    text = (report.DOCS / "speed.md").read_text()
    linked = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert linked and all((report.DOCS / name).exists() for name in linked)
