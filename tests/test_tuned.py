"""Tables of tiles: which row a request takes, what a wrong table is told, and rows that name PyTorch's product."""

# ruff: noqa: E402  (without triton nothing below can be imported)
import itertools
import json
import shutil

import pytest
import torch

pytest.importorskip("triton")
from backends import GPU as GPU_HERE
from backends import TRITON, device_of

import fastattn
from fastattn.activations import ACTIVATIONS
from fastattn.kernels.triton import attention, ffn, norm, tuned
from fastattn.kernels.triton.launch import GPU
from fastattn.testing import assert_accurate, linear_yardstick, run_linear

NAME = "NVIDIA H100 80GB HBM3"
H100 = GPU(90, NAME)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW = {
    "kernel": "attention_forward", "block_d": 64, "dtype": "half", "listed": False, "longest": 128, "config": [32, 32, 4, 1],
    "by": "compiled",
}  # fmt: skip
LINEAR = {
    "kernel": "linear_forward", "dtype": "half", "odd": False, "activation": "gelu_tanh", "z": False, "tiles": None,
    "config": "library_epilogue", "by": "measured", "source": "here",
}  # fmt: skip
NORM = {"kernel": "norm_forward", "block_n": 64, "dtype": None, "config": [8, 64, 4, 1], "by": "compiled"}


