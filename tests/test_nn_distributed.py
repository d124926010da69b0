"""`fastattn.nn` over two processes by gloo: what tests/sharded.py computes there, against one process with all of a batch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_by_two_ranks
from torch import nn

from fastattn.nn import DecoderLayer, Encoder, EncoderLayer, FeedForward, MultiHeadAttention, tensor_parallel_plan

pytestmark = pytest.mark.xdist_group("nn_distributed")  # one run of two processes is for all
TOLERANCE = 1e-5  # of the largest number of a tensor
DATA_PARALLEL = [f"{kind}, {lengths}" for kind in ("ddp", "fsdp2") for lengths in ("equal", "unequal")]
KINDS = [f"{kind}, {norm}" for kind in ("encoder", "grouped heads", "decoder") for norm in ("pre-norm", "post-norm")]
HEADS = [
    "weights", "weights of each head", "one sequence", "key and value", "added keys", "alibi", "a mask of each head",
    "an encoder's", "a mask of all heads", "a bias of each head", "a bias of all heads", "a relative bias", "bools of each head",
    "packed", "feed-forward",
]  # fmt: skip
CHECKED = """
assert ranks == 2 and weights["0.layers.0.self_attn.in_proj_weight"].shape == (96, 32)
import os
print("one of two is done", flush=True)
os._exit(0)  # past the end of the interpreter, where a thread of PyTorch's aborts now and then
"""
COMPARED = {"outputs", "inputs' gradients", "gradients", "norm of gradients", "step"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By rank what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_by_two_ranks(f"from pathlib import Path; import sharded; sharded.main(rank, Path({str(folder)!r}))", folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def assert_small(found, case, names):
    for rank, results in enumerate(found):
        assert set(results[case]) == set(names)
        for name, error in results[case].items():
            assert error <= TOLERANCE, f"{name} of rank {rank}: {error}"


@pytest.mark.parametrize("case", DATA_PARALLEL)
def test_data_parallel_is_one_process(found, case):
    """Also where ranks have different numbers of real tokens, and padding is taken out: the loss is divided by their sum."""
    assert_small(found, case, {"outputs", "gradients", "step"})


@pytest.mark.parametrize("split", ["", ", sequence_parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_divided_by_heads_are_the_whole(found, kind, split):
    assert_small(found, kind + split, COMPARED)


@pytest.mark.parametrize("name", HEADS)
def test_what_is_for_heads_is_divided(found, name):
    assert_small(found, f"heads: {name}", COMPARED)


def test_fully_shard_of_what_is_divided(found):
    assert_small(found, "fsdp2 of divided", COMPARED)


def test_both_halves_of_a_gated_activation_are_divided(found):
    assert_small(found, "gated_rows", {"rows", "gradient"})


def test_heads_drop_by_the_seed_plus_the_rank(found):
    assert_small(found, "dropout_of_attention", {"output False", "output True", "weights", "in evaluation"})


def test_features_drop_by_the_seed_plus_the_rank(found):
    assert_small(found, "dropout_of_features", {"output"})


def test_all_ranks_drop_what_they_share_alike(found):
    cases = {f"{norm_first} {split}" for norm_first in (False, True) for split in (False, True)}
    assert_small(found, "dropout_of_layers", cases)


@pytest.mark.parametrize("drops", ["dropout1", "dropout2"])
def test_parts_of_a_sequence_drop_differently(found, drops):
    assert all(results["dropout_of_parts"][drops] == 0 for results in found)


@pytest.mark.parametrize("name", ["gathered", "a part each", "loaded", "from rank 0", "file read undivided", "file read divided"])
def test_state_dict_is_the_undivided_one(found, name):
    assert all(results["state_dicts"][name] is True for results in found)


def test_under_autocast(found):
    """In bf16: results are rounded once more, where parts are added."""
    for results in found:
        assert results["autocast"].keys() == {"MultiHeadAttention", "FeedForward", "EncoderLayer"}
        assert all(error <= 4 * 2**-8 for error in results["autocast"].values())


def test_the_first_ranks_parameters_count(found):
    assert all(results["values_of_rank_0"]["same"] is True for results in found)


def test_parts_of_a_layer_may_be_sharded_by_themselves(found):
    assert all(results["sharded_inside"]["output"] <= 1e-5 for results in found)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("heads", "ValueError: num_heads is 3, which 2 ranks do not divide"),
        ("kv heads", "ValueError: num_kv_heads is 1, which 2 ranks do not divide"),
        ("features", "ValueError: dim_feedforward is 17, which 2 ranks do not divide"),
        ("twice", "ValueError: this EncoderLayer is divided already"),
        ("mesh", "ValueError: device_mesh must have one dimension, got 2"),
        ("length", "ValueError: sequence_parallel: 7 places of a sequence are not divided by 2 ranks"),
        ("bits of all heads", "ValueError: mask: a bool tensor of shape (1, 4, 8, 8) does not broadcast to (4, 2, 8, 8)"),
        ("too many", "TypeError: MultiHeadAttention.forward() takes from 4 to 9 positional arguments but 10 were given"),
        ("two queries", "TypeError: MultiHeadAttention.forward() got multiple values for argument 'query'"),
        ("no query", "TypeError: MultiHeadAttention.forward() missing 1 required positional argument: 'query'"),
    ],
)
def test_refusals(found, what, words):
    assert all(words in results["refusals"][what] for results in found)


def test_the_pages_program_runs(tmp_path):
    """That of docs/distributed.md, by two processes on a CPU."""
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    program = tmp_path / "train.py"
    program.write_text(code + CHECKED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("one of two is done") == 2


# The plan, for which no processes are needed


def test_plan_names_every_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder(EncoderLayer(24, 4, 16), 2, norm=nn.LayerNorm(24))
            self.decoder = nn.TransformerDecoder(DecoderLayer(24, 4, 16), 1)
            self.more = nn.ModuleList([MultiHeadAttention(24, 4), FeedForward(24, 16)])
            self.head = nn.Linear(24, 3)

    names = {name: type(style).__name__ for name, style in tensor_parallel_plan(Model()).items()}
    layers, heads = "LayerParallel", "HeadParallel"
    assert names == {
        "encoder.norm": "Replicated",
        "encoder.layers.0": layers, "encoder.layers.0.self_attn": heads,
        "encoder.layers.1": layers, "encoder.layers.1.self_attn": heads,
        "decoder.layers.0": layers, "decoder.layers.0.self_attn": heads, "decoder.layers.0.multihead_attn": heads,
        "more.0": heads, "more.1": "FeatureParallel",
    }  # fmt: skip
    assert list(tensor_parallel_plan(FeedForward(24, 16))) == [""]


def test_plan_refuses_what_there_is_nothing_to_divide_of():
    with pytest.raises(ValueError, match="none of fastattn's layers"):
        tensor_parallel_plan(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="sequence_parallel is for an EncoderLayer"):
        tensor_parallel_plan(MultiHeadAttention(24, 4), sequence_parallel=True)
    with pytest.raises(TypeError, match="module must be"):
        tensor_parallel_plan(torch.ones(3))
