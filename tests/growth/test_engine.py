"""The engine after a live growth: nothing shared, zeros in padding, and all is trained."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.parallel.sharding import ADAMW_KINDS
from megagrow.reshard.fill import fill_initial
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.stage import Stage, build_stage
from tests.helpers.runs import MODEL, STEP_TOKENS, full_tensors, grow_live, make_run, train_to_end
from tests.helpers.spawn import run_ranks
from tools.docs.operators.dense_growth import State, grown

pytestmark = pytest.mark.dist

WORLD = 2
SMALL = MODEL | {"tie_word_embeddings": True}
"""Its vocabulary of 101 has a row of padding on the second of two ranks."""
LARGE = SMALL | {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Left:
    """Observations of one rank."""

    tied: bool
    """True if the head and the embedding are one tensor."""
    types: set[torch.dtype]
    shared_bytes: int
    padding: list[float]
    """The largest number in the padding, after the growth and after two more steps."""
    padded: int
    expected: State
    after: State
    trained: State


def snapshot(stage: Stage) -> State:
    found = full_tensors(stage.layout, stage.engine.storage())
    return {name: {kind: t.clone() for kind, t in kinds.items()} for name, kinds in found.items()}


def grown_live(run: RunConfig) -> Left:
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    state = train_to_end(run, stage)
    expected = grown(snapshot(stage), stage_growth(run, 1), run.stages[1].model)
    stage, report = grow_live(run, stage)
    module = stage.engine._engine.module
    tied = module.lm_head.weight is module.model.embed_tokens.weight
    storage = stage.engine.storage()
    types = {kinds[kind].dtype for kinds in storage.values() for kind in ADAMW_KINDS}
    shared, after, padding = shared_bytes(storage), snapshot(stage), [largest(pads(stage))]
    train_to_end(run, stage, state.after_growth(report.layers))
    padding.append(largest(pads(stage)))
    padded = sum(pad.numel() for pad in pads(stage))
    return Left(tied, types, shared, padding, padded, expected, after, snapshot(stage))


def shared_bytes(storage: Any) -> int:
    """Bytes that belong to more than one kind of state of one parameter."""
    spans = sorted(
        (kinds[kind].data_ptr(), kinds[kind].data_ptr() + kinds[kind].nbytes)
        for kinds in storage.values()
        for kind in ADAMW_KINDS
    )
    return sum(max(0, one[1] - other[0]) for one, other in pairwise(spans))


def pads(stage: Stage) -> list[torch.Tensor]:
    """Values that this rank stores of the rows beyond the vocabulary, of each kind of state."""
    layout, rank = stage.layout, stage.topology.rank
    spec = layout.plan["model.embed_tokens.weight"]
    interval = layout.interval(spec.name, rank)
    first, _ = spec.slice_origin(layout.tp, rank % layout.tp)
    rows = first + torch.arange(interval.start, interval.stop) // spec.cols
    held = stage.engine.storage().get(spec.name, {})
    return [tensor[rows >= spec.rows] for tensor in held.values()]


def largest(tensors: list[torch.Tensor]) -> float:
    return max([t.abs().max().item() for t in tensors if t.numel()], default=0.0)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def left(request, tmp_path_factory) -> list[Left]:
    """Losses and states of a run that grows in both directions under ZeRO-2 with two ranks each."""
    parallel = {"zero_stage": 2, "tensor_model_parallel_size": 2}
    growth = {"operator": ["direct_depth", "direct_width"], "optimizer_state": "transport"}
    stages = [
        {"model": SMALL, "tokens": 3 * STEP_TOKENS, "parallel": parallel},
        {"model": LARGE, "tokens": 2 * STEP_TOKENS, "parallel": parallel, "growth": growth},
    ]
    run = make_run(tmp_path_factory.mktemp("engine"), stages, precision=request.param)
    return run_ranks(WORLD, grown_live, run)


def test_the_grown_engine_holds_the_plain_result_in_fp32(left):
    """Also of bf16 weights: nothing passes through 16 bits."""
    for rank in left:
        assert rank.types == {torch.float32}
        assert rank.after.keys() == rank.expected.keys()
        for name, kinds in rank.expected.items():
            for kind, tensor in kinds.items():
                assert torch.equal(rank.after[name][kind], tensor), (name, kind)
    moments = [k[kind] for k in left[0].after.values() for kind in ADAMW_KINDS]
    assert all(not torch.equal(t, t.bfloat16().float()) for t in moments), "no more than 16 bits"


def test_copies_share_no_memory_and_a_tied_head_is_one_tensor(left):
    for rank in left:
        assert rank.shared_bytes == 0
        assert rank.tied and "lm_head.weight" not in rank.after


def test_padding_stays_zero(left):
    width = LARGE["hidden_size"]
    assert [rank.padded for rank in left] == [0, len(ADAMW_KINDS) * width]
    assert all(rank.padding == [0.0, 0.0] for rank in left)


def test_new_layers_are_trained_as_the_old_ones_are(left):
    """The optimizer knows of every tensor: two steps after the growth each has moved."""
    for rank in left:
        layers = {name.split(".")[2] for name in rank.trained if ".layers." in name}
        assert layers == {"0", "1", "2", "3"}
        for name, kinds in rank.trained.items():
            for kind in ADAMW_KINDS:
                same = kinds[kind] == rank.after[name][kind]
                # Rows of tokens that do not occur stand still but for the weight decay. A moment of
                # an entry may by chance be that of two steps before.
                most = 1.0 if "embed" in name else 1e-3
                assert not same.all() and same.float().mean() <= most, (name, kind)
