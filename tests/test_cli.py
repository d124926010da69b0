"""The commands of `python -m fastattn`."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks import encode, models, ops
from fastattn import masks, pictures, testing, verify
from fastattn.__main__ import _inputs, main, parse
from fastattn.models import digits


def test_info_json_has_the_contract_s_keys(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) - {"tiles", "cpu_build"} == {"fastattn", "python", "torch", "triton", "devices", "backends", "cuda_build"}
    assert found["backends"]["cpu"] == {"available": True, "reason": None}
    assert {"available", "reason"} == set(found["backends"]["triton"])
    assert found["cuda_build"] is None or {"cuda", "reason", "nvcc", "archs"} <= set(found["cuda_build"])
    assert main(["info"]) == 0
    assert "backend    cpu: available" in capsys.readouterr().out


def test_info_fits_on_a_screen(capsys, monkeypatch):
    """The names of the kernels are for those who ask."""
    kernels = [f"kernel_{n}<Half, 64>" for n in range(40)]
    build = {"cuda": True, "reason": "", "nvcc": "13.0", "archs": ["80", "90"], "kernels": kernels}
    monkeypatch.setattr("fastattn.info._cuda_build", lambda: build)
    assert main(["info"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 24 and "kernel_7" not in short and "sm_80, sm_90" in short
    assert main(["info", "--verbose"]) == 0
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("kernel ")] == kernels


def test_info_names_the_tables_of_tiles(capsys, monkeypatch, tmp_path):
    launch, tuned = (pytest.importorskip(f"fastattn.kernels.triton.{name}") for name in ("launch", "tuned"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(launch, "gpu_of", lambda device: launch.GPU(90, "NVIDIA H100 80GB HBM3"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for text, words in (
        ('{"device": "NVIDIA H100 80GB HBM3", "rows": []}', f"{tmp_path}/mine.json, then sm_90.json, shipped"),
        ('{"device": "NVIDIA A100", "rows": []}', f"{tmp_path}/mine.json: this table is of NVIDIA A100"),
    ):
        (tmp_path / "mine.json").write_text(text)
        monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path / "mine.json"))
        tuned.tiles_of.cache_clear()
        assert main(["info"]) == 0
        assert f"tiles      of NVIDIA H100 80GB HBM3: {words}" in capsys.readouterr().out
    tuned.tiles_of.cache_clear()


def test_explain_names_the_table_of_tiles(capsys, monkeypatch):
    pytest.importorskip("triton")
    for request in (["--shape", "1,2,40,64", "--dtype", "fp16"], ["--linear", "8,16,32", "--activation", "gelu"]):
        assert main(["explain", *request, "--device", "cpu", "--backend", "triton"]) == 0
        printed = capsys.readouterr().out
        assert "tiles from sm_90.json, shipped (compiled)" in printed or "served by: none" in printed


def test_explain(capsys):
    assert main(["explain", "--shape", "1,2,8,16", "--mask", "causal", "--device", "cpu"]) == 0
    assert "served by: cpu" in capsys.readouterr().out
    assert main(["explain", "--linear", "8,16,32", "--activation", "gelu", "--device", "cpu"]) == 0
    assert "linear(rows=8 K=16 F=32" in capsys.readouterr().out


def test_masks_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
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


def test_verify_passes_and_fails(capsys, monkeypatch):
    import fastattn.kernels.eager.attention as eager

    monkeypatch.setattr(testing, "MASKS", {name: testing.MASKS[name] for name in ("none", "padding", "causal_padding", "dense")})
    monkeypatch.setattr(testing, "BIASES", {name: testing.BIASES[name] for name in ("none", "queries", "relative")})
    monkeypatch.setattr(verify, "PACKED_MASKS", ("dense",))
    monkeypatch.setattr(verify, "PACKED_LENGTHS", (17, 0, 3))
    monkeypatch.setattr(verify, "ATTENTION_SHAPES", [(2, 2, 20, 20, 32)])
    monkeypatch.setattr(verify, "ACTIVATIONS", ("gelu",))
    assert main(["verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["failure"] for row in rows} == {None}
    assert {row["op"] for row in rows} == {"attention", "varlen_attention", "linear", "ffn", "add_layer_norm", "add_rms_norm"}
    refused = {(row["backend"], row["dtype"], row["kind"]) for row in rows if row["refusal"] and row["op"] == "attention"}
    refused = {row for row in refused if row[0] != "cuda" or not row[2].startswith("padding ")}  # with a bias or dropout
    assert refused <= {
        ("cuda", dtype, kind) for dtype in testing.DTYPES for kind in testing.MASKS if "fp32" in dtype or kind == "dense"
    }
    forward = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: (forward(*args)[0] * 1.02, forward(*args)[1]))
    monkeypatch.setattr(verify, "_backends", lambda names, device: ["eager"])
    assert main(["verify"]) == 1
    assert "rule 1" in capsys.readouterr().out


API = [
    name
    for name, f in vars(masks).items()
    if inspect.isfunction(f) and f.__annotations__.get("return") == "Mask" and name[0] != "_"
]


@pytest.mark.parametrize("name", API)
def test_a_mask_is_asked_for_by_its_name_in_the_api(name, capsys):
    assert len(API) == 11
    mask = _inputs(parse(["explain", "--mask", name, "--shape", "2,2,40,16", "--device", "cpu"])).mask or masks.full()
    assert repr(mask).startswith(f"{name}(") and " & " not in repr(mask)


def test_bench_of_a_shape(capsys, monkeypatch):
    """It says what was timed: threads, how much of it was real, and padding in both of its forms."""
    monkeypatch.setattr("fastattn.bench.SECONDS", 0.05)
    assert main(["bench", "--shape", "3,2,32,16", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    lengths = testing.attention_inputs(3, 2, 32, 32, 16, torch.float32, mask="padding").mask.key_end
    real = f"{float(lengths.sum()) / (3 * 32):.0%}"
    assert (
        f"{torch.get_num_threads()} thread" in printed and f"{real} of the keys are real, {real} of the pairs visible" in printed
    )
    *before, sdpa, keys, both, note = printed.splitlines()
    assert sdpa.startswith("sdpa ") and "1.00x sdpa" in sdpa
    assert keys.startswith("fastattn, padding(int32 (3,)) ") and keys.endswith("x sdpa")
    assert both.startswith("fastattn, padding(int32 (3,), int32 (3,)) ") and both.endswith("x sdpa")
    assert any(line.startswith("timing 3 calls in turns") for line in before) and "the padding queries" in note


@pytest.mark.parametrize(
    ("mask", "shape", "rows"),
    [
        ("causal", "1,2,32,16", 2),
        ("padding", "2,2,16,32,16", 2),
        ("key_padding", "2,2,32,16", 2),
        ("dense", "2,2,32,16", 2),
        ("causal_padding", "2,2,32,16", 3),
    ],
)
def test_bench_times_query_lengths_where_queries_are_the_keys(mask, shape, rows, capsys, monkeypatch):
    monkeypatch.setattr("fastattn.bench.SECONDS", 0.05)
    assert main(["bench", "--shape", shape, "--mask", mask, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("x sdpa") == rows


def test_bench_times_nothing_that_is_wrong(monkeypatch, capsys):
    """Query lengths included: here they hide one query too many."""
    monkeypatch.setattr("fastattn.bench.SECONDS", 0.05)
    attention = fastattn.attention

    def wrong(q, k, v, mask, **options):
        return attention(
            q, k, v, mask if mask.query_end is None else mask & masks.padding(mask.key_end, mask.query_end - 1), **options
        )

    monkeypatch.setattr(fastattn, "attention", wrong)
    with pytest.raises(AssertionError, match="rule 1"):
        main(["bench", "--shape", "3,2,32,16", "--device", "cpu"])
    assert "x sdpa" not in capsys.readouterr().out


def test_bench_of_a_checkpoint(capsys, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr("fastattn.bench.SECONDS", 0.05)
    checkpoint = str(digits.DIRECTORY)
    assert main(["bench", checkpoint, "--shape", "2,4,40,16", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "x sdpa" in printed and "no padding" in printed and f"{torch.get_num_threads()} thread" in printed
    assert printed.index("loading ") < printed.index("timing 3 calls in turns") < printed.index("x sdpa")


GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("'1,2,3' is not B,H,L,D or B,H,M,N,D", ["explain", "--shape", "1,2,3"]),
        ("'a,b,c,d' is not B,H,L,D", ["bench", "--shape", "a,b,c,d"]),
        ("'1,-2,3,4' is not B,H,L,D", ["explain", "--shape=1,-2,3,4"]),
        ("'1,2.5,3,4' is not B,H,L,D", ["explain", "--shape", "1,2.5,3,4"]),
        ("'' is not B,H,L,D", ["explain", "--shape", ""]),
        ("D must be at least 1, got 0", ["explain", "--shape", "1,1,5,0"]),
        ("sizes must be below 2^31", ["explain", "--shape", "1,1,99999999999999999999,4"]),
        ("--shape: no tensors of this shape can be made", ["bench", "--shape", "999999999,999999999,999999999,64"]),
        ("'8,16' is not ROWS,K,F", ["explain", "--linear", "8,16"]),
        ("'8,16,x' is not ROWS,K,F", ["explain", "--linear", "8,16,x"]),
        ("--linear: no tensors of this shape can be made", ["explain", "--linear", "999999999,999999999,4"]),
        ("invalid choice: 'bogus'", ["explain", "--backend", "bogus"]),
        ("invalid choice: 'bogus'", ["explain", "--mask", "bogus"]),
        ("'gpu' is not cpu, cuda or cuda:N", ["explain", "--device", "gpu"]),
        ("'cuda:x' is not cpu, cuda or cuda:N", ["bench", "--device", "cuda:x"]),
        ("'cuda:' is not cpu, cuda or cuda:N", ["explain", "--device", "cuda:"]),
        ("'meta' is not cpu, cuda or cuda:N", ["explain", "--device", "meta"]),
        (f"there is no cuda:{GPUS} here: PyTorch finds {GPUS} CUDA devices", ["explain", "--device", f"cuda:{GPUS}"]),
        ("--activation is for --linear", ["explain", "--activation", "gelu"]),
        ("are for attention, not for --linear", ["explain", "--linear", "8,16,32", "--mask", "causal"]),
        ("are for attention, not for --linear", ["explain", "--linear", "8,16,32", "--verbose"]),
        ("--mask and --dtype are for a shape", ["bench", str(digits.DIRECTORY), "--dtype", "bf16"]),
        ("B and L must be at least 1", ["bench", str(digits.DIRECTORY), "--shape", "2,4,0,16"]),
        ("nowhere: there is no such directory", ["bench", "nowhere"]),
        ("a-file: this is not a directory", ["bench", "a-file"]),
        ("empty: empty has no config.json", ["bench", "empty"]),
        ("t5: config.json says model_type 't5'; bench serves 'bert' and 'clip'", ["bench", "t5"]),
        ("list: config.json says model_type None", ["bench", "list"]),
        ("broken: config.json cannot be read", ["bench", "broken"]),
        ("binary: config.json cannot be read", ["bench", "binary"]),
        ("decoder: is_decoder = True is not served", ["bench", "decoder"]),
        ("weightless: weightless has no model.safetensors", ["bench", "weightless"]),
        ("cut: model.safetensors cannot be read", ["bench", "cut"]),
        ("other: model.safetensors lacks weights", ["bench", "other"]),
        ("wide: Error(s) in loading state_dict", ["bench", "wide"]),
        ("--out: [Errno 17] File exists: 'a-file'", ["masks", "--out", "a-file"]),
        ("--out: [Errno 20] Not a directory", ["masks", "--out", "a-file/pictures"]),
    ],
)
def test_a_mistake_is_a_sentence_and_status_2(words, arguments, monkeypatch, tmp_path, capsys):
    for package in {"masks": ["matplotlib"], "bench": ["safetensors"]}.get(arguments[0], []):
        pytest.importorskip(package)
    config = json.loads((digits.DIRECTORY / "config.json").read_text())
    wide = {**config, "text_config": {**config["text_config"], "intermediate_size": 8}}
    texts = {
        "empty": None, "t5": '{"model_type": "t5"}', "list": "[]", "broken": "{", "binary": "\udcff",
        "decoder": '{"model_type": "bert", "is_decoder": true}',
        "weightless": '{"model_type": "bert"}', "cut": '{"model_type": "bert"}', "other": '{"model_type": "bert"}',
        "wide": json.dumps(wide),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.json").write_text(text, errors="surrogateescape")
    weights = (digits.DIRECTORY / "model.safetensors").read_bytes()
    for name, some in (("cut", weights[:1000]), ("other", weights), ("wide", weights)):
        (tmp_path / name / "model.safetensors").write_bytes(some)
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    refused(words, arguments, capsys)


def refused(words, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    *usage, sentence = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and words in sentence and f"python -m fastattn {arguments[0]}: error: " in sentence
    assert usage[0].startswith("usage: ") and not any(line.startswith("Traceback") for line in usage)


@pytest.mark.parametrize(
    ("words", "command", "arguments"),
    [
        *(
            (f"--device {name}: here there are cpu", command, ["--device", name])
            for command, name in ((ops, "tpu"), (models, "meta"), (encode, "cuda:x"), (ops, f"cuda:{GPUS}"))
        ),
        ("--weights: there is no folder nowhere", models, ["--models", "bert-base", "--weights", "nowhere"]),
    ],
)
def test_a_mistake_to_a_benchmark_is_a_sentence(words, command, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main([*arguments, "--quick"] if command is not encode else arguments)
    assert words in capsys.readouterr().err + str(exit.value)


@pytest.mark.parametrize(
    ("name", "arguments"), [("matplotlib", ["masks", "--out", "pictures"]), ("safetensors", ["bench", str(digits.DIRECTORY)])]
)
def test_a_package_that_is_not_installed(name, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    refused(f"pip install {name}", arguments, capsys)
