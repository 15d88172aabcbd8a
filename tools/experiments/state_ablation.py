"""What should become of Adam's moments when a model is stacked? Four policies, measured.

    OMP_NUM_THREADS=1 python tools/experiments/state_ablation.py --output runs/state-ablation

On the demo's corpus, for every seed: the demo's base is trained once; from its end every policy
grows it with either schedule and trains on, all on the same tokens; and the large model is trained
from scratch on as many FLOPs. Writes table.md, results.json and curves.png beside the runs.
Finished runs are kept, so that the same command goes on where it was stopped. Every run is one
process; OMP_NUM_THREADS is how many cores each may use.
"""

import argparse
import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from megagrow.analysis.ablation import Study, Variant, as_json, markdown, plot
from megagrow.analysis.curves import load_run as read_curves
from megagrow.analysis.growth_transient import GrowthTransient, read_transient
from megagrow.checkpoint.files import checkpoint_name
from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import read_manifest
from megagrow.common.sizes import parse_count
from megagrow.config.flops import paper_flops_per_token
from megagrow.config.load import load_run, to_yaml
from megagrow.config.schema import RunConfig
from megagrow.data.prepare import prepare
from megagrow.errors import InputError
from megagrow.parallel.launch import read_launch
from megagrow.parallel.process_groups import init_process_group, leave_process_group
from megagrow.train.data_setup import open_inputs
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics
from megagrow.train.stage import build_stage
from megagrow.train.step import mean_loss

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"
GSTACK, SCRATCH = CONFIGS / "gstack.yaml", CONFIGS / "scratch.yaml"
REFERENCE = Variant("transport", "rewarm")
VARIANTS = tuple(
    Variant(policy, schedule)
    for schedule in ("rewarm", "continue")
    for policy in ("transport", "asymmetric", "keep_second_moment", "reset")
)
STEP_TOKENS = 8 * 256  # global batch x sequence length
BASE_STEPS, GROWN_STEPS = 105, 140
CLOSE_STEPS, CLOSE_INTERVAL = 50, 5
"""Just after the growth the validation loss is measured so often ..."""
INTERVAL = 35
"""... and elsewhere so often; a divisor of a quarter of the grown stage, and of the base."""
CURVE_TOKENS, ALL_TOKENS = "32K", "1M"
"""Validation text while training, and for the scores of saved models: all that there is."""
CLOSE_SCORE, END_SCORE = f"at {CLOSE_STEPS * STEP_TOKENS // 1000}K, all text", "end, all text"


@dataclass(frozen=True)
class Leg:
    """A part of a run with one validation interval; the next leg goes on from its checkpoint."""

    run: RunConfig
    end: int
    """Steps of the run's last stage at which the leg ends."""
    interval: int

    @property
    def step(self) -> int:
        """The step of the run, all stages together, at which the leg ends."""
        return sum(stage.tokens for stage in self.shortened().stages) // STEP_TOKENS

    def shortened(self) -> RunConfig:
        """The run up to the end of this leg. Its schedules are those of the whole run."""
        *before, last = self.run.stages
        last = last.model_copy(update={"tokens": self.end * STEP_TOKENS})
        validation = self.run.validation.model_copy(update={"interval": self.interval})
        return self.run.model_copy(update={"stages": [*before, last], "validation": validation})


@dataclass(frozen=True)
class Ablation:
    """Where everything is, and Adam's beta2."""

    runs: Path
    corpus: Path
    beta2: float

    def directory(self, name: object, seed: int) -> Path:
        """Where a run is kept."""
        return self.runs / f"{str(name).replace(', ', '-')}-{seed}"

    def base(self, seed: int) -> list[Leg]:
        """The small model, until the growth."""
        run = self._grown("base", seed, [])
        return [Leg(run.model_copy(update={"stages": run.stages[:1]}), BASE_STEPS, INTERVAL)]

    def variant(self, seed: int, variant: Variant) -> list[Leg]:
        """The base of the same seed, grown."""
        horizon = GROWN_STEPS if variant.schedule == "rewarm" else BASE_STEPS + GROWN_STEPS
        changes = [
            f"stages.1.growth.optimizer_state={variant.policy}",
            f"stages.1.growth.lr_schedule={variant.schedule}",
            f"stages.1.schedule.horizon_tokens={horizon * STEP_TOKENS}",
        ]
        run = self._grown(variant, seed, changes)
        return [Leg(run, CLOSE_STEPS, CLOSE_INTERVAL), Leg(run, GROWN_STEPS, INTERVAL)]

    def scratch(self, seed: int) -> list[Leg]:
        """The large model from the start, on the FLOPs of base and grown stage together."""
        small, large = (paper_flops_per_token(s.model) for s in load_run(GSTACK).stages)
        steps = round(BASE_STEPS * small / large) + GROWN_STEPS
        run = self._load(SCRATCH, "scratch", seed, [f"tokens={steps * STEP_TOKENS}"])
        return [Leg(run, steps, INTERVAL)]

    def _grown(self, name: object, seed: int, changes: list[str]) -> RunConfig:
        sizes = [
            f"stages.0.tokens={BASE_STEPS * STEP_TOKENS}",
            f"stages.1.tokens={GROWN_STEPS * STEP_TOKENS}",
            f"stages.0.schedule.horizon_tokens={(BASE_STEPS + GROWN_STEPS) * STEP_TOKENS}",
        ]
        return self._load(GSTACK, name, seed, sizes + changes)

    def _load(self, file: Path, name: object, seed: int, changes: list[str]) -> RunConfig:
        directory = self.directory(name, seed)
        common = {
            "name": directory.name,
            "seed": seed,
            "output_dir": directory,
            "data.train.0.path": self.corpus / "train",
            "data.validation.0.path": self.corpus / "validation",
            "data.tokenizer": self.corpus / "tokenizer.model",
            "batch.micro_batch_size": 8,
            "optimizer.betas": f"[0.9, {self.beta2}]",
            "validation.tokens": CURVE_TOKENS,
            "checkpoint.interval": 100_000,  # only at the end of a leg
            "logging.tensorboard": "false",
        }
        return load_run(file, [*(f"{key}={value}" for key, value in common.items()), *changes])


