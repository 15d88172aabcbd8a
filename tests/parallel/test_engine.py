"""The engine: its fp32 state is what was written, its 16-bit weights follow, and it learns."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import CausalLM
from megagrow.parallel.loss import cross_entropy
from megagrow.parallel.sharding import Storage
from megagrow.reshard.fill import fill_initial
from megagrow.reshard.layout import Layout
from megagrow.train.stage import Stage, build_stage, check_layout
from tests.helpers.hugging_face import tokens
from tests.helpers.reshard.definition import State, random_state, same, storage_of
from tests.helpers.runs import MODEL, full_tensors, make_run
from tests.helpers.spawn import run_ranks

WORLD = 2
LAYOUTS = [(zero, tp) for zero in range(4) for tp in (1, 2)]
CONFIG = ModelConfig(**MODEL)
STEPS, LIMIT = 3, 0.01


@dataclass
class Found:
    """Results of one engine, seen from one rank."""

    dtypes: set[torch.dtype]
    written: bool
    """True if the state was as it had been written, after `ready`."""
    adam_steps: tuple[int, int]
    forward: list[float]
    """Distance of the logits from those of one bf16 model with the masters: before and after."""
    losses: list[float]
    norms: list[float]
    first_update: float
    """Norm of the first clipped gradient."""
    weights: State
    unchanged: dict[int, bool]
    """For each step, True if the state was that of the step before when the update began."""


def train(folder: Path, zero: int, tp: int, precision: str) -> Found:
    parallel = {"zero_stage": zero, "tensor_model_parallel_size": tp}
    optimizer = {"lr": 3e-3, "gradient_clipping": LIMIT, "weight_decay_on": "matrices"}
    batch = {"global_batch_size": 2, "micro_batch_size": tp}
    stage_values = {"tokens": 64, "parallel": parallel, "optimizer": optimizer, "batch": batch}
    run = make_run(folder, [stage_values], precision=precision)
    stage = build_stage(run, 0, torch.device("cpu"))
    storage, rank = stage.engine.storage(), stage.topology.rank
    written = write_random(stage)
    steps = stage.engine.adam_step
    for kinds in storage.values():
        for values in kinds.values():
            values.zero_()
    fill_initial(stage.layout, rank, storage, seed=1)
    stage.engine.ready(adam_step=0)
    forward, losses, norms = [distance(stage)], [], []
    kept, unchanged = clones(storage), dict[int, bool]()

    def update() -> None:  # more than once a step under ZeRO 3
        unchanged.setdefault(len(losses), same(storage, kept))

    stage.engine.before_update(update)
    for _ in range(STEPS):
        kept = clones(storage)
        loss, norm = step(stage)
        losses.append(loss)
        norms.append(norm)
        if len(losses) == 1:
            first = norm_of({n: k["exp_avg"] / 0.1 for n, k in state_of(stage).items()})
    forward.append(distance(stage))
    dtypes = {v.dtype for kinds in stage.engine.storage().values() for v in kinds.values()}
    counts, weights = (steps, stage.engine.adam_step), state_of(stage)
    stage.release()
    return Found(dtypes, written, counts, forward, losses, norms, first, weights, unchanged)


def clones(storage: Storage) -> Storage:
    return {name: {kind: v.clone() for kind, v in kinds.items()} for name, kinds in storage.items()}


def write_random(stage: Stage) -> bool:
    """Writes a random state; whether it is still there when the engine is ready."""
    state = random_state(stage.layout.plan)
    expected = storage_of(stage.layout, state, stage.topology.rank)
    for name, kinds in stage.engine.storage().items():
        for kind, values in kinds.items():
            values.copy_(expected[name][kind])
    stage.engine.ready(adam_step=7)
    return same(stage.engine.storage(), expected)


def state_of(stage: Stage) -> State:
    return full_tensors(stage.layout, stage.engine.storage())


def norm_of(tensors: dict[str, Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).norm().item()


def forward(stage: Stage, ids: Tensor) -> Tensor:
    return stage.engine.forward(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def distance(stage: Stage) -> float:
    """From the logits of a plain model on one device that is given the masters; in units of
    the logits' own size."""
    ids, _ = tokens(CONFIG, 2, 8, seed=3)
    bf16 = stage.engine.settings.bf16
    plain = CausalLM(CONFIG)
    masters = {name: kinds["fp32"] for name, kinds in state_of(stage).items()}
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    plain.load_state_dict({name: tensor.view(shapes[name]) for name, tensor in masters.items()})
    autocast = bf16 and stage.layout.zero_stage == 0
    stage.engine.train(False)
    with torch.no_grad():
        logits = forward(stage, ids)
        parts = [torch.empty_like(logits) for _ in range(stage.topology.tp)]
        dist.all_gather(parts, logits, group=stage.topology.tp_group)
        if bf16 and not autocast:
            plain.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = plain(ids, torch.arange(8).expand_as(ids))
    stage.engine.train()
    found = torch.cat(parts, dim=-1)[..., : CONFIG.vocab_size]
    return ((found.float() - expected.float()).abs().max() / expected.abs().max()).item()


