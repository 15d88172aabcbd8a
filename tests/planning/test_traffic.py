"""Traffic of a training step, against the collectives that real ranks call."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.parallel import materialize
from megagrow.planning.memory import StageMemory
from megagrow.planning.traffic import Traffic, step_traffic
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, parallel_of
from tests.helpers.spawn import run_ranks

SCALARS = 48
"""Bytes up to which a collective is about norms and losses; that of flags is in fp64."""

KINDS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}


def watch(owner: Any, name: str, seen: Callable[[str, Any, int], None]) -> None:
    """Lets a function of torch, or of DeepSpeed, tell its group and the size of its tensors."""
    original = getattr(owner, name)

    def watched(*given: Any, **named: Any) -> Any:
        values = [*given, *named.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        sizes = [tensor.nbytes for tensor in tensors if tensor.dtype != torch.float64]
        lists = [value for value in values if isinstance(value, list)]
        sizes += [sum(part.nbytes for part in parts) for parts in lists]
        group = next((v for v in values if isinstance(v, dist.ProcessGroup)), None)
        seen(KINDS[name], group, max(sizes, default=0))
        return original(*given, **named)

    setattr(owner, name, watched)


def watch_sends(seen: Callable[[int], None]) -> None:
    """Report the size of every tensor sent to another pipeline rank."""
    batched = dist.batch_isend_irecv

    def batch(operations: list[dist.P2POp]) -> Any:
        seen(sum(each.tensor.nbytes for each in operations if each.op is dist.isend))
        return batched(operations)

    dist.batch_isend_irecv = batch


def count_a_step(run: RunConfig) -> tuple[Counter, list[Traffic]]:
    """Bytes by (TP or DP, kind) in the second step; and what is planned for it."""
    import deepspeed.comm.comm as deepspeed_comm

    with pytest.MonkeyPatch.context() as patch:
        # Ranks of one host share the forward weights of ZeRO 1 and 2 instead of gathering them.
        patch.setattr(materialize, "on_one_host", lambda: False)
        stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), 1)
    stage.engine.ready(0)
    feed, stop, found = StepFeed(open_inputs(run).train), StopSignal(), Counter()
    step = partial(advance, run, stage, feed=feed, stop=stop)
    event = step(state=RunState(stage=0))
    assert isinstance(event, StepDone)

    def seen(kind: str, group: Any, size: int) -> None:
        if size > SCALARS or kind == "reduce-scatter":
            near = group is not None and group.size() < stage.topology.dp
            name = "tp" if group is stage.topology.tp_group else "hpz" if near else "dp"
            name = "pp" if group is stage.topology.pp_group is not None else name
            found[name, kind] += size

    def sent(size: int) -> None:
        found["pp", "send"] += size

    watch_sends(sent)
    watch(dist, "all_reduce", seen)
    watch(dist, "reduce", seen)
    watch(dist, "all_gather", seen)
    watch(dist, "all_gather_into_tensor", seen)
    if stage.config.parallel.zero_stage > 0:  # DeepSpeed is initialized
        watch(deepspeed_comm.cdb, "all_gather_into_tensor", seen)
        watch(deepspeed_comm.cdb, "reduce_scatter_tensor", seen)
    step(state=event.state)
    bf16 = run.precision == "bf16"
    memory = StageMemory(stage.config, stage.layout, bf16).at_rank(stage.topology.rank)
    return found, step_traffic(memory)


LARGE = MODEL | {"vocab_size": 4000}
"""Bytes of which ZeRO-3 frees the embedding and the head after use."""

PARTITIONED = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
"""Without gathered parameters between their uses, however small."""

PIPELINE = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}

CASES = {
    "zero-0-tp": (MODEL, parallel_of(0, 2), "fp32"),
    "zero-1-selective": (MODEL, parallel_of(1, 2, True, "selective"), "bf16"),
    "zero-2-tp-sequence": (MODEL, parallel_of(2, 2, True, "full"), "bf16"),
    "zero-1-pipeline": (
        MODEL | {"num_hidden_layers": 4, "tie_word_embeddings": True},
        parallel_of(1, 2, True) | PIPELINE,
        "bf16",
    ),
    "zero-3": (LARGE, parallel_of(3, 1), "bf16"),
    "zero-3-hpz": (LARGE, parallel_of(3, 1) | {"zero_hpz_partition_size": 2}, "bf16"),
    "zero-3-partitioned": (MODEL, parallel_of(3, 1), "bf16"),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_a_real_step(tmp_path: Path, name: str) -> None:
    model, parallel, precision = CASES[name]
    batch = {"global_batch_size": 8, "micro_batch_size": 1}
    stage = {"tokens": 4 * STEP_TOKENS, "model": model, "parallel": parallel, "batch": batch}
    stage |= PARTITIONED if name == "zero-3-partitioned" else {}
    run = make_run(tmp_path, [stage], precision=precision)
    for found, told in run_ranks(4, count_a_step, run):
        planned: Counter = Counter()
        for each in told:
            in_tp = any(word in each.purpose for word in ("activations", "loss", "norm"))
            # gloo has no reduce-scatter of its own: the model's is an all-reduce on CPUs.
            kind = "all-reduce" if in_tp and each.kind == "reduce-scatter" else each.kind
            if each.kind == "send":
                planned["pp", "send"] += each.payload
                continue
            near = "hpz" if "second copy" in each.purpose else "dp"
            planned["tp" if in_tp else near, kind] += each.payload
        if not name.startswith("zero-3"):
            assert found == planned
            continue
        assert found["dp", "reduce-scatter"] == planned["dp", "reduce-scatter"]
        # At most: what is used again soon DeepSpeed may keep.
        for gathered in (key for key in planned if key[1] == "all-gather"):
            assert planned[gathered] / 4 < found[gathered] <= planned[gathered], gathered


def test_what_a_rank_of_a_ring_sends() -> None:
    assert Traffic("", "all-reduce", 4, 400).sent == 600
    assert Traffic("", "all-gather", 4, 400).sent == Traffic("", "reduce-scatter", 4, 400).sent
    assert Traffic("", "all-gather", 4, 400).sent == 300
