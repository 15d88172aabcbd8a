"""Measures every growth operator and writes the table of docs/reference/operators.md.

    python tools/docs/operator_table.py

Each operator grows the small model of tests/helpers/growth/catalogue.py: in one process in fp64,
where the
largest difference of a logit is measured, and for growths that can be followed exactly also after
15 further AdamW steps of both models; and live through DeepSpeed on four ranks, ZeRO-3 x TP 2 in
fp32, where the loss, the KL divergence and the logits before and after are compared.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # the tests measure; they are no package

from megagrow.config.schema import RunConfig  # noqa: E402
from megagrow.growth.mask_schedule import is_masked  # noqa: E402
from megagrow.growth.operators import OPERATORS, state_policy  # noqa: E402
from megagrow.model.masks import masks_at  # noqa: E402
from megagrow.train.data_setup import open_inputs  # noqa: E402
from megagrow.train.fault_tolerance.signals import StopSignal  # noqa: E402
from megagrow.train.growth_event.cost import Feed  # noqa: E402
from megagrow.train.growth_event.event import end_stage, grow  # noqa: E402
from megagrow.train.growth_event.function_check import change, predictions  # noqa: E402
from megagrow.train.loop import StepDone, advance  # noqa: E402
from megagrow.train.stage import masks_now  # noqa: E402
from megagrow.train.train_state import RunState  # noqa: E402
from tests.helpers.growth.cases import Case  # noqa: E402
from tests.helpers.growth.catalogue import CATALOGUE  # noqa: E402
from tests.helpers.growth.computing import (  # noqa: E402
    grown_weights,
    logits,
    random_ids,
    random_weights,
)
from tests.helpers.growth.trajectories import diverged  # noqa: E402
from tests.helpers.runs import STEP_TOKENS, make_run  # noqa: E402
from tests.helpers.spawn import run_ranks  # noqa: E402
from tests.helpers.train.starting import start  # noqa: E402

PAGE = ROOT / "docs/reference/operators.md"
BEGIN, END = "<!-- table: written by tools/docs/operator_table.py -->\n", "<!-- end of table -->\n"
WORLD, BASE_STEPS = 4, 4
PARALLEL = {"zero_stage": 3, "tensor_model_parallel_size": 2}


@dataclass(frozen=True)
class Live:
    """What a growth through the real engine changed."""

    kl: float
    logits: float


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_of(Path(folder), name) for name in CATALOGUE]
        live = run_ranks(WORLD, all_grown_live, runs, timeout=1800)[0]
    rows = [row(name, found) for name, found in zip(CATALOGUE, live, strict=True)]
    head = [
        "| growth | from | moments by default | exact | logits, fp64 | after 15 AdamW steps | "
        "live, fp32: KL | live: logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([*head, *rows]) + "\n"
    PAGE.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    print(table)


def row(name: str, live: Live) -> str:
    """A line of the table."""
    found = CATALOGUE[name]
    operators = found.options.operator
    source = OPERATORS[operators[0]].source if [name] == operators else "+".join(operators)
    exact = "no" if not found.growth.preserves_function else "yes"
    if found.growth.preserves_function and is_masked(found.options):
        exact = "at mask 0"
    policy = state_policy(found.options)
    may_follow = found.growth.scales and policy == "transport"
    follows = f"{diverged(found):.0e}" if may_follow else ""
    return (
        f"| `{name}` | {source} | {policy} | {exact} | {difference(found):.0e} | {follows} "
        f"| {live.kl:.0e} | {live.logits:.0e} |"
    )


def difference(found: Case) -> float:
    """The largest difference of a logit of the source's vocabulary, in fp64."""
    masks = masks_at(found.source, found.target, 0, 1) if is_masked(found.options) else None
    weights = random_weights(found.source)
    ids = random_ids(found.source, length=16)
    with torch.no_grad():
        old = logits(found.source, weights, ids)
        new = logits(found.target, grown_weights(found, weights), ids, masks=masks)
    return float((old - new[..., : old.shape[-1]]).abs().max())


def run_of(folder: Path, name: str) -> RunConfig:
    """A run of a few steps that ends in this growth."""
    found = CATALOGUE[name]
    growth = found.options.model_dump(exclude_unset=True)
    sizes = {"parallel": PARALLEL, "tokens": BASE_STEPS * STEP_TOKENS}
    stages = [
        {"model": vocabulary_of_corpus(found.source.model_dump()), **sizes},
        {"model": vocabulary_of_corpus(found.target.model_dump()), "growth": growth, **sizes},
    ]
    return make_run(folder, stages)


def vocabulary_of_corpus(model: dict) -> dict:
    """The model with the vocabulary of the tests' corpus, and what that was grown by. Large initial
    weights, so that differences of predictions show."""
    return model | {"vocab_size": 90 + model["vocab_size"], "initializer_range": 0.3}


def all_grown_live(runs: list[RunConfig]) -> list[Live]:
    """Trains and grows each run, on all ranks together."""
    return [grown_live(run) for run in runs]


def grown_live(run: RunConfig) -> Live:
    """Trains the base, grows it, and compares what both predict."""
    stage, state, inputs = start(run), RunState(), open_inputs(run)
    while isinstance(event := advance(run, stage, state, inputs.train, StopSignal()), StepDone):
        state = event.state
    before = predictions(stage, inputs.fixed, masks_now(run, stage, state.stage_step))
    feed = Feed(inputs.train, state.counters.tokens, run.data.sequence_length)
    stage, _ = grow(run, end_stage(stage), feed)
    found = change(before, predictions(stage, inputs.fixed, masks_now(run, stage, 0)))
    stage.release()
    return Live(max(0.0, found.kl), found.logits)


if __name__ == "__main__":
    main()
