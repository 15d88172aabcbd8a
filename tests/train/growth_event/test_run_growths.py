"""Scales through a run's growths; and with them a grown run is the run that did not grow."""

from pathlib import Path
from typing import Any

import pytest

from megagrow.config.schema import RunConfig
from megagrow.parallel.optimizers.rules import ParamScale
from megagrow.train.growth_event.run_growths import stage_growth, stage_scales
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, STEP_TOKENS, grow_live, make_run
from tests.helpers.spawn import run_ranks
from tests.helpers.train.starting import losses_of, start

WIDE = MODEL | {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
WIDER = {**WIDE, "intermediate_size": 192}
BASE, GROWN = 4, 8
OPTIMIZER = {
    "lr": 1e-2,
    "eps": 1e-4,
    "weight_decay": 0.5,
    "weight_decay_on": "matrices",
    "gradient_clipping": 0.3,
}
DOWN = "model.layers.{}.mlp.down_proj.weight"


def stage(model: dict, steps: int, growth: dict | None = None, **changes: Any) -> dict[str, Any]:
    growth = None if growth is None else {"lr_schedule": "continue", **growth}
    values = {"model": model, "tokens": steps * STEP_TOKENS, "optimizer": OPTIMIZER}
    return {**values, "growth": growth, **changes}


def test_scales_are_asked_for(tmp_path):
    for growth, there in (
        ({"operator": "direct_width"}, False),
        ({"operator": "direct_width", "exact_continuation": True}, True),
        ({"operator": "mup_copy"}, True),
        ({"operator": "mup_copy", "exact_continuation": False}, False),
    ):
        run = make_run(tmp_path, [stage(MODEL, 1), stage(WIDE, 1, growth)])
        assert stage_scales(run, 0) == {}
        assert bool(stage_scales(run, 1)) == there, growth
    assert stage_growth(run, 1).scales, "the map knows them; the run does not want them"


def test_scales_go_on_to_later_stages_with_their_layers(tmp_path):
    deep = {**WIDER, "num_hidden_layers": 4}
    run = make_run(
        tmp_path,
        [
            stage(MODEL, 1),
            stage(WIDE, 1, {"operator": "mup_copy"}),
            stage(WIDER, 1, {"operator": "mup_copy"}),
            stage(deep, 1, {"operator": "direct_depth"}),
        ],
    )
    twice = ParamScale(lr=0.5, weight_decay=2.0, eps=0.5, norm=1.0)
    assert stage_scales(run, 1)[DOWN.format(1)] == twice
    again = ParamScale(lr=0.25, weight_decay=4.0, eps=0.5, norm=0.5)
    assert stage_scales(run, 2)[DOWN.format(1)] == again
    last = stage_scales(run, 3)
    assert [last[DOWN.format(layer)] for layer in range(4)] == [again] * 4
    assert "model.layers.4.mlp.down_proj.weight" not in last


def test_a_layer_of_no_origin_has_no_scale(tmp_path):
    deep = {**WIDE, "num_hidden_layers": 4}
    run = make_run(
        tmp_path,
        [
            stage(MODEL, 1),
            stage(WIDE, 1, {"operator": "mup_copy"}),
            stage(deep, 1, {"operator": "zero_depth", "new_layer_init": "random"}),
        ],
    )
    new = [layer for layer, origin in enumerate(stage_growth(run, 2).provenance) if origin < 0]
    with_scale = [layer for layer in range(4) if DOWN.format(layer) in stage_scales(run, 2)]
    assert len(new) == 2 and sorted(new + with_scale) == list(range(4))


LAYOUTS = (
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2, "offload_optimizer": True},
    {"zero_stage": 3, "tensor_model_parallel_size": 2},
    {"zero_stage": 3, "offload_optimizer": True},
    {"zero_stage": 2, "pipeline_model_parallel_size": 2},
)


def runs(folder: Path, parallel: dict, before: dict | None = None) -> tuple[RunConfig, RunConfig]:
    """One that does not grow, and one that does by exact copies in the middle."""
    one = make_run(folder, [stage(MODEL, BASE + GROWN)])
    first = stage(MODEL, BASE, parallel=before or parallel)
    second = stage(WIDE, GROWN, {"operator": "mup_copy"}, parallel=parallel)
    return one, make_run(folder, [first, second])


def losses_and_norms(run: RunConfig) -> tuple[list[float], list[int]]:
    """Values of every step; and Adam's steps: before the growth, after it, at the end."""
    current = start(run)
    losses, state = losses_of(run, current, RunState())
    steps = [current.engine.adam_step]
    if len(run.stages) > 1:
        current, report = grow_live(run, current)
        steps.append(current.engine.adam_step)
        losses += losses_of(run, current, state.after_growth(report.layers))[0]
        steps.append(current.engine.adam_step)
    current.release()
    return losses, steps


def train_all(folder: Path) -> tuple[list[float], list[tuple[list[float], list[int]]]]:
    plain, _ = losses_and_norms(runs(folder, {})[0])
    pairs = [(parallel, None) for parallel in LAYOUTS] + [(LAYOUTS[2], LAYOUTS[3])]
    return plain, [losses_and_norms(runs(folder, *pair)[1]) for pair in pairs]


@pytest.mark.dist
def test_an_exactly_continued_run_is_the_run_that_did_not_grow(tmp_path):
    make_run(tmp_path, [{"tokens": 64}])  # the corpus, written once
    for plain, grown in run_ranks(2, train_all, tmp_path):
        assert plain[0] - plain[-2] > 0.3, "nothing was learned: the test would prove nothing"
        assert min(plain[1::2]) > OPTIMIZER["gradient_clipping"], "nothing was clipped"
        for losses, steps in grown:
            assert losses == pytest.approx(plain, rel=1e-4)
            assert steps == [BASE, BASE, BASE + GROWN]
