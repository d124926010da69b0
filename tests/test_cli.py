"""The commands of `python -m fastattn`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastattn import masks, pictures, testing, verify
from fastattn.__main__ import main
from fastattn.models import digits


def test_info_json_has_the_contract_s_keys(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"fastattn", "python", "torch", "triton", "devices", "backends", "cuda_build"}
    assert found["backends"]["cpu"] == {"available": True, "reason": None}
    assert {"available", "reason"} == set(found["backends"]["triton"])
    assert found["cuda_build"] is None or {"cuda", "reason", "nvcc", "archs"} <= set(found["cuda_build"])
    assert main(["info"]) == 0
    assert "backend    cpu: available" in capsys.readouterr().out


def test_explain(capsys):
    assert main(["explain", "--shape", "1,2,8,16", "--mask", "causal", "--device", "cpu"]) == 0
    assert "served by: cpu" in capsys.readouterr().out
    assert main(["explain", "--linear", "8,16,32", "--activation", "gelu", "--device", "cpu"]) == 0
    assert "linear(rows=8 K=16 F=32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["explain", "--linear", "8,16"])
    for ignored in (["--activation", "gelu"], ["--linear", "8,16,32", "--mask", "causal"], ["--linear", "8,16,32", "--verbose"]):
        with pytest.raises(SystemExit, match="explain: --"):
            main(["explain", *ignored])


def test_masks_are_drawn(tmp_path, capsys):
    assert main(["masks", "--out", str(tmp_path / "pictures")]) == 0
    paths = capsys.readouterr().out.split()
    assert sorted(paths) == sorted(map(str, (tmp_path / "pictures").glob("*.png"))) and len(paths) == len(set(paths)) > 12
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_picture_shows_the_mask_and_its_tiles():
    for name, mask in pictures.examples().items():
        shade = pictures.shades(mask)
        assert torch.equal(shade >= 2, mask.dense(1, 1, pictures.M, pictures.N)[0, 0]), name
    assert (pictures.shades(masks.full()) == 3).all()
    assert (pictures.shades(masks.causal())[:8, 8:] == 1).all() and (pictures.shades(masks.causal())[8:, :8] == 3).all()


def test_masks_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="masks: matplotlib is needed"):
        main(["masks", "--out", str(tmp_path)])


def test_verify_passes_and_fails(capsys, monkeypatch):
    import fastattn.kernels.eager.attention as eager

    monkeypatch.setattr(testing, "MASKS", {name: testing.MASKS[name] for name in ("causal_padding", "dense")})
    monkeypatch.setattr(verify, "PACKED_MASKS", ("dense",))
    monkeypatch.setattr(verify, "PACKED_LENGTHS", (17, 0, 3))
    monkeypatch.setattr(verify, "ATTENTION_SHAPES", [(2, 2, 20, 20, 32)])
    monkeypatch.setattr(verify, "ACTIVATIONS", ("gelu",))
    assert main(["verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["failure"] for row in rows} == {None}
    assert {row["op"] for row in rows} == {"attention", "varlen_attention", "linear", "ffn", "add_layer_norm", "add_rms_norm"}
    refused = {(row["backend"], row["dtype"], row["kind"]) for row in rows if row["refusal"] and row["op"] == "attention"}
    assert refused <= {
        ("cuda", dtype, kind) for dtype in testing.DTYPES for kind in testing.MASKS if "fp32" in dtype or kind == "dense"
    }
    forward = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: (forward(*args)[0] * 1.02, forward(*args)[1]))
    assert main(["verify"]) == 1
    assert "rule 1" in capsys.readouterr().out


def test_bench_of_a_shape(capsys, monkeypatch):
    monkeypatch.setattr("fastattn.bench.SECONDS", 0.05)
    assert main(["bench", "--shape", "1,2,32,16", "--device", "cpu"]) == 0
    assert "x sdpa" in capsys.readouterr().out


def test_bench_of_a_checkpoint(capsys, monkeypatch):
    monkeypatch.setattr("fastattn.bench.SECONDS", 0.05)
    checkpoint = str(digits.DIRECTORY)
    assert main(["bench", checkpoint, "--shape", "2,4,40,16", "--device", "cpu"]) == 0
    assert "x sdpa" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--dtype"):
        main(["bench", checkpoint, "--dtype", "bf16"])


@pytest.mark.parametrize("shape", ["1,2,3", "a,b,c,d", "1,-2,3,4"])
def test_bad_shape_is_refused(shape, capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--shape", shape])
    assert "--shape" in capsys.readouterr().err
