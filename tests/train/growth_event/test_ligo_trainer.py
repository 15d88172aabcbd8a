"""The training of learned growths: gradients, layouts, memory, and what comes out of it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megagrow.config.schema import BatchConfig, OptimizerConfig, ParallelConfig, RunConfig
from megagrow.data.batches import Batch
from megagrow.data.stage_streams import StreamPlace
from megagrow.growth.ligo import LigoParameters, forming_flops, initial, learned_map
from megagrow.growth.map import Dense, GrowthMap
from megagrow.growth.operators import resolve_operators
from megagrow.model.layers.flops import flops_per_token, parameters
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.loss import IGNORED
from megagrow.parallel.process_groups import make_topology
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.exchange import ShardedState
from megagrow.train.data_setup import open_inputs
from megagrow.train.growth_event.cost import Feed, GrowthCost
from megagrow.train.growth_event.ligo_trainer import (
    Forming,
    formed_model,
    learn_growth,
    summed_gradients,
)
from megagrow.train.growth_event.run_growths import stage_layout
from megagrow.train.step_feed import StepFeed
from tests.helpers.growth.ligo import by_formula, disturbed, learned_of, outputs, state_of
from tests.helpers.reshard.definition import storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks
from tools.docs.operators.dense_growth import State, grown

CPU = torch.device("cpu")
MICRO, GLOBAL, LENGTH = 2, 8, 12

Layouts = tuple[int, int, int, bool]
"""ZeRO stage and TP of the source; TP and sequence parallelism of the target."""

LAYOUTS: dict[int, list[Layouts]] = {
    1: [(0, 1, 1, False), (1, 1, 1, False), (3, 1, 1, False)],
    2: [(0, 1, 1, False), (1, 2, 2, False), (3, 1, 2, True)],
    4: [(0, 2, 2, False), (2, 2, 2, True), (3, 2, 1, False)],
}
"""By the number of ranks."""

CASES = [("both", False), ("both", True), ("depth", False), ("width", True)]
"""Growth, and whether the head is tied."""


def batch_of(indices: list[int]) -> Batch:
    """Some sequences of a global batch; the last position of the last one has no next token."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(101, (GLOBAL, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[-1, -1] = IGNORED
    documents = (torch.arange(LENGTH) > 7).long().expand(GLOBAL, LENGTH)
    positions = torch.arange(LENGTH).expand(GLOBAL, LENGTH)
    return Batch(*(x[indices] for x in (tokens[:, :-1], labels, positions, documents)))


