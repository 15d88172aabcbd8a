"""Each collective and its gradient against the same computation in one process."""

import pytest
import torch

from megagrow.parallel import collectives
from megagrow.parallel.process_groups import make_topology
from tests.helpers.spawn import run_ranks

WORLD = 4
B, S, D = 2, 8, 3


def integers(seed: int, *shape: int) -> torch.Tensor:
    """Small whole numbers: sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).float()


def apply_all(tp: int, inputs: dict, weights: dict) -> dict[str, tuple]:
    """By collective: this rank's output and the gradient of sum(weight * output) by its input."""
    topology = make_topology(tp, torch.device("cpu"))
    out = {}
    for name, of_rank in inputs.items():
        # Not contiguous, as transposed activations are.
        x = of_rank[topology.tp_rank].transpose(0, 2).clone().transpose(0, 2).requires_grad_()
        before = x.detach().clone()
        # A contiguous intermediate result, as the output of a matrix product, may be overwritten.
        for given in (x, 1 * x.contiguous()):
            y = getattr(collectives, name)(given, topology.tp_group)
            gradient = torch.autograd.grad((y * weights[name][topology.tp_rank]).sum(), x)[0]
            results = y.detach(), gradient
            assert all(map(torch.equal, results, out.setdefault(name, results)))
        assert torch.equal(x, before)
        overwritten = y.data_ptr() == given.data_ptr()
        assert overwritten or not name.startswith("reduce_from"), name
    # The same with NCCL's collective.
    x = inputs["scatter_to_sequence"][topology.tp_rank]
    scattered = collectives._reduce_scatter_tensor(x, topology.tp_group)
    assert torch.equal(scattered, out["scatter_to_sequence"][0])
    return out


def expected(name: str, inputs: list, weights: list) -> list[tuple]:
    """By rank: what one process finds that computes all ranks' parts and adds up their losses."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    tp = len(leaves)
    if name == "copy_to_tensor_parallel":
        shared = inputs[0].clone().requires_grad_()
        leaves, outputs = [shared] * tp, [shared] * tp
    elif name == "reduce_from_tensor_parallel":
        outputs = [sum(leaves)] * tp
    elif name == "gather_from_sequence":
        outputs = [torch.cat(leaves, dim=1)] * tp
    else:
        outputs = list(sum(leaves).chunk(tp, dim=1))
    losses = [(y * w).sum() for y, w in zip(outputs, weights, strict=True)]
    # What follows a `reduce` is computed alike by all ranks: it is one loss, not one per rank.
    total = losses[0] if name == "reduce_from_tensor_parallel" else sum(losses)
    gradients = torch.autograd.grad(total, leaves)
    return [(y.detach(), g) for y, g in zip(outputs, gradients, strict=True)]


def cases(tp: int) -> tuple[dict, dict]:
    """Inputs and weights by collective, one of each per tensor-parallel rank."""
    part, whole = (B, S // tp, D), (B, S, D)
    ranks = range(tp)
    inputs = {
        "copy_to_tensor_parallel": [integers(1, *whole)] * tp,
        "reduce_from_tensor_parallel": [integers(10 + r, *whole) for r in ranks],
        "gather_from_sequence": [integers(20 + r, *part) for r in ranks],
        "scatter_to_sequence": [integers(30 + r, *whole) for r in ranks],
    }
    weights = {
        "copy_to_tensor_parallel": [integers(40 + r, *whole) for r in ranks],
        "reduce_from_tensor_parallel": [integers(50, *whole)] * tp,
        "gather_from_sequence": [integers(60 + r, *whole) for r in ranks],
        "scatter_to_sequence": [integers(70 + r, *part) for r in ranks],
    }
    return inputs, weights


def apply_cases(sizes: list[int]) -> list[dict]:
    return [apply_all(tp, *cases(tp)) for tp in sizes]


@pytest.mark.dist
def test_forward_and_backward_are_those_of_one_process():
    sizes = [1, 2, 4]
    for rank, found in enumerate(run_ranks(WORLD, apply_cases, sizes)):
        for tp, results in zip(sizes, found, strict=True):
            inputs, weights = cases(tp)
            for name, (output, gradient) in results.items():
                y, g = expected(name, inputs[name], weights[name])[rank % tp]
                assert torch.equal(output, y), (rank, tp, name)
                assert torch.equal(gradient, g), (rank, tp, name)