def train_all(ablation: Ablation, seeds: Sequence[int], jobs: int) -> None:
    """All runs, `jobs` at a time; the first that fails ends it with its error."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, [ablation.base(seed) for seed in seeds]))
        work: list[tuple[list[Leg], Path | None]] = [
            (ablation.variant(seed, variant), ablation.directory("base", seed))
            for seed in seeds
            for variant in VARIANTS
        ]
        work += [(ablation.scratch(seed), None) for seed in seeds]
        list(pool.map(lambda task: train(*task), work))


def train(legs: Sequence[Leg], base: Path | None = None) -> None:
    """Trains a run unless it is finished; one that grows begins with a copy of its base."""
    directory = legs[-1].run.output_dir
    if is_finished(directory, legs[-1]):
        return
    if base is not None and not directory.exists():
        copy = directory.with_suffix(".tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy)
        copy.rename(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.txt").open("a", encoding="utf-8") as log:
        claim(log, directory)
        for leg in legs:
            file = directory / f"until-{leg.end}.yaml"
            file.write_text(to_yaml(leg.shortened()), encoding="utf-8")
            command = [sys.executable, "-m", "megagrow", "train", str(file)]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"{directory.name}: done", flush=True)


def claim(log: IO[str], directory: Path) -> None:
    """Locks a run's log. What is trained holds the lock too, for it writes there: where this tool
    was killed and a training process was left behind, the next call does not train beside it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{directory}: another process is training this run; wait for it"
        ) from error


def is_finished(directory: Path, leg: Leg) -> bool:
    """Whether a run has had all steps of its last leg."""
    try:
        curves = read_curves(directory)
    except InputError:
        return False
    return curves.tokens >= leg.step * STEP_TOKENS


def score(leg: Leg, device: torch.device) -> float:
    """The loss, on all validation text, of the model saved at the end of a leg; kept in a file."""
    run = leg.run
    kept = run.output_dir / f"score-{leg.step}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))["loss"]
    changed = run.validation.model_copy(update={"tokens": parse_count(ALL_TOKENS)})
    inputs = open_inputs(run.model_copy(update={"validation": changed}))
    assert inputs.validation is not None
    path = run.output_dir / "checkpoints" / checkpoint_name(leg.step)
    manifest = read_manifest(path)
    stage = build_stage(run, len(run.stages) - 1, device)
    load_storage(path, manifest, stage.layout, stage.engine.storage())
    stage.engine.ready(manifest.adam_step)
    loss = mean_loss(stage, inputs.validation, inputs.validation_sequences, masks=None)
    stage.release()
    tokens = inputs.validation_sequences * run.data.sequence_length
    kept.write_text(json.dumps({"loss": loss, "tokens": tokens}), encoding="utf-8")
    return loss


def read_study(ablation: Ablation, seeds: Sequence[int], scored: bool) -> Study:
    """What all the runs have measured. InputError names a run that has not all of it.

    If `scored`, the models that they have saved are also judged on all validation text.
    """

    def read(variant: Variant, seed: int) -> GrowthTransient:
        base = read_metrics(ablation.directory("base", seed) / METRICS_FILE)
        path = ablation.directory(variant, seed) / METRICS_FILE
        grown = [record for record in read_metrics(path) if record.get("stage") == 1]
        return read_transient([*base, *grown], CLOSE_STEPS * STEP_TOKENS, str(path))

    runs = {variant: tuple(read(variant, seed) for seed in seeds) for variant in VARIANTS}
    curves = [read_curves(ablation.directory("scratch", seed)) for seed in seeds]
    scores: dict[str, dict[Variant, tuple[float, ...]]] = {}
    scratch = {"loss at the end": tuple(run.validation.loss[-1] for run in curves)}
    if scored:
        device = init_process_group(read_launch())
        for leg, name in enumerate((CLOSE_SCORE, END_SCORE)):
            scores[name] = {
                variant: tuple(
                    score(ablation.variant(seed, variant)[leg], device) for seed in seeds
                )
                for variant in VARIANTS
            }
        scratch[END_SCORE] = tuple(score(ablation.scratch(seed)[-1], device) for seed in seeds)
        leave_process_group()
    return Study(tuple(seeds), runs, scores, scratch)


def main() -> None:
    """Corpus, runs, table, numbers and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/state-ablation"))
    parser.add_argument("--corpus", type=Path, default=Path("data/stdlib"), help="made if absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--beta2", type=float, default=0.95, help="Adam's; default: 0.95")
    parser.add_argument(
        "--scores",
        action="store_true",
        help="judge the saved models on all validation text too, which takes as long again",
    )
    given = parser.parse_args()
    if not (given.corpus / "manifest.json").exists():
        prepare(["python-stdlib"], given.corpus, "train", 2048)
    ablation = Ablation(given.output, given.corpus, given.beta2)
    train_all(ablation, given.seeds, given.jobs)
    study = read_study(ablation, given.seeds, given.scores)
    table = markdown(study, REFERENCE)
    (given.output / "table.md").write_text(table, encoding="utf-8")
    (given.output / "results.json").write_text(as_json(study), encoding="utf-8")
    plot(study, REFERENCE, given.output / "curves.png")
    print(table)


if __name__ == "__main__":
    main()
