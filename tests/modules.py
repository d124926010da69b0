"""A layer of torch.nn and fastattn's in its place, on the same inputs: outputs and all gradients by the accuracy rule.

The rule allows rounding by what the sums are with absolute values inside. torch.nn's own code gives those as well, when it is
given absolute values, and in the place of what is no sum (softmax, LayerNorm, activations) bounds made from the exact values.
"""

import contextlib
import copy
import warnings
from unittest import mock

import torch
import torch.nn.functional as F

from fastattn.testing import Yardstick, assert_accurate


def assert_like(theirs, ours, call, inputs):
    """`call(module, **inputs)` of both; the errors of ours, in units of roundoff."""
    wide = copy.deepcopy(theirs).double()
    inputs64 = {name: x.double() if _floats(x) else x for name, x in inputs.items()}
    seen = []
    with _patched(_Exact(seen)):
        exact = run(wide, call, inputs64)
    with torch.no_grad():
        for x in wide.parameters():
            x.abs_()
    with _patched(_Absolute(iter(seen))), _activation(wide, lambda z: 1.2 * z):
        magnitude = run(wide, call, {name: x.abs() if _floats(x) else x for name, x in inputs64.items()}, torch.abs)
    model, found = run(theirs, call, inputs), run(ours, call, inputs)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        assert x.dtype == model[name].dtype and x.shape == model[name].shape, name
    return assert_accurate(found, Yardstick(exact, model, magnitude))


def run(module, call, inputs, way=lambda x: x):
    """Outputs of `call(module, **inputs)`, and the gradients of inputs and parameters, by name."""
    leaves = {name: x.detach().clone().requires_grad_() if _floats(x) else x for name, x in inputs.items()}
    module.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn has words on masks of two kinds
        outputs = [x for x in call(module, **leaves) if x is not None]
    g = torch.Generator().manual_seed(3)
    ways = [way(torch.randn(x.shape, generator=g, dtype=torch.float64)).to(x.device, x.dtype) for x in outputs]
    torch.autograd.backward(outputs, ways)
    found = {f"output {n}": x.detach() for n, x in enumerate(outputs)}
    for name, x in (*leaves.items(), *module.named_parameters()):
        if isinstance(x, torch.Tensor) and x.grad is not None:
            found[f"gradient of {name}"] = x.grad
    return found


def perturbed(module, seed=0):
    """With biases and norms that are not 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in module.parameters():
            x.add_((torch.randn(x.shape, generator=g) * 0.2).to(x))
    return module


def _floats(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


class _Exact:
    """What is no sum, computed plainly, and noted."""

    def __init__(self, seen):
        self.seen = seen

    def softmax(self, x, dim):
        self.seen.append(torch.softmax(x, dim).detach())
        return torch.softmax(x, dim)

    def layer_norm(self, x, shape, weight, bias, eps):
        mean, rstd = x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        self.seen.append(tuple(y.detach() for y in (mean, rstd, (x - mean) * rstd)))
        return torch.layer_norm(x, shape, weight, bias, eps)


class _Absolute:
    def __init__(self, seen):
        self.seen = seen

    def softmax(self, x, dim):
        return _Weights.apply(x, next(self.seen))

    def layer_norm(self, x, shape, weight, bias, eps):
        y = _Normal.apply(x, *next(self.seen)) * weight
        return y if bias is None else y + bias


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, p):
        ctx.save_for_backward(p)
        return p.clone()

    @staticmethod
    def backward(ctx, dp):
        (p,) = ctx.saved_tensors
        return p * (dp + (p * dp).sum(-1, keepdim=True)), None


class _Normal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean, rstd, normal):
        ctx.save_for_backward(rstd, normal.abs())
        return (x + mean.abs()) * rstd

    @staticmethod
    def backward(ctx, dy):
        rstd, normal = ctx.saved_tensors
        return rstd * (dy + dy.mean(-1, keepdim=True) + normal * (dy * normal).mean(-1, keepdim=True)), None, None, None


@contextlib.contextmanager
def _patched(to):
    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert not dropout_p
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return to.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ v

    with (
        mock.patch.object(F, "softmax", to.softmax),
        mock.patch.object(F, "layer_norm", to.layer_norm),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


@contextlib.contextmanager
def _activation(module, function):
    for layer in module.modules():
        if hasattr(layer, "activation"):
            del layer.activation  # which may be a module
            layer.activation = function
    yield
