"""Write the table of docs/reference/operators.md: properties and measurements of each operator.

    python tools/docs/operator_table.py           measure and write the table (minutes)
    python tools/docs/operator_table.py --static  update the columns that follow from the code
    python tools/docs/operator_table.py --check   exit with code 1 if one of those is out of date

Each growth of tools/docs/operators/catalogue.py is measured twice. In one process in fp64: the
largest difference of a logit, and the same after 15 further AdamW steps of both models if the
growth has an exact continuation. Through DeepSpeed on four CPU ranks, ZeRO-3 x TP 2 in fp32: the KL
divergence and the largest difference of a logit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.config.schema import RunConfig  # noqa: E402
from megagrow.growth.operators import OPERATORS, is_masked, state_policy  # noqa: E402
from megagrow.model.masks import masks_at  # noqa: E402
from megagrow.parallel.launch import read_launch  # noqa: E402
from megagrow.parallel.process_groups import init_process_group, leave_process_group  # noqa: E402
from megagrow.reshard.fill import fill_initial  # noqa: E402
from megagrow.train.data_setup import open_inputs  # noqa: E402
from megagrow.train.fault_tolerance.signals import StopSignal  # noqa: E402
from megagrow.train.growth_event.cost import Feed  # noqa: E402
from megagrow.train.growth_event.event import end_stage, grow  # noqa: E402
from megagrow.train.loop import StepDone, advance  # noqa: E402
from megagrow.train.stage import build_stage, masks_now  # noqa: E402
from megagrow.train.state_check import change, predictions  # noqa: E402
from megagrow.train.step_feed import StepFeed  # noqa: E402
from megagrow.train.train_state import RunState  # noqa: E402
from tools.docs.operators.cases import GrowthCase  # noqa: E402
from tools.docs.operators.catalogue import CATALOGUE  # noqa: E402
from tools.docs.operators.reference_training import (  # noqa: E402
    grown_weights,
    logits,
    random_ids,
    random_weights,
    trajectory_difference,
)
from tools.faults.run import write_corpora  # noqa: E402

PAGE = ROOT / "docs/reference/operators.md"
BEGIN, END = "<!-- table: written by tools/docs/operator_table.py -->\n", "<!-- end of table -->\n"
STATIC = ("operator", "source", "target sizes", "default optimizer state", "exact")
MEASURED = (
    *("max logit difference, fp64", "after 15 AdamW steps"),
    *("live, fp32: KL", "live, fp32: max logit difference"),
)
WORLD, BASE_STEPS = 4, 4
BATCH, LENGTH = 4, 16
PARALLEL = {"zero_stage": 3, "tensor_model_parallel_size": 2}
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1")

Cells = tuple[str, ...]


@dataclass(frozen=True)
class LiveDifference:
    """Change of the predictions by a live growth."""

    kl: float
    logits: float


def main() -> int:
    """Write or check the page and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="check the static columns only")
    action.add_argument("--static", action="store_true", help="keep the measured columns")
    action.add_argument("--live", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.live is not None:
        measure_live(arguments.live)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    if arguments.check or arguments.static:
        current = with_table(page, kept_cells(page))
    else:
        current = with_table(page, measured_cells())
    if not arguments.check:
        PAGE.write_text(current, encoding="utf-8")
    elif page != current:
        name = PAGE.relative_to(ROOT)
        print(f"{name} is out of date; run: python tools/docs/operator_table.py")
        return 1
    return 0


def with_table(page: str, measured: dict[str, Cells]) -> str:
    """Return the page with an up-to-date table; `measured` maps labels to measured cells."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE.name} needs the lines {BEGIN.strip()} and {END.strip()}")
    header = (*STATIC, *MEASURED)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for label, case in CATALOGUE.items():
        cells = (*static_cells(label, case), *measured.get(label, ("",) * len(MEASURED)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([before + BEGIN.strip(), *lines, END.strip() + "\n"]) + after


def kept_cells(page: str) -> dict[str, Cells]:
    """Return the measured cells of the table of a page, by label."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {cells[0].strip("`"): tuple(cells[len(STATIC) :]) for cells in rows if cells}


def static_cells(label: str, case: GrowthCase) -> Cells:
    """Return the cells that follow from the code alone."""
    operators = case.options.operator
    source, sizes = "+".join(operators), ""
    if [label] == operators:
        operator = OPERATORS[operators[0]]
        source, sizes = operator.source, operator.sizes
    exact = "yes" if case.growth.preserves_function else "no"
    if case.growth.preserves_function and is_masked(case.options):
        exact = "at mask 0"
    return f"`{label}`", source, sizes, state_policy(case.options), exact


def measured_cells() -> dict[str, Cells]:
    """Measure all growths and return the measured cells, by label."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpora(folder / "corpus")
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}")
        command = ["env", *ENVIRONMENT, sys.executable, *launcher, __file__]
        subprocess.run([*command, "--live", name], check=True)
        live = json.loads((folder / "live.json").read_text(encoding="utf-8"))
    cells = {}
    for label, case in CATALOGUE.items():
        is_exact = case.growth.scales and state_policy(case.options) == "transport"
        later = f"{trajectory_difference(case):.0e}" if is_exact else ""
        kl, logit = live[label]
        cells[label] = (f"{logit_difference(case):.0e}", later, f"{kl:.0e}", f"{logit:.0e}")
    return cells


def logit_difference(case: GrowthCase) -> float:
    """Return the largest difference of a logit of the source's vocabulary, in fp64."""
    masks = masks_at(case.source, case.target, 0, 1) if is_masked(case.options) else None
    weights = random_weights(case.source)
    ids = random_ids(case.source, length=16)
    with torch.no_grad():
        old = logits(case.source, weights, ids)
        new = logits(case.target, grown_weights(case, weights), ids, masks=masks)
    return float((old - new[..., : old.shape[-1]]).abs().max())


def measure_live(folder: Path) -> None:
    """Run all growths on one rank; rank 0 writes the differences to FOLDER/live.json."""
    init_process_group(read_launch())
    torch.set_num_threads(1)
    differences = {}
    for label, case in CATALOGUE.items():
        live = live_difference(run_of(folder, case))
        differences[label] = (live.kl, live.logits)
    if dist.get_rank() == 0:
        (folder / "live.json").write_text(json.dumps(differences), encoding="utf-8")
    leave_process_group()


def run_of(folder: Path, case: GrowthCase) -> RunConfig:
    """Return a run of a few steps that ends with this growth."""
    growth = case.options.model_dump(exclude_unset=True)
    tokens = BASE_STEPS * BATCH * LENGTH
    corpus = [{"path": folder / "corpus"}]
    common = {
        "tokens": tokens,
        "parallel": PARALLEL,
        "batch": {"global_batch_size": BATCH, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-2, "weight_decay_on": "matrices"},
        "schedule": {"type": "cosine", "warmup_steps": 3},
    }
    values = {
        "name": "operator",
        "output_dir": folder / "run",
        "data": {"train": corpus, "validation": corpus, "sequence_length": LENGTH},
        "validation": {"tokens": 256},
        "logging": {"tensorboard": False},
        "stages": [
            {"model": model_of(case.source.model_dump()), **common},
            {"model": model_of(case.target.model_dump()), "growth": growth, **common},
        ],
    }
    return RunConfig.model_validate(values)


def model_of(model: dict[str, Any]) -> dict[str, Any]:
    """Return a model with the vocabulary of the corpus, increased as in the growth.

    The initial weights are large, so that the predictions differ measurably.
    """
    return model | {"vocab_size": 90 + model["vocab_size"], "initializer_range": 0.3}


def live_difference(run: RunConfig) -> LiveDifference:
    """Train the first stage, grow, and compare the predictions before and after."""
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    state, inputs = RunState(), open_inputs(run)
    steps = StepFeed(inputs.train)
    while isinstance(event := advance(run, stage, state, steps, StopSignal()), StepDone):
        state = event.state
    fixed = inputs.stages[0].fixed
    before = predictions(stage, fixed, masks_now(run, stage, state.stage_tokens))
    feed = Feed(steps, state.next_place)
    stage, _ = grow(run, end_stage(stage), feed)
    difference = change(before, predictions(stage, fixed, masks_now(run, stage, 0)))
    stage.release()
    return LiveDifference(max(0.0, difference.kl), difference.logits)


if __name__ == "__main__":
    sys.exit(main())
