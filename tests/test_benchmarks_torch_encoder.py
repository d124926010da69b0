"""`benchmarks.models --models torch-encoder`: torch.nn.TransformerEncoder as it comes and converted, gated, then timed."""

import pytest
import torch

import fastattn
from benchmarks import model_cases, model_measure, model_providers, models, results, shapes
from fastattn import timing

NAMES = ["torch.nn eager", "torch.nn", model_providers.CONVERTED]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(shapes.CONFIGS, "torch-encoder", shapes.torch_encoder(2, 32, 4))
    monkeypatch.setattr(models.interpreter, "run", lambda names, limit: [])
    monkeypatch.setattr(models.plots, "draw", lambda records, path, suite: "no picture")
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: timing.Ceilings(1e12, 1e10))


def load(fill: float) -> model_cases.Case:
    return model_cases.load("torch-encoder", batch=5, seq=16, fill=fill, layers=2, folder=None, dtype=torch.float32, device=CPU)


def measured(mode: str, fill: float) -> list[dict]:
    return model_measure.run(load(fill), mode, model_providers.of("torch-encoder", CPU), seconds=0.0).rows


def test_runs_at_both_fills_in_both_modes(tmp_path):
    command = ["--models", "torch-encoder", "--batch", "3", "--seq", "12", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert models.main(command) == 0
    (path,) = tmp_path.glob("*/models.json")
    rows = results.read(path)["records"]
    assert [row["provider"] for row in rows] == 4 * NAMES
    assert {(row["mode"], row["fill"] == 1) for row in rows} == {(m, full) for m in models.MODES for full in (False, True)}
    assert all(row["ms_median"] > 0 and row["ratio_vs_eager"] > 0 and row["ratio_vs_sdpa"] > 0 for row in rows)
    assert all(row["max_error"] < 1e-4 and (row["mode"] == "infer" or row["gradient_error"] < 1e-4) for row in rows)


@pytest.mark.parametrize("fill", [1.0, 0.5])
def test_torch_nn_takes_its_fast_path_and_eager_does_not(fill, monkeypatch):
    taken, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda src, *rest: taken.append(src) or fast(src, *rest))
    case = load(fill)
    for implementation, layers in (("eager", 0), ("torch.nn", 2)):
        taken.clear()
        with torch.no_grad():
            model_providers.reference(implementation, case, "infer").forward(**case.inputs)
        assert len(taken) == layers and all(x.is_nested == (fill < 1) for x in taken)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("mode", models.MODES)
def test_a_wrong_conversion_is_not_timed(mode, monkeypatch):
    convert = fastattn.nn.convert

    def wrong(model):
        convert(model)
        model.encoder.layers[1].norm1.eps = 1e-2

    monkeypatch.setattr(fastattn.nn, "convert", wrong)
    (row,) = [row for row in measured(mode, 0.5) if row["provider"] == model_providers.CONVERTED]
    assert row["ms_median"] is None and "over" in row["wrong"]


def test_layers_that_are_left_are_a_failure(monkeypatch):
    monkeypatch.setattr(fastattn.nn, "convert", lambda model: model)
    (row,) = [row for row in measured("infer", 1.0) if row["provider"] == model_providers.CONVERTED]
    assert row["ms_median"] is None and "encoder.layers.0" in row["wrong"]


def test_providers_are_chosen_among_those_of_all_models(capsys):
    found = {name: model_providers.of(name, CPU) for name in ("bert-base", "torch-encoder")}
    chosen = models.select(found, "convert")
    assert [one.name for one in chosen["torch-encoder"]] == NAMES
    assert [one.name for one in chosen["bert-base"]] == models.baseline_names(found["bert-base"])
    with pytest.raises(SystemExit):
        models.select(found, "nobody")


def test_weights_of_a_folder_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        models.main(["--models", "torch-encoder", "--weights", str(tmp_path)])
    assert "torch-encoder takes none" in capsys.readouterr().err
