"""Classes of hyper-parameters and the weighted norm: as torch's AdamW with those groups does it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.parallel.engine_config import parameter_groups
from megagrow.parallel.optimizers.rules import ParamScale
from tests.helpers.checkpoint.saving import manifest_of, save_checkpoint
from tests.helpers.parallel.engines import CONFIG, LR, OPTIMIZER, Built, Case, Plain, Weights, build
from tests.helpers.parallel.engines import difference as distance
from tests.helpers.parallel.scales import PLAN, SCALES
from tests.helpers.spawn import run_ranks

WORLD, STEPS = 2, 4
BATCHES = (2, 4, 2, 4)
"""Sequences of each step; their number may change, as in a batch ramp."""

CASES = [Case(zero, tp) for zero in range(4) for tp in (1, 2)]
CASES += [Case(zero, tp, offload=True) for zero in (1, 2, 3) for tp in (1, 2)]
BF16 = [Case(zero, tp, bf16=True) for zero in range(4) for tp in (1, 2)]
BF16 += [Case(1, 2, offload=True, bf16=True)]


@dataclass
class Trained:
    """Results of an engine, seen from one rank."""

    norms: list[float]
    weights: Weights
    hyper_parameters: dict[str, tuple[float, float, float]]
    adam_step: int


def hyper_parameters(built: Built) -> dict[str, tuple[float, float, float]]:
    """(lr, weight decay, eps) by parameter, of the group that really updates what is held here."""
    engine, out = built.engine, {}
    deepspeed = engine._engine.optimizer
    for place in engine._fragments():
        if place.numel == 0:
            continue
        if built.layout.zero_stage == 3:
            flats = deepspeed.fp32_partitioned_groups_flat
            sub_group = next(i for i, flat in enumerate(flats) if flat is place.owner)
            group = engine._optimizer.param_groups[deepspeed.sub_group_to_group_id[sub_group]]
        else:
            groups = engine._optimizer.param_groups
            group = next(g for g in groups if any(p is place.owner for p in g["params"]))
        out[place.name] = (group["lr"], group["weight_decay"], group["eps"])
    return out


def train_steps(model: Built | Plain, steps: range = range(STEPS)) -> list[float]:
    """Do some of the steps; the gradients' norms."""
    return [model.train_step(seed=step, size=BATCHES[step]) for step in steps]


def train(case: Case) -> Trained:
    built = build(case, SCALES)
    norms = train_steps(built)
    trained = Trained(norms, built.weights(), hyper_parameters(built), built.engine.adam_step)
    built.release()
    return trained


def train_all(cases: list[Case]) -> list[Trained]:
    return [train(case) for case in cases]


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], Weights]:
    model = Plain(SCALES)
    return train_steps(model), model.weights()


@pytest.fixture(scope="module")
def found() -> dict[Case, list[Trained]]:
    by_rank = run_ranks(WORLD, train_all, CASES + BF16)
    return {case: list(ranks) for case, ranks in zip(CASES + BF16, zip(*by_rank, strict=True),
                                                     strict=True)}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_those_of_torch_with_groups_and_a_weighted_clip(found, plain, case):
    norms, weights = plain
    assert min(norms) > 5 * OPTIMIZER.gradient_clipping, "nothing was clipped"
    for rank in found[case]:
        assert rank.norms == pytest.approx(norms, rel=1e-5)
        assert distance(rank.weights, weights) < 2e-6
        assert rank.adam_step == STEPS


@pytest.mark.dist
@pytest.mark.parametrize("case", BF16, ids=str)
def test_the_norm_is_weighted_in_bf16_too(found, plain, case):
    for rank in found[case]:
        assert rank.norms == found[case][0].norms
        assert rank.norms[0] == pytest.approx(plain[0][0], rel=2e-2)


