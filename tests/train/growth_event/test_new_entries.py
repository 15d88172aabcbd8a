"""Which entries are new, in every layout, and the factors on their updates at every step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.growth.map import Fresh
from megagrow.parallel.sharding import ADAMW_KINDS, Storage
from megagrow.reshard.layout import Layout
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.new_entries import UpdateFactors, fresh_masks, update_factors
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.checkpoint.saving import manifest_of, save_checkpoint
from tests.helpers.reshard.definition import empty_storage, held
from tests.helpers.reshard.models import layout_of, layouts, models
from tests.helpers.runs import MODEL, STEP_TOKENS, full_tensors, grow_live, make_run
from tests.helpers.spawn import run_ranks
from tests.helpers.train.starting import losses_of, start

TINY = ModelConfig(
    num_hidden_layers=1,
    hidden_size=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=2,
    vocab_size=3,
)
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def masks_of(layout: Layout, rank: int, fresh: dict[str, Fresh]) -> dict[str, list[int]]:
    storage = empty_storage(layout, rank)
    return {name: mask.int().tolist() for name, mask in fresh_masks(fresh, layout, rank,
                                                                    storage).items()}  # fmt: skip


def test_masks_of_a_whole_model_by_hand():
    fresh = {
        UP: Fresh(rows=np.array([False, True])),
        DOWN: Fresh(rows=np.array([False, True, False, True]), cols=np.array([False, True])),
        NORM: Fresh(rows=np.array([True, False, False, False])),
        EMBED: Fresh(whole=True),
        "model.layers.0.mlp.gate_proj.weight": Fresh(),
    }
    assert masks_of(layout_of(TINY, 0, 1, 1), 0, fresh) == {
        UP: [0, 0, 0, 0, 1, 1, 1, 1],
        DOWN: [0, 1, 1, 1, 0, 1, 1, 1],
        NORM: [1, 0, 0, 0],
        EMBED: [1] * 12,
    }


def test_masks_of_one_rank_by_hand():
    """TP 2: rank 1 has the second row of `up`, the second column of `down`, and of the embedding
    the third row and one of padding. ZeRO 3 over 2 cuts each of those in halves."""
    fresh = {
        UP: Fresh(rows=np.array([False, True]), cols=np.array([True, False, False, False])),
        DOWN: Fresh(rows=np.array([True, False, False, False])),
        EMBED: Fresh(whole=True),
    }
    tp = layout_of(TINY, 0, 1, 2)
    assert masks_of(tp, 0, fresh) == {UP: [1, 0, 0, 0], DOWN: [1, 0, 0, 0], EMBED: [1] * 8}
    assert masks_of(tp, 1, fresh) == {
        UP: [1, 1, 1, 1],
        DOWN: [1, 0, 0, 0],
        EMBED: [1, 1, 1, 1, 0, 0, 0, 0],
    }
    both = layout_of(TINY, 3, 2, 2)
    assert masks_of(both, 2, fresh) == {EMBED: [1] * 4}
    assert masks_of(both, 3, fresh) == {UP: [1, 1]}


@st.composite
def grown_models(draw: st.DrawFn) -> tuple[Layout, dict[str, Fresh]]:
    layout = draw(layouts(draw(models())))
    some, fresh = np.random.default_rng(draw(st.integers(0, 2**32))), {}
    for name, spec in layout.plan.items():
        rows, cols = some.random(spec.rows) < 0.3, some.random(spec.cols) < 0.3
        kind = draw(st.sampled_from(("none", "whole", "rows", "cols", "both")))
        if kind != "none":
            fresh[name] = Fresh(
                kind == "whole",
                rows if kind in ("rows", "both") else None,
                cols if kind in ("cols", "both") else None,
            )
    return layout, fresh


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(grown_models())
def test_masks_are_those_of_whole_tensors_cut_as_tensors(case):
    layout, fresh = case
    whole = {}
    for name, spec in layout.plan.items():
        new = fresh.get(name, Fresh())
        mask = torch.zeros(spec.rows, spec.cols)
        if new.whole:
            mask[:] = 1
        if new.rows is not None:
            mask[torch.from_numpy(new.rows).nonzero().flatten()] = 1
        if new.cols is not None:
            mask[:, torch.from_numpy(new.cols).nonzero().flatten()] = 1
        whole[name] = mask
    for rank in range(layout.world_size):
        storage = empty_storage(layout, rank)
        found = fresh_masks(fresh, layout, rank, storage)
        for name, expected in held(layout, whole, rank).items():
            assert (name in found) == bool(expected.any())
            if name in found:
                assert found[name].dtype == torch.bool
                assert torch.equal(found[name].float(), expected), name


WIDE = MODEL | {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
BASE, FROZEN, STEPS = 2, 3, 6


def two_stages(folder: Path, growth: dict[str, Any], **stage: Any) -> RunConfig:
    growth = {"lr_schedule": "continue", **growth}
    schedule = {"type": "cosine", "warmup_steps": 1}
    common = {"schedule": schedule, "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.5}}
    return make_run(
        folder,
        [
            {"tokens": BASE * STEP_TOKENS, **common, **stage},
            {"tokens": STEPS * STEP_TOKENS, "model": WIDE, "growth": growth, **common, **stage},
        ],
    )


def factors_of(run: RunConfig) -> list[UpdateFactors]:
    return [update_factors(run, 1, step * STEP_TOKENS) for step in range(STEPS)]


def test_frozen_steps_and_no_others_have_a_factor_of_zero(tmp_path):
    run = two_stages(tmp_path, {"operator": "direct_width", "freeze_tokens": FROZEN * STEP_TOKENS})
    assert factors_of(run) == [(1.0, 0.0)] * FROZEN + [(1.0, 1.0)] * (STEPS - FROZEN)
    assert update_factors(run, 0, 0) == (1.0, 1.0)
    plain = two_stages(tmp_path, {"operator": "direct_width"})
    assert factors_of(plain) == [(1.0, 1.0)] * STEPS


def test_the_factor_of_new_entries_is_their_rate_over_that_of_the_step(tmp_path):
    own = {"peak_factor": 1.5, "warmup_steps": 2}
    growth = {"operator": "sparkling", "new_entries": own, "freeze_tokens": STEP_TOKENS}
    run = two_stages(tmp_path, growth)
    found = factors_of(run)
    assert [factors.old for factors in found] == [0.0] + [1.0] * (STEPS - 1)
    half, full = 0.0055, 0.0045  # of the way from lr to min_lr, which is 7 steps long here
    cosine = [half + full * np.cos(np.pi * step / 7) for step in range(1, 1 + STEPS)]
    peak = 1.5 * cosine[0]
    rates = [1.25 * cosine[0], peak]
    way = [(1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    rates += [1e-3 + part * (peak - 1e-3) for part in way]
    expected = [rate / eta for rate, eta in zip(rates, cosine, strict=True)]
    assert [factors.new for factors in found] == pytest.approx(expected)


def test_where_the_rate_is_zero_the_factor_is_one(tmp_path):
    run = two_stages(tmp_path, {"operator": "sparkling"})
    stage = run.stages[1]
    ended = stage.model_copy(
        update={
            "optimizer": stage.optimizer.model_copy(update={"min_lr": 0.0}),
            "schedule": stage.schedule.model_copy(update={"horizon_tokens": 4 * STEP_TOKENS}),
        }
    )
    run = run.model_copy(update={"stages": [run.stages[0], ended]})
    assert [factors.new for factors in factors_of(run)][2:] == [1.0] * 4


def weights_of(stage: Stage) -> dict[str, torch.Tensor]:
    full = full_tensors(stage.layout, stage.engine.storage())
    return {name: kinds["fp32"].clone() for name, kinds in full.items()}


def grown(run: RunConfig) -> tuple[Stage, RunState]:
    stage = start(run)
    _, state = losses_of(run, stage, RunState())
    stage, report = grow_live(run, stage)
    return stage, state.after_growth(report.layers)


def moved(run: RunConfig) -> list[tuple[bool, bool]]:
    """For each step after the growth: whether any old, and whether any new entry changed."""
    stage, state = grown(run)
    fresh = stage_growth(run, 1).fresh
    whole = layout_of(stage.config.model, 0, 1, 1)
    new = fresh_masks(fresh, whole, 0, whole_storage(whole))
    feed, out, before = StepFeed(open_inputs(run).train), [], weights_of(stage)
    while isinstance(event := advance(run, stage, state, feed, StopSignal()), StepDone):
        state, after = event.state, weights_of(stage)
        changed = {name: (after[name] != before[name]).flatten() for name in after}
        old = [c[~new[n]] if n in new else c for n, c in changed.items()]
        out.append((any(map(torch.any, old)), all(c[new[n]].any() for n, c in changed.items())))
        before = after
    stage.release()
    return out


def whole_storage(layout: Layout) -> Storage:
    return {
        name: dict.fromkeys(ADAMW_KINDS, torch.empty(spec.rows * spec.cols))
        for name, spec in layout.plan.items()
    }


def move_all(folder: Path) -> list[list[tuple[bool, bool]]]:
    growth = {"operator": "direct_width", "freeze_tokens": FROZEN * STEP_TOKENS}
    layouts = [{"zero_stage": zero} for zero in range(4)]
    layouts.append({"zero_stage": 2, "tensor_model_parallel_size": 2, "offload_optimizer": True})
    layouts.append({"zero_stage": 1, "pipeline_model_parallel_size": 2})
    return [moved(two_stages(folder, growth, parallel=parallel)) for parallel in layouts]


@pytest.mark.dist
def test_old_entries_stay_until_they_are_freed_and_new_ones_do_not(tmp_path):
    make_run(tmp_path, [{"tokens": 64}])  # the corpus, written once
    for rank in run_ranks(2, move_all, tmp_path):
        for steps in rank:
            assert steps == [(False, True)] * FROZEN + [(True, True)] * (STEPS - FROZEN)


def interrupted(folder: Path) -> tuple[dict, dict]:
    """The weights of a run that trained through, and of one that stopped while it was frozen."""
    growth = {"operator": "sparkling", "freeze_tokens": FROZEN * STEP_TOKENS}
    parallel = {"zero_stage": 2}
    run = two_stages(folder, growth, parallel=parallel)
    stage, state = grown(run)
    losses_of(run, stage, state)
    through = weights_of(stage)
    stage.release()
    stage, state = grown(run)
    event = advance(run, stage, state, StepFeed(open_inputs(run).train), StopSignal())
    make = manifest_of(stage.layout, stage.engine.adam_step, stage.config.model)
    save_checkpoint(folder / "c", 1, stage.layout, stage.engine.storage(), make)
    stage.release()
    stage = build_stage(run, 1, torch.device("cpu"))
    path, manifest = newest_valid_on_all_ranks(folder / "c")
    load_storage(path, manifest, stage.layout, stage.engine.storage())
    stage.engine.ready(manifest.adam_step)
    losses_of(run, stage, event.state)
    resumed = weights_of(stage)
    stage.release()
    return through, resumed


@pytest.mark.dist
def test_a_resumed_run_goes_on_with_the_same_factors(tmp_path):
    make_run(tmp_path, [{"tokens": 64}])
    for through, resumed in run_ranks(2, interrupted, tmp_path):
        for name, expected in through.items():
            assert torch.equal(resumed[name], expected), name