def write(path, *rows, device=NAME):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "rows": rows}))
    return path


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch):
    """No table of the person who runs the tests, and none that a test leaves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTATTN_TUNED", raising=False)
    forget()
    yield
    forget()


def forget():
    tuned.tiles_of.cache_clear()
    tuned.shipped.cache_clear()


def forward_config(gpu, N, listed=False):
    return tuple(attention.configs(gpu, torch.bfloat16, 64, N, listed)[0])


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120])
def test_an_architecture_leaves_no_request_without_a_row(sm):
    gpu = GPU(sm)
    for dtype, block_d, N, listed in itertools.product(DTYPES, (16, 32, 64, 128), (0, 1, 64, 65, 300, 2**29), (False, True)):
        assert all(config is not None for config in attention.configs(gpu, dtype, block_d, N, listed))
        single = attention.single_config(gpu, dtype, block_d, 1, N, listed)
        assert single is None or single.BLOCK_N >= N
    for dtype, (M, N), K in itertools.product(DTYPES, ((0, 1), (64, 64), (2**20, 3072), (8, 769)), (1, 8, 768)):
        for activation, z in itertools.product((None, *ACTIVATIONS), (False, True)):
            assert ffn._config(M, N, K, dtype, gpu, "linear_forward", activation=activation, z=z)
        assert ffn._config(M, N, K, dtype, gpu, "linear_dgrad")
    for dtype, width in itertools.product(DTYPES, (1, 16, 17, 768, norm.WIDEST)):
        assert width <= norm._config("norm_forward", width, dtype, gpu).BLOCK_N
        assert width <= norm._config("norm_backward", width, dtype, gpu).BLOCK_N


def test_shipped_rows_are_used():
    """Each is the answer to some request, or it would be there to no end."""
    for path in tuned.SHIPPED.glob("*.json"):
        table = tuned.read(path)
        tiles = tuned.Tiles((table,))
        for row in table.rows:
            library = isinstance(row.config, str)
            fields = {name: _some(name) if value is None else value for name, value in row.fields.items()}
            size = max(r.most or 0 for r in table.rows) + 1 if row.most is None else row.most
            if row.kernel == tuned.ONE_KERNEL and row.config is None:
                fields.update(listed=False, dtype="fp32")
            assert tiles.row(row.kernel, size, library, **fields) is row, row


def _some(field):
    return {"block_d": 64, "dtype": "half", "listed": False, "odd": False, "activation": "silu", "z": True}[field]


def test_the_user_s_table_goes_before_the_device_s_and_that_before_the_architecture_s(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shutil.copytree(tuned.SHIPPED, shipped)
    monkeypatch.setattr(tuned, "SHIPPED", shipped)
    architecture = forward_config(H100, 128)
    assert architecture == forward_config(GPU(90), 128) != (32, 32, 4, 1)

    def now():
        forget()
        return [forward_config(H100, N) for N in (64, 128, 129)]

    write(shipped / tuned.file_name(NAME), {**ROW, "config": [16, 32, 4, 1]})
    assert now() == [(16, 32, 4, 1), (16, 32, 4, 1), architecture]
    write(tuned.user_folder() / tuned.file_name(NAME), {**ROW, "longest": 64, "config": [16, 64, 4, 1]})
    assert now() == [(16, 64, 4, 1), (16, 32, 4, 1), architecture]
    assert forward_config(GPU(90), 64) == forward_config(GPU(90, "another device of sm_90"), 64) == architecture
    monkeypatch.setenv("FASTATTN_TUNED", str(write(tmp_path / "mine.json", {**ROW, "longest": 64, "config": [64, 16, 4, 1]})))
    assert now() == [(64, 16, 4, 1), (16, 32, 4, 1), architecture]
    assert [table.name for table in tuned.tiles_of(H100).tables] == [
        str(tmp_path / "mine.json"), "nvidia-h100-80gb-hbm3.json, shipped", "sm_90.json, shipped",
    ]  # fmt: skip


def test_rows_of_ranges_of_lengths(tmp_path, monkeypatch):
    rows = [{**ROW, "above": 64}, {**ROW, "above": 128, "longest": None, "config": [16, 64, 4, 1]}]
    monkeypatch.setenv("FASTATTN_TUNED", str(write(tmp_path / "mine.json", *rows)))
    shipped = forward_config(GPU(90), 64)
    assert [forward_config(H100, N) for N in (0, 64, 65, 128, 129)] == [shipped] * 2 + [(32, 32, 4, 1)] * 2 + [(16, 64, 4, 1)]


def test_the_same_request_gets_the_same_tiles(tmp_path, monkeypatch):
    """What a table becomes after it was read changes nothing in this process."""
    path = write(tmp_path / "mine.json", ROW)
    monkeypatch.setenv("FASTATTN_TUNED", str(path))
    before = [forward_config(H100, N) for N in (64, 128, 256)]
    write(path, {**ROW, "config": [16, 16, 4, 1]})
    assert [forward_config(H100, N) for N in (64, 128, 256)] == before


def test_partial_sums_follow_the_table(tmp_path, monkeypatch):
    """As many as there are tiles of rows, whatever they are."""
    rows = [
        {"kernel": "linear_dgrad", "dtype": "half", "odd": False, "tiles": None, "config": [32, 64, 32, 4, 2], "by": "compiled"},
        {"kernel": "norm_backward", "block_n": 64, "dtype": "half", "config": [2, 64, 4, 1], "by": "compiled"},
    ]
    monkeypatch.setenv("FASTATTN_TUNED", str(write(tmp_path / "mine.json", *rows)))
    dy, weight = torch.empty(100, 64, dtype=torch.float16, device="meta"), torch.empty(64, 128, device="meta")
    sums = torch.empty(ffn.dgrad_parts(dy, weight, H100), 128, device="meta")
    hidden = torch.empty(100, 128, dtype=torch.float16, device="meta")
    launch = ffn.dgrad_launch(dy, weight.half(), hidden, hidden, sums, "gelu", H100)
    assert (len(sums), launch.programs, launch.config.BLOCK_M) == (4, 4 * 2, 32)
    programs, steps = norm.parts(dy, True, H100)
    assert norm.backward_launch(dy, None, dy, None, dy[:, 0], None, dy, weight, None, H100).config.BLOCK_M == 2
    assert steps == 8 and programs == 7


@pytest.mark.parametrize(
    ("words", "row"),
    [
        ('"kernel" is one of attention_forward', {**ROW, "kernel": "attention"}),
        ('"kernel" is one of', ["attention_forward"]),
        ('"kernel" is one of', {**ROW, "kernel": ["attention_forward"]}),
        ("longest is missing", {name: value for name, value in ROW.items() if name != "longest"}),
        ("tiles is not a field of attention_forward", {**ROW, "tiles": 3}),
        ("block_d must be int or null", {**ROW, "block_d": "64"}),
        ("listed must be bool or null", {**ROW, "listed": 1}),
        ("dtype must be half, fp32 or null", {**ROW, "dtype": "bf16"}),
        ("longest must be a number or null", {**ROW, "longest": -1}),
        ("longest must be a number or null", {**ROW, "longest": True}),
        ("above must be a number or null", {**ROW, "above": "64"}),
        ("above is not a field of norm_forward", {**NORM, "above": 64}),
        ('by must be "compiled", or "measured" with a source', {**ROW, "by": "guessed"}),
        ('by must be "compiled", or "measured" with a source', {**ROW, "by": "measured"}),
        ("config must be BLOCK_M, BLOCK_N, num_warps, num_stages", {**ROW, "config": [64, 64, 4]}),
        ("config must be BLOCK_M, BLOCK_N, num_warps, num_stages", {**ROW, "config": [64, 64, 4, 2.0]}),
        ("config must be BLOCK_M, BLOCK_N, num_warps, num_stages", {**ROW, "config": None}),
        ("config must be BLOCK_M, BLOCK_N, num_warps, num_stages", {**ROW, "config": "library"}),
        ("tiles must be powers of two of at least 16", {**ROW, "config": [48, 64, 4, 2]}),
        ("tiles must be powers of two of at least 16", {**ROW, "config": [8, 64, 4, 2]}),
        ("warps powers of two up to 32", {**ROW, "config": [64, 64, 3, 2]}),
        ("num_stages must be in 1..8", {**ROW, "config": [64, 64, 4, 0]}),
        ("tiles of masks that list tiles must be at most 64", {**ROW, "listed": True, "config": [128, 64, 4, 2]}),
        ("tiles of masks that list tiles must be at most 64", {**ROW, "listed": None, "config": [64, 128, 4, 2]}),
        ("longest must be at most BLOCK_N", {**ROW, "kernel": "attention_backward", "longest": 64}),
        ("longest must be at most BLOCK_N", {**ROW, "kernel": "attention_backward", "longest": None}),
        ("library_epilogue is for the activations gelu_tanh, relu", {**LINEAR, "activation": "gelu"}),
        ("library_epilogue leaves no z", {**LINEAR, "z": None}),
        ("library is for the activations gelu, gelu_tanh", {**LINEAR, "config": "library", "activation": None}),
        ("config must be BLOCK_M, BLOCK_N, BLOCK_K", {**LINEAR, "config": "cublas"}),
        ("BLOCK_N must be block_n", {**NORM, "block_n": 128}),
        ("an earlier row of the same class", {**ROW, "block_d": 32, "longest": 30}),
    ],
)
def test_a_wrong_row_is_refused_with_the_file_and_the_row(words, row, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_TUNED", str(write(tmp_path / "mine.json", {**ROW, "block_d": 32}, row)))
    with pytest.raises(ValueError) as error:
        forward_config(H100, 64)
    message = str(error.value)
    assert words in message and f"{tmp_path / 'mine.json'}: row 2, " in message and json.dumps(row) in message


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("this is not a table of tiles", "{"),
        ('is an object with "device" and "rows"', "[]"),
        ('is an object with "device" and "rows"', '{"device": "x", "rows": {}}'),
        (f"this table is of NVIDIA A100, but the GPU is {NAME}", '{"device": "NVIDIA A100", "rows": []}'),
    ],
)
def test_a_wrong_table_is_refused_with_the_file(words, text, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path / "mine.json"))
    with pytest.raises(ValueError) as error:
        forward_config(H100, 64)
    assert words in str(error.value) and str(tmp_path / "mine.json") in str(error.value)


def test_a_table_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"FASTATTN_TUNED: .*nowhere.json is not a file"):
        forward_config(H100, 64)


def linear_inputs(dtype, device, bias_dtype=None):
    x, w, b, dy = (torch.randn(size).to(device, dtype) for size in ((2, 20, 64), (48, 64), (48,), (2, 20, 48)))
    return x, w / 8, b.to(bias_dtype or dtype), None, dy


@pytest.fixture
def library(monkeypatch):
    """A table that leaves nothing to the kernel that it can leave to PyTorch; the calls that reach the kernel all the same."""
    options = [("library_epilogue", a, False) for a in ("gelu_tanh", "relu")] + [("library", a, None) for a in ("gelu", "silu")]
    options += [("library", "gelu_tanh", True), ("library", "relu", True)]
    rows = [
        tuned._row({**LINEAR, "dtype": None, "odd": None, "activation": activation, "z": z, "config": config}, "test")
        for config, activation, z in options
    ]
    tiles = tuned.Tiles((tuned.Table("test", tuple(rows)), *tuned.tiles_of(GPU(90)).tables))
    monkeypatch.setattr(ffn, "tiles_of", lambda gpu: tiles)
    launched, ready = [], ffn.ready

    def counted(launch):
        made = ready(launch)
        if launch.kernel is not ffn._linear_forward_kernel:
            return made
        return made._replace(start=lambda *args: launched.append(args) or made.start(*args))

    monkeypatch.setattr(ffn, "ready", counted)
    return launched


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", [TRITON])
def test_rows_that_name_the_library(backend, activation, library):
    for dtype in DTYPES:
        inputs = linear_inputs(dtype, device_of(backend))
        yardstick = linear_yardstick(*inputs, activation)
        assert_accurate(run_linear(*inputs, activation, backend), yardstick)  # keeps z
        x, w, b, _, _ = inputs
        assert_accurate({"y": fastattn.linear(x, w, b, activation=activation, backend=backend)}, yardstick)
    by_kernel = {"quick_gelu": 6, "gelu_tanh": 0 if GPU_HERE else 3}  # the epilogue's tanh form is the GPU's
    assert len(library) == by_kernel.get(activation, 0)


@pytest.mark.parametrize("backend", [TRITON])
def test_the_library_gets_only_what_it_computes_alike(backend, library):
    x, w, b, _, dy = inputs = linear_inputs(torch.bfloat16, device_of(backend), torch.float32)
    fastattn.linear(x, w, b, activation="relu", backend=backend)
    fastattn.linear(x, w, activation="relu", backend=backend)
    fastattn.linear(x, w, b.bfloat16(), activation="relu", residual=dy, backend=backend)
    assert len(library) == 3
    assert_accurate(run_linear(*inputs, "relu", backend), linear_yardstick(*inputs, "relu"))
    assert fastattn.linear(x[:, :0], w, b.bfloat16(), activation="relu", backend=backend).shape == (2, 0, 48)
