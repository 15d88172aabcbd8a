"""Live growth in and between pipeline, context and tensor parallel layouts."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.reshard.fill import fill_initial
from megagrow.reshard.traffic import rank_volume
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, STEP_TOKENS, full_tensors, grow_live, make_run
from tests.helpers.spawn import run_ranks

STEPS, LAYERS = 10, 6
KEYS = {
    "pp": "pipeline_model_parallel_size",
    "v": "virtual_pipeline_model_parallel_size",
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "zero": "zero_stage",
}


class Growth(NamedTuple):
    """Layouts before and after a growth by stacking or interpolation."""

    before: str
    after: str
    factor: int = 2
    layer_map: str = "stack"
    sends_nothing: bool = False
    """No byte may move between pipeline ranks."""

    def run(self, folder: Path) -> RunConfig:
        model = MODEL | {"num_hidden_layers": LAYERS, "tie_word_embeddings": True}
        growth = {
            "layer_map": self.layer_map,
            "optimizer_state": "transport",
            "lr_schedule": "continue",
        }
        stages = [
            {"model": model, "parallel": parallel(self.before)},
            {
                "model": model | {"num_hidden_layers": self.factor * LAYERS},
                "parallel": parallel(self.after),
                "growth": growth,
            },
        ]
        for stage in stages:
            stage |= {"tokens": STEPS * STEP_TOKENS, "optimizer": {"lr": 2e-3}}
        return make_run(folder, stages)


def parallel(layout: str) -> dict[str, Any]:
    """`pp2 v2 zero1` as a section."""
    sizes = {"zero": 0}
    for text in layout.split():
        name = text.rstrip("0123456789")
        sizes[name] = int(text[len(name) :])
    return {KEYS[name]: size for name, size in sizes.items()}


GROWTHS = {
    2: (
        Growth("pp2", "pp2 v2", sends_nothing=True),
        Growth("pp2", "pp2 v3 zero2", factor=3, sends_nothing=True),
        Growth("pp2", "pp2", layer_map="interpolate", sends_nothing=True),
        Growth("pp2 v2", "zero1"),
        Growth("tp2 zero1", "pp2"),
        Growth("cp2 zero1", "pp2 v2"),
    ),
    4: (
        Growth("pp2 zero1", "pp2 v2 zero1", sends_nothing=True),
        Growth("pp2 tp2", "pp2 tp2 v2 zero1", sends_nothing=True),
        Growth("pp4 zero1", "pp2 cp2 zero2"),
        Growth("pp2 cp2 zero1", "tp2 zero3"),
        Growth("pp4", "pp4 v2", sends_nothing=True),
        Growth("pp4", "pp4", layer_map="interpolate"),
    ),
}
"""By the number of ranks."""


class Result(NamedTuple):
    """Outcome of a run with one growth."""

    numbers: list[float]
    """Losses and gradient norms of all steps."""
    is_stack: bool
    """The grown state is the plain stack of the tensors before it, bit by bit."""
    sent: tuple[int, int]
    """Bytes between ranks, and between pipeline ranks, by the event's counters."""
    predicted: tuple[int, int]
    """The same, by the planner."""


def grown(folder: Path, growths: tuple[Growth, ...]) -> list[Result]:
    return [grow_once(growth, growth.run(folder)) for growth in growths]


def grow_once(growth: Growth, run: RunConfig) -> Result:
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    numbers, state = train(run, stage, RunState())
    before, source, rank = full(stage), stage.layout, stage.topology.rank
    stage, report = grow_live(run, stage)
    after = full(stage)
    volume = rank_volume(rank, source, stage_growth(run, 1), stage.layout)
    total = torch.tensor([volume.bytes_sent, volume.between_pipeline_ranks])
    dist.all_reduce(total)
    state = state.after_growth(report.layers, report.operator, tokens=0, flops=0, flops_true=0)
    more, _ = train(run, stage, state)
    stage.release()
    is_stack = stacked(growth, before).keys() == after.keys() and all(
        torch.equal(after[name][kind], tensor)
        for name, kinds in stacked(growth, before).items()
        for kind, tensor in kinds.items()
    )
    sent = (report.bytes_between_ranks, report.bytes_between_pipeline_ranks)
    return Result(numbers + more, is_stack, sent, tuple(total.tolist()))


def full(stage: Stage) -> dict[str, dict[str, torch.Tensor]]:
    return full_tensors(stage.layout, stage.engine.storage())


def stacked(growth: Growth, before: dict[str, Any]) -> dict[str, Any]:
    """The grown state, from whole tensors."""
    out = {name: kinds for name, kinds in before.items() if ".layers." not in name}
    for layer in range(growth.factor * LAYERS):
        copied = layer % LAYERS if growth.layer_map == "stack" else layer // growth.factor
        start = f"model.layers.{copied}."
        for name, kinds in before.items():
            if name.startswith(start):
                out[f"model.layers.{layer}.{name.removeprefix(start)}"] = kinds
    return out


def train(run: RunConfig, stage: Stage, state: RunState) -> tuple[list[float], RunState]:
    numbers: list[float] = []
    with StepFeed(open_inputs(run).train) as feed:
        while isinstance(event := advance(run, stage, state, feed, StopSignal()), StepDone):
            numbers += [event.measure.loss, event.measure.grad_norm]
            state = event.state
    return numbers, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growth")
    Growth("", "").run(path)  # writes the corpora
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[int, str], list[float]]:
    """Losses and norms of one process, by growth factor and map."""
    kinds = {growth[2:4]: growth for each in GROWTHS.values() for growth in each}
    cases = tuple(growth._replace(before="", after="") for growth in kinds.values())
    (found,) = run_ranks(1, grown, folder, cases)
    return {growth[2:4]: each.numbers for growth, each in zip(cases, found, strict=True)}


@pytest.mark.dist
@pytest.mark.parametrize("world", GROWTHS)
def test_a_growth_between_layouts_is_a_plain_stack(world: int, folder: Path, alone: dict) -> None:
    by_rank = run_ranks(world, grown, folder, GROWTHS[world])
    for growth, *results in zip(GROWTHS[world], *by_rank, strict=True):
        assert all(result.is_stack for result in results), growth
        assert {result.sent for result in results} == {results[0].predicted}, growth
        stays = growth.sends_nothing or "pp" not in growth.after
        assert stays == (results[0].sent[1] == 0), growth
        pairs = zip(results[0].numbers, alone[growth[2:4]], strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-5, growth
