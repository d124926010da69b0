"""The cuda backend of gated activations: there are no kernels for them."""

from __future__ import annotations


def unsupported(problem) -> list[str]:
    return [f"activation {problem.activation!r} is not in its kernels"]
