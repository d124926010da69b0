"""Random masks, shapes, layouts and dtypes on every backend; a failing case is printed as a line that runs it again."""

import pytest
from backends import CUDA, GPU, TRITON

fuzz = pytest.importorskip("fuzz", reason="hypothesis is not installed")

EXAMPLES = {"eager": 60, "cpu": 120, "triton": 6 if GPU else 12, "cuda": 40}  # on a GPU each compiles kernels for seconds


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "cpu", TRITON, CUDA])
def test_random_requests(backend):
    fuzz.search(backend, EXAMPLES[backend])


def test_a_failing_case_is_found_and_printed(monkeypatch, capsys):
    honest = fuzz.build

    def shifted(expression, B, H, M, N, g, device):
        mask = honest(expression, B, H, M, N, g, device)
        monkeypatch.setattr(
            type(mask), "pairs", lambda self, M, N, device, delta=None: ~self.lower(M, N, device).visible(B, H, M, N, device)
        )
        return mask

    monkeypatch.setattr(fuzz, "build", shifted)
    with pytest.raises(AssertionError, match="lowered mask") as caught:
        fuzz.search("eager", 200)
    notes = "".join(getattr(caught.value, "__notes__", [])) + capsys.readouterr().out  # printed where exceptions take no notes
    assert "python tests/fuzz.py '{" in notes
