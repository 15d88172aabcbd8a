"""Hybrid sharding (hpZ) and the options of DeepSpeed's ZeRO 3 change no bit of a run."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.parallel.process_groups import data_parallel_subgroup, make_topology
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, parallel_of, train_stage
from tests.helpers.spawn import run_ranks

LARGE = MODEL | {"vocab_size": 4000}
"""ZeRO 3 frees the embedding and the head after each pass."""
OPTIONS = {
    "stage3_prefetch_bucket_size": 100,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 0,
    "overlap_comm": False,
    "contiguous_gradients": False,
}
"""Far from the defaults, which keep all of a small model gathered. `sub_group_size` is left out:
it changes the order in which the gradient norm is summed."""
STEPS = 3


def train_all(folder: Path) -> list[tuple[list[float], list[int]]]:
    out = []
    for size, options in ((1, {}), (2, {}), (2, OPTIONS)):
        parallel = parallel_of(3, 1) | {"zero_hpz_partition_size": size}
        batch = {"global_batch_size": 8, "micro_batch_size": 1}
        stage = {"model": LARGE, "tokens": 8 * STEP_TOKENS, "parallel": parallel, "batch": batch}
        stage["deepspeed"] = {"zero_optimization": options}
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
    for rank, found in enumerate(run_ranks(4, train_all, tmp_path)):
        plain, hybrid = found[:2]
        assert [losses == plain[0] for losses, _ in found] == [True] * 3
        assert len(set(plain[0])) == 3 * STEPS
        assert (plain[1], hybrid[1]) == ([rank], [rank % 2, rank % 2 + 2])
