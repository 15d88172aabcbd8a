"""A value that is not finite, in any state of any rank, is found by all ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.parallel.sharding import ADAMW_KINDS
from megagrow.reshard.fill import fill_initial
from megagrow.train.stage import build_stage
from megagrow.train.state_check import non_finite
from tests.helpers.runs import make_run, parallel_of
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

LAYOUTS = [(0, 1), (1, 2), (2, 1), (3, 1)]


def found(folder: Path) -> list[tuple[str | None, list[str | None], str | None]]:
    """For each layout: before, with one value of each state spoiled on rank 1, and afterwards."""
    out = []
    for zero, tp in LAYOUTS:
        run = make_run(folder, [{"tokens": 64, "parallel": parallel_of(zero, tp)}])
        stage = build_stage(run, 0, torch.device("cpu"))
        storage = stage.engine.storage()
        fill_initial(stage.layout, stage.topology.rank, storage, run.seed)
        before, spoiled = non_finite(stage), []
        for kind, value in zip(ADAMW_KINDS, (math.nan, math.inf, -math.inf), strict=True):
            tensor = list(storage.values())[-1][kind]
            kept = tensor[-1].item()
            if dist.get_rank() == 1:
                tensor[-1] = value
            spoiled.append(non_finite(stage))
            tensor[-1] = kept
        out.append((before, spoiled, non_finite(stage)))
        stage.release()
    return out


def test_all_ranks_find_a_value_that_is_not_finite(tmp_path: Path) -> None:
    make_run(tmp_path, [{"tokens": 64}])  # the corpus, written once
    first, second = run_ranks(2, found, tmp_path)
    assert first == second
    for before, spoiled, after in first:
        assert before is after is None
        assert [text.partition(" of ")[0] for text in spoiled] == [*ADAMW_KINDS]
