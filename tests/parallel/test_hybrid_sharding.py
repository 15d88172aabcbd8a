"""Hybrid sharding (hpZ): a second copy of the weights over fewer ranks changes no bit of a run."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.parallel.process_groups import data_parallel_subgroup, make_topology
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, parallel_of, train_stage
from tests.helpers.spawn import run_ranks

LARGE = MODEL | {"vocab_size": 4000}
"""ZeRO 3 frees the embedding and the head after each pass."""
STEPS = 3


def train_both(folder: Path) -> list[tuple[list[float], list[int]]]:
    out = []
    for size in (1, 2):
        parallel = parallel_of(3, 1) | {"zero_hpz_partition_size": size}
        batch = {"global_batch_size": 8, "micro_batch_size": 1}
        stage = {"model": LARGE, "tokens": 8 * STEP_TOKENS, "parallel": parallel, "batch": batch}
        run = make_run(folder, [stage], precision="bf16")
        topology = make_topology(2, torch.device("cpu"))
        group = data_parallel_subgroup(topology, size)
        losses = train_stage(run, 0, STEPS, sequences=4)
        out.append((losses, dist.get_process_group_ranks(group)))
    return out


@pytest.mark.dist
def test_losses_and_norms_are_those_of_plain_zero_3(tmp_path: Path) -> None:
    """An evaluation before each step gathers weights too, and must see every update."""
    make_run(tmp_path, [{"tokens": 64}])
    for rank, (plain, hybrid) in enumerate(run_ranks(4, train_both, tmp_path)):
        assert plain[0] == hybrid[0] and len(set(plain[0])) == 3 * STEPS
        assert (plain[1], hybrid[1]) == ([rank], [rank % 2, rank % 2 + 2])