def step(stage: Stage) -> tuple[float, float]:
    """One update on the same batch as ever: the loss of all ranks, and the gradient's norm."""
    ids, labels = tokens(CONFIG, 2, 8)
    topology = stage.topology
    mine = slice(topology.dp_rank * topology.tp, (topology.dp_rank + 1) * topology.tp)
    ids, labels = ids[mine], labels[mine]
    loss = cross_entropy(forward(stage, ids), labels, CONFIG.vocab_size, topology)[0]
    loss = loss / labels.numel()
    stage.engine.backward(loss)
    norm = stage.engine.step(lr=3e-3).item()
    total = loss.detach() / topology.dp
    dist.all_reduce(total, group=topology.dp_group)
    return total.item(), norm


def train_all(folder: Path) -> dict[tuple, Found]:
    return {
        (precision, *layout): train(folder, *layout, precision)
        for precision in ("fp32", "bf16")
        for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[tuple, Found]]:
    folder = tmp_path_factory.mktemp("zero")
    make_run(folder, [{"tokens": 64}])  # the corpus, written once
    return run_ranks(WORLD, train_all, folder)


CASES = [(precision, *layout) for precision in ("fp32", "bf16") for layout in LAYOUTS]


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_is_fp32_and_what_was_written(found, case):
    for rank in found:
        assert rank[case].written
        assert rank[case].dtypes == {torch.float32}
        assert rank[case].adam_steps == (7, STEPS)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_weights_are_the_masters_rounded(found, case):
    precision, _, tp = case
    # Another order of sums under TP; without it the same bits.
    limit = 0.0 if tp == 1 else {"fp32": 1e-6, "bf16": 2e-2}[precision]
    for rank in found:
        assert all(distance <= limit for distance in rank[case].forward), rank[case].forward
        fp32 = torch.cat([kinds["fp32"].flatten() for kinds in rank[case].weights.values()])
        assert (fp32 != fp32.bfloat16()).any(), "masters hold more than bf16"


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_learns_alike_on_all_ranks_and_in_every_layout(found, case):
    first, reference = found[0][case], found[0]["fp32", 0, 1]
    close = 1e-5 if case[0] == "fp32" else 1e-2
    for rank in found:
        assert rank[case].losses == first.losses and rank[case].norms == first.norms
        assert same(rank[case].weights, first.weights)
        assert rank[case].unchanged == dict.fromkeys(range(STEPS), True), "a copy may be under way"
    assert first.losses == sorted(first.losses, reverse=True)
    assert first.losses[0] - first.losses[-1] > 0.05
    assert first.losses == pytest.approx(reference.losses, rel=close)
    assert first.norms == pytest.approx(reference.norms, rel=max(close, 1e-4))


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_clipped_to_the_limit(found, case):
    assert found[0][case].norms[0] > 10 * LIMIT, "nothing was clipped: the test would prove nothing"
    assert found[0][case].first_update == pytest.approx(LIMIT, rel=1e-3)


def other_layouts(folder: Path) -> list[str]:
    """Message if our arithmetic is not DeepSpeed's."""
    run = make_run(folder, [{"tokens": 64, "parallel": {"zero_stage": 3}}])
    stage = build_stage(run, 0, torch.device("cpu"))
    ours, said = stage.layout, []
    for zero, groups in ((1, ours.groups), (0, ours.groups)):
        wrong = Layout(ours.plan, groups, zero, ours.dp, ours.tp)
        try:
            check_layout(wrong, stage.engine, stage.topology.rank)
        except AssertionError as error:
            said.append(str(error))
    return said


@pytest.mark.dist
def test_a_layout_that_is_not_deepspeeds_is_noticed(tmp_path):
    make_run(tmp_path, [{"tokens": 64}])
    for rank, said in enumerate(run_ranks(WORLD, other_layouts, tmp_path)):
        assert len(said) == 2
        assert all(text.startswith(f"rank {rank}: ") and "DeepSpeed holds" in text for text in said)
