"""Whether a module that was exported for inference gets the gradients that it gets itself."""

import torch


def assert_exported_trains(layer, x, seed=3):
    """Without the op's entry for autograd they would be None, without a word. Dropout is drawn by the seed."""
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
    grads = []
    for module in (layer, exported):
        module.zero_grad()
        torch.manual_seed(seed)
        module(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(grad.abs().max() > 0 for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])
