"""Yardsticks of the accuracy rule in testing.py, for what is computed element by element: `rotary`, and gates of `ffn`."""

from __future__ import annotations

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.reference import Drop
from fastattn.testing import Yardstick, _gradients, _sizes, _wide, linear_magnitude


def rotary_yardstick(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, interleaved: bool = False
) -> Yardstick:
    """For `rotary`: q, k, and their gradients dq, dk; given dq and dk are those of the results."""

    def run(q, k, cos, sin, dq, dk):
        given = {"q": (q, sin), "k": (k, sin), "dq": (dq, -sin), "dk": (dk, -sin)}
        return {name: reference.rotary(x, cos, s, interleaved) for name, (x, s) in given.items()}

    tensors = (q, k, cos, sin, dq, dk)
    wide = _wide(tensors)
    exact, (q, k, cos, sin, dq, dk) = run(*wide), _sizes(wide)
    one, other = run(q, k, cos, sin, dq, dk), run(q, k, cos, -sin, dq, dk)  # |a| cos - |b| sin here is a sum there
    return Yardstick(exact, run(*tensors), {name: torch.maximum(one[name], other[name]) for name in one})


def run_rotary(q, k, cos, sin, dq, dk, backend: str, interleaved: bool = False) -> dict[str, Tensor]:
    """q, k and both gradients of the public function."""
    leaves = {name: x.detach().requires_grad_() for name, x in (("dq", q), ("dk", k))}
    results = fastattn.rotary(leaves["dq"], leaves["dk"], cos, sin, interleaved=interleaved, backend=backend)
    return {"q": results[0].detach(), "k": results[1].detach(), **_gradients(list(results), [dq, dk], leaves)}


def gated_ffn_yardstick(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dy: Tensor, activation: str, drop: Drop | None = None
) -> Yardstick:
    """For `ffn` with a gated activation: y, dx, dw1, db1, dw2, db2, as `testing.run_ffn` gives them; `drop` is of the hidden
    layer."""

    def run(x, w1, b1, w2, b2, dy):
        z = reference.linear(x, w1, b1, None, None)[1]
        hidden = reference.gated(z, activation, drop)
        y = reference.linear(hidden, w2, b2, None, None)[0]
        dhidden, dw2, db2, _ = reference.linear_backward(dy, hidden, w2, None, None)
        dx, dw1, db1, _ = reference.linear_backward(reference.gated_backward(dhidden, z, activation, drop), x, w1, None, None)
        return {"y": y, "dx": dx, "dw1": dw1, "db1": db1, "dw2": dw2, "db2": db2}

    tensors = (x, w1, b1, w2, b2, dy)
    wide = _wide(tensors)
    x, w1, b1, w2, b2, dy = _sizes(wide)
    a, b = reference.halves(torch.nn.functional.linear(x, w1, b1))
    hidden = 1.2 * a * b  # by the bounds in `testing.linear_magnitude`
    second = linear_magnitude(hidden if drop is None else reference.dropped(hidden, drop), w2, b2, None, dy, None)
    dhidden = second["dx"] if drop is None else reference.dropped(second["dx"], drop)
    dz = 1.2 * torch.cat([dhidden * b * (1 + a), dhidden * a], -1)
    first = linear_magnitude(x, w1, b1, None, dz, None)
    magnitude = {"y": second["y"], "dw2": second["dw"], "db2": second["db"]}
    return Yardstick(run(*wide), run(*tensors), {**magnitude, "dx": first["dx"], "dw1": first["dw"], "db1": first["db"]})