def forming_of(learned: LigoParameters, layouts: Layouts) -> Forming:
    zero, source_tp, tp, sequence_parallel = layouts
    source, target = learned.growth.source, learned.growth.target
    layout = layout_of(source, zero, dist.get_world_size() // source_tp, source_tp, "matrices")
    side = ShardedState(layout, storage_of(layout, state_of(source), dist.get_rank()))
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    batch = BatchConfig(global_batch_size=GLOBAL, micro_batch_size=MICRO)
    settings = EngineSettings(target, parallel, batch, OptimizerConfig(lr=1), bf16=False)
    return Forming(learned, side, settings, make_topology(tp, CPU), learned.tensors()[0].dtype)


def gradients_of(forming: Forming) -> tuple[float, list[Tensor]]:
    learned, topology = forming.learned, forming.topology
    starts = range(topology.dp_rank * MICRO, GLOBAL, MICRO * topology.dp)
    batches = [batch_of([start, start + 1]) for start in starts]
    loss = summed_gradients(formed_model(forming), learned, batches, topology, GLOBAL * LENGTH)
    return loss, [tensor.grad.clone() for tensor in learned.tensors()]


def double(state: State) -> State:
    return {name: {k: t.double() for k, t in kinds.items()} for name, kinds in state.items()}


def worst_weight(forming: Forming) -> float:
    """Largest difference between a slice that is formed and what the map makes of whole tensors."""
    learned, topology = forming.learned, forming.topology
    source, target = learned.growth.source, learned.growth.target
    whole, worst = grown(double(state_of(source)), learned_map(learned), target), 0.0
    for name, spec in parameter_plan(target, topology.tp).items():
        row, col = spec.slice_origin(topology.tp, topology.tp_rank)
        rows, cols = spec.slice_shape(topology.tp)
        expected = whole[name]["fp32"][row : row + rows, col : col + cols]
        formed = forming.weights({"it": name})["it"].detach().view(rows, cols)
        assert (formed[len(expected) :] == 0).all(), "padding"
        worst = max(worst, float((formed[: len(expected)] - expected).abs().max()))
    return worst


def all_gradients(layouts: list[Layouts]) -> list[tuple[float, list[Tensor], float]]:
    """Compare, for each case and each of these layouts: loss, gradients, and `worst_weight`."""
    out = []
    for name, tied in CASES:
        for one in layouts:
            forming = forming_of(disturbed(learned_of(name, tied, torch.float64)), one)
            out.append((*gradients_of(forming), worst_weight(forming)))
    return out


@functools.cache
def plain_gradients(name: str, tied: bool) -> tuple[float, list[Tensor]]:
    """By autograd on whole tensors, in fp64."""
    learned = disturbed(learned_of(name, tied, torch.float64))
    state = double(state_of(learned.growth.source))
    whole = {name: kinds["fp32"] for name, kinds in state.items()}
    batch = batch_of(list(range(GLOBAL)))
    documents = batch.document_ids
    assert documents is not None
    inputs = (batch.input_ids, batch.position_ids, documents)
    logits = outputs(learned.growth.target, by_formula(learned, whole), inputs)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=IGNORED
    )
    loss = loss / batch.labels.numel()
    return loss.item(), list(torch.autograd.grad(loss, learned.tensors()))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_gradients_are_those_of_autograd_on_whole_tensors(world):
    results = run_ranks(world, all_gradients, LAYOUTS[world])
    for rank, found in enumerate(results):
        cases = [(case, layout) for case in CASES for layout in LAYOUTS[world]]
        for (case, layout), (loss, gradients, worst) in zip(cases, found, strict=True):
            expected_loss, expected = plain_gradients(*case)
            # All is fp64 but the statistics of the vocabulary, which are fp32 in the product.
            assert loss == pytest.approx(expected_loss, rel=1e-6), (rank, case, layout)
            for one, other in zip(gradients, expected, strict=True):
                error = (one - other).abs().max() / other.abs().max()
                assert error < 1e-6, (rank, case, layout, one.shape)
            assert worst < 1e-12, (rank, case, layout)


def most_alive(layouts: Layouts) -> tuple[int, int]:
    """Return how often weights are formed for a step, and how many others are in memory then."""
    forming = forming_of(disturbed(learned_of("both", tied=False)), layouts)
    seen: list[StorageWeakRef] = []
    counts = []
    form = Forming.weights

    def watched(self: Forming, names: dict[str, str]) -> dict[str, Tensor]:
        counts.append(sum(not reference.expired() for reference in seen))
        found = form(self, names)
        seen.extend(StorageWeakRef(weight.untyped_storage()) for weight in found.values())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forming, "weights", watched)
        gradients_of(forming)
    return len(counts), max(counts)


@pytest.mark.dist
def test_the_weights_of_one_part_exist_at_a_time():
    parts = 5 + 3  # layers; embedding, norm, head
    micro_batches = GLOBAL // MICRO
    for formed, alive in run_ranks(2, most_alive, (1, 2, 2, False)):
        assert formed == 2 * parts * micro_batches, "forward, and once more on the way back"
        assert alive == 0


WIDE = MODEL | {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 60,
}


def run_of(
    folder: Path,
    tp: int = 1,
    zero: int = 1,
    cp: int = 1,
    pp: int = 1,
    micro_batch_size: int = 1,
    **learn: Any,
) -> RunConfig:
    parallel = {"tensor_model_parallel_size": tp, "context_parallel_size": cp, "zero_stage": zero}
    parallel["pipeline_model_parallel_size"] = pp
    growth = {"operator": ["learn_depth", "learn_width"], "learn": learn}
    batch = {"global_batch_size": 4, "micro_batch_size": micro_batch_size}
    sizes = {"tokens": 2 * STEP_TOKENS, "parallel": parallel, "batch": batch}
    return make_run(folder, [sizes, {"model": WIDE, "growth": growth, **sizes}])


