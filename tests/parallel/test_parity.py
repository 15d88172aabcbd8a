"""Under any TP, sequence parallelism and ZeRO stage the model is still Hugging Face's Llama.

Adam's exp_avg after the first step is (1 - beta1) times the gradient: so gradients are read where
every ZeRO stage keeps them, reduced over all ranks.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.parallel.engine import ZeroEngine
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.loss import cross_entropy
from megagrow.parallel.process_groups import Topology, make_topology
from megagrow.reshard.layout import Layout
from tests.helpers.hugging_face import hugging_face, outcome, tiny, tokens
from tests.helpers.reshard.definition import held
from tests.helpers.runs import full_tensors
from tests.helpers.spawn import run_ranks

WORLD = 4
MODELS = {
    (heads, tied): tiny(
        num_attention_heads=number, num_key_value_heads=4, tie_word_embeddings=tied == "tied"
    )
    for heads, number in (("mha", 4), ("gqa", 8))
    for tied in ("untied", "tied")
}
GRIDS = ((0, 1, False), (0, 2, False), (0, 2, True), (0, 4, False), (0, 4, True))
SHARDED = ((1, 2, True), (2, 4, False), (3, 2, True), (3, 1, False), (3, 2, True, "selective"))
"""(ZeRO stage, TP, sequence parallel), and activation checkpointing if it is not `none`; the second
list for one of the models only."""

LIMIT = 1e-5


@dataclass(frozen=True)
class Measure:
    """Hugging Face's weights, logits and gradients, and what they were made from."""

    weights: dict[str, torch.Tensor]
    ids: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def measure_of(config: ModelConfig) -> Measure:
    model = hugging_face(config)
    ids, labels = tokens(config, WORLD, 8)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Measure(weights, ids, labels, *outcome(model, ids, labels))


@pytest.fixture(scope="module")
def measures() -> dict[tuple[str, str], Measure]:
    return {which: measure_of(config) for which, config in MODELS.items()}


def build(config: ModelConfig, case: tuple, topology: Topology) -> tuple[ZeroEngine, Layout]:
    zero, tp, sequence_parallel, checkpointing = (*case, "none")[:4]
    settings = EngineSettings(
        config,
        ParallelConfig(
            tensor_model_parallel_size=tp,
            zero_stage=zero,
            sequence_parallel=sequence_parallel,
            activation_checkpointing=checkpointing,
        ),
        BatchConfig(global_batch_size=WORLD, micro_batch_size=tp),
        OptimizerConfig(lr=1e-3, gradient_clipping=0),
        bf16=False,
    )
    engine = ZeroEngine(settings, topology)
    return engine, Layout(engine.plan, engine.groups, zero, topology.dp, tp)


def matrices(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With vectors as matrices of one column, as the plan sees them."""
    return {name: tensor.view(len(tensor), -1) for name, tensor in tensors.items()}


def compare(config: ModelConfig, measure: Measure, case: tuple) -> dict[str, Any]:
    """The largest differences of logits and gradients, and what padding holds; on this rank."""
    topology = make_topology(case[1], torch.device("cpu"))
    engine, layout = build(config, case, topology)
    for name, values in held(layout, matrices(measure.weights), topology.rank).items():
        engine.storage()[name]["fp32"].copy_(values)
    engine.ready(adam_step=0)
    mine = slice(topology.dp_rank * case[1], (topology.dp_rank + 1) * case[1])
    ids, labels = measure.ids[mine], measure.labels[mine]
    logits = engine.forward(ids, torch.arange(8).expand_as(ids), None)
    engine.backward(cross_entropy(logits, labels, config.vocab_size, topology)[0] / labels.numel())
    norm = engine.step(lr=1e-3).item()
    parts = [torch.empty_like(logits) for _ in range(topology.tp)]
    dist.all_gather(parts, logits.detach(), group=topology.tp_group)
    whole = torch.cat(parts, dim=-1)
    storage = engine.storage()
    found = {n: kinds["exp_avg"] / 0.1 for n, kinds in full_tensors(layout, storage).items()}
    assert found.keys() == measure.gradients.keys()
    difference = {
        name: (found[name] - gradient).abs().max().item()
        for name, gradient in matrices(measure.gradients).items()
    }
    extra = padding(layout, storage, topology.rank)
    engine.release()
    out = {"logits": (whole[..., : config.vocab_size] - measure.logits[mine]).abs().max().item()}
    return out | {"gradients": difference, "padding": extra, "norm": norm}


def padding(layout: Layout, storage: dict, rank: int) -> torch.Tensor:
    """All that this rank holds of the rows that no logical tensor has, after one update."""
    real = {name: torch.ones(spec.rows, spec.cols) for name, spec in layout.plan.items()}
    real = held(layout, real, rank)
    return torch.cat(
        [tensor[real[name] == 0] for name, kinds in storage.items() for tensor in kinds.values()]
    )


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


def compare_all(measures: dict, cases: list) -> list[dict[str, Any]]:
    return [compare(MODELS[which], measures[which], case) for which, case in cases]


@pytest.mark.dist
def test_logits_and_gradients_are_hugging_faces_in_every_layout(measures):
    cases = [(which, case) for which in MODELS for case in GRIDS]
    cases += [(("gqa", "tied"), case) for case in SHARDED]
    by_rank = run_ranks(WORLD, compare_all, measures, cases)
    padded = 0
    for rank, found in enumerate(by_rank):
        for (which, case), result in zip(cases, found, strict=True):
            here = (rank, which, case)
            assert result["logits"] < LIMIT, here
            assert result["norm"] == pytest.approx(norm_of(measures[which].gradients), rel=1e-5), (
                here
            )
            for name, difference in result["gradients"].items():
                assert difference < LIMIT, (*here, name)
            assert (result["padding"] == 0).all(), here
            padded += result["padding"].numel()
    assert padded > 0, "no layout padded the vocabulary: the test would prove nothing"