def test_every_factor_matters(plain):
    """The factors that the comparison needs: each kind of factor, and the clip."""
    for field in ("lr", "weight_decay", "eps", "norm"):
        without = {
            name: ParamScale(**{**vars(scale), field: 1.0}) for name, scale in SCALES.items()
        }
        model = Plain(without)
        norms = train_steps(model)
        assert distance(model.weights(), plain[1]) > 1e-4, field
        assert (norms[0] == pytest.approx(plain[0][0], rel=1e-3)) == (field != "norm")


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_has_its_own_hyper_parameters(found, case):
    expected = {
        name: (
            LR * scale.lr,
            0.0 if "norm" in name else OPTIMIZER.weight_decay * scale.weight_decay,
            OPTIMIZER.eps * scale.eps,
        )
        for name, scale in SCALES.items()
    }
    for rank in found[case]:
        assert rank.hyper_parameters == {name: expected[name] for name in rank.hyper_parameters}
    assert {name for rank in found[case] for name in rank.hyper_parameters} == expected.keys()


RELOADED = {Case(3, 1): Case(0, 2), Case(3, 2): Case(2, 1), Case(0, 1): Case(3, 1),
            Case(1, 2): Case(3, 2), Case(2, 1): Case(1, 1), Case(2, 1, True): Case(2, 2, True),
            Case(3, 2, True): Case(1, 1, True)}  # fmt: skip
"""Each resumes from a checkpoint of another one, written at half the way."""


def reloaded(folder: Path) -> dict[Case, Trained]:
    out = {}
    for index, (case, before) in enumerate(RELOADED.items()):
        first = build(before, SCALES)
        train_steps(first, range(STEPS // 2))
        make = manifest_of(first.layout, first.engine.adam_step, CONFIG)
        where = folder / str(index)
        save_checkpoint(where, index, first.layout, first.engine.storage(), make)
        first.release()
        built = build(case, SCALES)
        path, manifest = newest_valid_on_all_ranks(where)
        load_storage(path, manifest, built.layout, built.engine.storage())
        built.engine.ready(manifest.adam_step)
        norms = train_steps(built, range(STEPS // 2, STEPS))
        values = hyper_parameters(built)
        out[case] = Trained(norms, built.weights(), values, built.engine.adam_step)
        built.release()
    return out


@pytest.mark.dist
def test_classes_and_the_step_hold_after_a_checkpoint_of_another_layout(found, tmp_path):
    for rank, by_case in enumerate(run_ranks(WORLD, reloaded, tmp_path)):
        for case, resumed in by_case.items():
            whole = found[case][rank]
            assert resumed.hyper_parameters == whole.hyper_parameters, case
            assert resumed.adam_step == STEPS, case
            assert resumed.norms == pytest.approx(whole.norms[STEPS // 2 :], rel=1e-5), case
            assert distance(resumed.weights, whole.weights) < 2e-6, case


def unequal_steps() -> str:
    built = build(Case(2, 1), SCALES)
    next(iter(built.engine._optimizer.state.values()))["step"] += 1
    with pytest.raises(AssertionError) as error:
        assert built.engine.adam_step
    return str(error.value)


@pytest.mark.dist
def test_steps_that_differ_are_noticed():
    said = run_ranks(WORLD, unequal_steps)
    assert [text.startswith(f"rank {rank}: ") for rank, text in enumerate(said)] == [True] * WORLD


def test_groups_without_scales_are_those_of_weight_decay():
    matrices = tuple(name for name in PLAN if "norm" not in name)
    norms = tuple(name for name in PLAN if "norm" in name)
    found = parameter_groups(PLAN, OPTIMIZER, {})
    assert [group.names for group in found] == [matrices, norms]
    everything = OPTIMIZER.model_copy(update={"weight_decay_on": "all"})
    assert [group.names for group in parameter_groups(PLAN, everything, {})] == [tuple(PLAN)]


def test_parameters_of_one_scale_make_one_group():
    found = parameter_groups(PLAN, OPTIMIZER, SCALES)
    assert sorted(name for group in found for name in group.names) == sorted(PLAN)
    assert [group.decays for group in found] == [True] * 4 + [False]
    assert len({group.scale for group in found}) == len(found)
    assert found[0].names == ("model.embed_tokens.weight",)
    assert all(SCALES[name] == group.scale for group in found for name in group.names)


def test_a_scale_of_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"model\.layers\.9"):
        parameter_groups(PLAN, OPTIMIZER, {"model.layers.9.q": ParamScale(lr=2.0)})