def learn(run: RunConfig) -> tuple[GrowthMap, GrowthCost]:
    layout, model = stage_layout(run, 0, dist.get_world_size()), run.stages[0].model
    side = ShardedState(layout, storage_of(layout, state_of(model), dist.get_rank()))
    feed = Feed(StepFeed(open_inputs(run).train), StreamPlace(2 * STEP_TOKENS))
    return learn_growth(run, 1, side, CPU, feed)


def numbers(growth: GrowthMap) -> list[Tensor]:
    """All that a map was taught."""
    terms = [term for terms in growth.weights.values() for term in terms]
    dense = [term for term in terms if isinstance(term, Dense)]
    found = [torch.tensor(term.alphas) for term in dense]
    matrices = {id(m): m for term in dense for m in (term.left, term.right) if m is not None}
    return found + [torch.from_numpy(matrix) for matrix in matrices.values()]


def taught(runs: list[RunConfig]) -> list[tuple[list[Tensor], tuple[float, ...]]]:
    found = [learn(run) for run in runs]
    return [(numbers(growth), spent.losses) for growth, spent in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("learn")


@pytest.mark.dist
def test_every_layout_learns_the_same(folder):
    of = functools.partial(run_of, folder, steps=3, lr=1e-3, warmup_steps=1)
    ((reference,),) = run_ranks(1, taught, [of(micro_batch_size=4)])
    two = (1, 3), (2, 1), (1, 0, 1, 2, 4)  # the last one has a micro-batch for one rank only
    four = (1, 0), (2, 2), (1, 1, 2), (1, 2, 1, 2), (2, 1, 1, 2), (1, 0)
    for world, layouts in ((2, two), (4, four)):
        results = run_ranks(world, taught, [of(*layout) for layout in layouts])
        for rank, found in enumerate(results):
            for layout, (matrices, losses) in zip(layouts, found, strict=True):
                assert losses == pytest.approx(reference[1], abs=1e-5), (world, rank, layout)
                for one, other in zip(matrices, reference[0], strict=True):
                    assert (one - other).abs().max() < 1e-5, (world, rank, layout)
    for one, other, again in zip(results[0][0][0], results[3][0][0], found[-1][0], strict=True):
        assert torch.equal(one, other), "all ranks hold the same bits"
        assert torch.equal(one, again), "and a repeat has them again"


@pytest.mark.dist
def test_the_loss_falls_and_what_it_took_is_told(folder):
    run = run_of(folder, micro_batch_size=4, steps=20, lr=1e-2, warmup_steps=2)
    ((growth, spent),) = run_ranks(1, learn, run)
    assert not growth.preserves_function and growth.provenance == (0, 0, 1)
    losses = spent.losses
    assert len(losses) == 20 and max(losses[-3:]) < losses[0] - 0.2
    assert spent.tokens == 20 * STEP_TOKENS
    wide = run.stages[1].model
    assert spent.flops == 6 * parameters(wide) * spent.tokens
    parts = resolve_operators(run.stages[0].model, wide, run.stages[1].growth, "")
    making = forming_flops(initial(parts, CPU), list(parameter_plan(wide, tp=1).values()))
    per_token = flops_per_token(wide, run.stages[0].data.sequence_length)
    assert spent.flops_true == per_token * spent.tokens + 3 * making * 20


@pytest.mark.dist
def test_in_bf16_the_losses_are_nearly_the_same(folder):
    run = run_of(folder, micro_batch_size=4, steps=4, lr=1e-3, warmup_steps=1)
    low = run.model_copy(update={"precision": "bf16"})
    ((plain, rounded),) = run_ranks(1, taught, [run, low])
    assert rounded[1] == pytest.approx(plain[1], abs=0.05)
    assert rounded[1] != plain[1]
    assert {matrix.dtype for matrix in rounded[0]} == {torch.float32, torch.float64}
