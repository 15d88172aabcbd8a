"""Muon on sharded matrices: in every layout the updates of one process with complete matrices."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.config.deepspeed import DeepSpeedConfig
from megagrow.parallel.optimizers.matrix_exchange import assigned
from megagrow.parallel.optimizers.muon import orthogonalized
from megagrow.parallel.optimizers.rules import MuonRule, matrix_rule
from megagrow.parallel.sharding import ParamSpec, parameter_plan
from tests.helpers.checkpoint.saving import manifest_of, save_checkpoint
from tests.helpers.parallel.engines import (
    CONFIG,
    OPTIMIZER,
    Case,
    Plain,
    Weights,
    build,
    difference,
    start_weights,
)
from tests.helpers.parallel.scales import SCALES
from tests.helpers.spawn import run_ranks
from tools.docs.operators.cases import growth_case, times
from tools.docs.operators.dense_growth import grown
from tools.docs.operators.reference_training import weights_of

pytestmark = pytest.mark.slow

WORLD, STEPS = 4, 20
LR, OTHERS = 1e-2, {"adamw": 5e-3, "decoupled": 2e-3}
MUON = OPTIMIZER.model_copy(
    update={
        "type": "muon",
        "adamw_lr": OTHERS["adamw"],
        "decoupled_lr": OTHERS["decoupled"],
        "weight_decay_exclude": ["model.layers.1.mlp.up_proj.weight"],
    }
)
SUB_GROUPS = DeepSpeedConfig.model_validate({"zero_optimization": {"sub_group_size": 500}})
CASES = [
    Case(0, 2),
    Case(1, 1),
    Case(1, 2),
    Case(2, 2, sequence_parallel=True),
    Case(3, 1, offload=True, deepspeed=SUB_GROUPS),
    Case(3, 2),
]
BF16 = Case(3, 2, bf16=True)
RESUMED = {Case(3, 2): Case(3, 2), Case(0, 2): Case(1, 1)}
"""Layouts after and before a checkpoint."""


@dataclass
class Trained:
    """State of an engine on one rank."""

    full: dict[str, dict[str, Tensor]]
    adam_step: int
    kinds: dict[str, list[str]]

    @property
    def weights(self) -> Weights:
        return {name: kinds["fp32"] for name, kinds in self.full.items()}


def train(case: Case, steps: range, folder: Path | None = None) -> Trained:
    """Train an engine from its start or from a checkpoint."""
    built = build(case, SCALES, MUON)
    if folder is not None:
        path, manifest = newest_valid_on_all_ranks(folder)
        built.engine.ready(load_storage(path, manifest, built.layout, built.engine.storage()))
    for seed in steps:
        built.train_step(LR, seed, others=OTHERS)
    kinds = {name: list(held) for name, held in built.engine.storage().items()}
    trained = Trained(built.full(), built.engine.adam_step, kinds)
    built.release()
    return trained


def save_half(case: Case, folder: Path) -> None:
    built = build(case, SCALES, MUON)
    for seed in range(STEPS // 2):
        built.train_step(LR, seed, others=OTHERS)
    make = manifest_of(built.layout, built.engine.adam_step, CONFIG)
    save_checkpoint(folder, STEPS // 2, built.layout, built.engine.storage(), make)
    built.release()


def grown_norms() -> list[float]:
    """Gradient norms of CONFIG doubled by even copies, under ZeRO 3 and tensor parallelism."""
    case, optimizer = growth_case(CONFIG, times(CONFIG, 2, 2, 2), operator="mup_copy"), MUON
    growth = replace(case, matrices=matrix_rule(optimizer)).growth
    start = {name: {"fp32": values} for name, values in start_weights().items()}
    weights = weights_of(grown(start, growth, case.target, ("fp32",)))
    built = build(Case(3, 2), growth.scales, optimizer, case.target)
    built.write(weights)
    norms = [built.train_step(LR, seed, others=OTHERS) for seed in range(STEPS)]
    built.release()
    return norms


def train_all(folder: Path) -> tuple[dict[Case, Trained], dict[Case, Trained], list[float]]:
    trained = {case: train(case, range(STEPS)) for case in (*CASES, BF16)}
    resumed = {}
    for index, (after, before) in enumerate(RESUMED.items()):
        save_half(before, folder / str(index))
        resumed[after] = train(after, range(STEPS // 2, STEPS), folder / str(index))
    return trained, resumed, grown_norms()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[tuple[dict[Case, Trained], dict[Case, Trained], list[float]]]:
    return run_ranks(WORLD, train_all, tmp_path_factory.mktemp("muon"))


def reference(**options) -> Plain:
    plain = Plain(SCALES, MUON, **options)
    for seed in range(STEPS):
        plain.train_step(LR, seed, others=OTHERS)
    return plain


@pytest.mark.dist
def test_all_layouts_train_as_one_process(ranks) -> None:
    plain = reference()
    weights = plain.weights()
    for trained, _, _ in ranks:
        for case in CASES:
            found = trained[case]
            assert difference(found.weights, weights) < 1e-5, case
            assert found.adam_step == STEPS
            for name, buffer in plain.momentum.items():
                error = (found.full[name]["momentum_buffer"] - buffer).abs().max()
                assert error < 1e-5 * buffer.abs().max(), (case, name)
            for name, kinds in found.kinds.items():
                by_muon = name in plain.momentum
                moments = ["momentum_buffer"] if by_muon else ["exp_avg", "exp_avg_sq"]
                assert kinds == ["fp32", *moments], name


@pytest.mark.dist
def test_bf16_and_equal_replicas(ranks) -> None:
    weights = reference().weights()
    for trained, _, _ in ranks:
        assert difference(trained[BF16].weights, weights) < 0.1
        for case, found in trained.items():
            for name, values in found.weights.items():
                assert torch.equal(values, ranks[0][0][case].weights[name]), (case, name)


def test_a_slice_orthogonalized_alone_is_another_update() -> None:
    """The control of the comparison: it would detect the slices of tensor parallelism."""

    def sliced(spec: ParamSpec, matrix: Tensor) -> Tensor:
        if spec.tp_dim is None:
            return orthogonalized(matrix, steps=5, eps=1e-7)
        parts = matrix.chunk(2, spec.tp_dim)
        return torch.cat([orthogonalized(p, steps=5, eps=1e-7) for p in parts], spec.tp_dim)

    assert difference(reference(orthogonalize=sliced).weights(), reference().weights()) > 1e-2


@pytest.mark.dist
def test_a_sharded_copied_model_follows_its_source(ranks) -> None:
    source = Plain(optimizer=MUON)
    norms = [source.train_step(LR, seed, others=OTHERS) for seed in range(STEPS)]
    for _, _, found in ranks:
        assert found == pytest.approx(norms, rel=1e-4)


@pytest.mark.dist
def test_resume(ranks) -> None:
    for trained, resumed, _ in ranks:
        for case, found in resumed.items():
            assert found.adam_step == STEPS
            for name, kinds in trained[case].full.items():
                for kind, values in kinds.items():
                    if RESUMED[case] == case:
                        assert torch.equal(found.full[name][kind], values), (case, name, kind)
                    else:
                        assert torch.allclose(found.full[name][kind], values, 1e-4, 1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_newton_schulz(shape: tuple[int, int]) -> None:
    """Torch's bits in bf16; in fp64 the polynomial of the singular values."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert torch.equal(orthogonalized(matrix.bfloat16(), steps=5, eps=1e-7), theirs)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(orthogonalized(matrix, steps=5, eps=1e-7), u * s @ v, atol=1e-12)
    assert not orthogonalized(torch.zeros(shape), steps=5, eps=1e-7).any()


def test_matrices_are_assigned_by_cost() -> None:
    specs = [s for s in parameter_plan(CONFIG, 1, MuonRule()).values() if s.rule == MuonRule()]
    owned = assigned(specs, 3)
    assert sorted(s.name for each in owned for s in each) == sorted(s.name for s in specs)
    work = [sum(s.rows * s.cols * min(s.rows, s.cols) for s in each) for each in owned]
    largest = max(s.rows * s.cols * min(s.rows, s.cols) for s in specs)
    assert max(work) - min(work) <= largest
