"""CUDA graphs: what a captured step gives when it is replayed."""

import torch


def captured(step):
    """(the graph of `step`, the tensors that a replay writes its results to)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # first launches load code, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_replay_follows(step, changed):
    """Capture `step`, change the tensor `changed` in place, replay: every result is bit-equal to that of a new step."""
    graph, results = captured(step)
    with torch.no_grad():
        changed.copy_(torch.randn_like(changed))
    graph.replay()
    for replayed, expected in zip(results, step(), strict=True):
        assert torch.equal(replayed, expected)
