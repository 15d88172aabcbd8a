"""Ablation of the optimizer state after a stacking growth: four policies for Adam's moments.

    OMP_NUM_THREADS=1 python tools/experiments/state_ablation.py --output runs/state-ablation

For each seed, the base model of the demo is trained once on the demo's corpus. It is then grown
with each policy and each learning rate schedule and trained further on the same tokens. The large
model is also trained from scratch with the same FLOPs. Writes table.md, results.json and curves.png
to the folder of the runs. Finished runs are kept; rerun the same command to resume. Each run is one
process with OMP_NUM_THREADS threads.
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
from megagrow.analysis.curves import load_curves
from megagrow.analysis.growth_transient import GrowthTransient, read_transient
from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import read_manifest
from megagrow.common.sizes import parse_count
from megagrow.config.load import load_run, to_yaml
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.data.prepare import prepare
from megagrow.errors import InputError
from megagrow.model.layers.flops import paper_flops_per_token
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
"""Steps after the growth with frequent validation, and its interval."""
INTERVAL = 35
"""Validation interval elsewhere; divides the base and a quarter of the grown stage."""
CURVE_TOKENS, ALL_TOKENS = "32K", "1M"
"""Validation tokens during training, and of the full validation set."""
CLOSE_SCORE = f"at {CLOSE_STEPS * STEP_TOKENS // 1000}K, full validation set"
END_SCORE = "end, full validation set"


@dataclass(frozen=True)
class RunSegment:
    """Part of a run with one validation interval; the next segment resumes from its checkpoint."""

    run: RunConfig
    end: int
    """Step of the last stage at which the segment ends."""
    interval: int

    @property
    def step(self) -> int:
        """Step of the run, counted over all stages, at which the segment ends."""
        return sum(stage.tokens for stage in self.shortened().stages) // STEP_TOKENS

    def shortened(self) -> RunConfig:
        """Return the run up to the end of this segment, with the schedules of the full run."""
        *before, last = self.run.stages
        last = last.model_copy(update={"tokens": self.end * STEP_TOKENS})
        stages = [_validated(stage, interval=self.interval) for stage in (*before, last)]
        return self.run.model_copy(update={"stages": stages})


def _validated(stage: StageConfig, **changes: int) -> StageConfig:
    validation = stage.validation.model_copy(update=changes)
    return stage.model_copy(update={"validation": validation})


@dataclass(frozen=True)
class StateAblation:
    """Run files of the ablation."""

    runs: Path
    corpus: Path
    beta2: float

    def directory(self, name: object, seed: int) -> Path:
        """Return the folder of a run."""
        return self.runs / f"{str(name).replace(', ', '-')}-{seed}"

    def base(self, seed: int) -> list[RunSegment]:
        """Return the segments of the small model, up to the growth."""
        run = self._grown("base", seed, [])
        return [RunSegment(run.model_copy(update={"stages": run.stages[:1]}), BASE_STEPS, INTERVAL)]

    def variant(self, seed: int, variant: Variant) -> list[RunSegment]:
        """Return the segments of the base of a seed, grown with a variant."""
        horizon = GROWN_STEPS if variant.schedule == "rewarm" else BASE_STEPS + GROWN_STEPS
        changes = [
            f"stages.1.growth.optimizer_state={variant.policy}",
            f"stages.1.growth.lr_schedule={variant.schedule}",
            f"stages.1.schedule.horizon_tokens={horizon * STEP_TOKENS}",
        ]
        run = self._grown(variant, seed, changes)
        return [
            RunSegment(run, CLOSE_STEPS, CLOSE_INTERVAL),
            RunSegment(run, GROWN_STEPS, INTERVAL),
        ]

    def scratch(self, seed: int) -> list[RunSegment]:
        """Return the segments of the large model, with the FLOPs of base and grown stage."""
        small, large = (paper_flops_per_token(s.model) for s in load_run(GSTACK).stages)
        steps = round(BASE_STEPS * small / large) + GROWN_STEPS
        run = self._load(SCRATCH, "scratch", seed, [f"tokens={steps * STEP_TOKENS}"])
        return [RunSegment(run, steps, INTERVAL)]

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
            "checkpoint.interval": 100_000,  # only at the end of a segment
            "logging.tensorboard": "false",
        }
        return load_run(file, [*(f"{key}={value}" for key, value in common.items()), *changes])


def train_all(ablation: StateAblation, seeds: Sequence[int], jobs: int) -> None:
    """Train all runs, `jobs` at a time; raise the error of the first run that fails."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, [ablation.base(seed) for seed in seeds]))
        work: list[tuple[list[RunSegment], Path | None]] = [
            (ablation.variant(seed, variant), ablation.directory("base", seed))
            for seed in seeds
            for variant in VARIANTS
        ]
        work += [(ablation.scratch(seed), None) for seed in seeds]
        list(pool.map(lambda task: train(*task), work))


def train(segments: Sequence[RunSegment], base: Path | None = None) -> None:
    """Train a run unless it is finished; a grown run starts from a copy of its base."""
    directory = segments[-1].run.output_dir
    if is_finished(directory, segments[-1]):
        return
    if base is not None and not directory.exists():
        copy = directory.with_suffix(".tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy)
        copy.rename(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.txt").open("a", encoding="utf-8") as log:
        lock(log, directory)
        for segment in segments:
            file = directory / f"until-{segment.end}.yaml"
            file.write_text(to_yaml(segment.shortened()), encoding="utf-8")
            command = [sys.executable, "-m", "megagrow", "train", str(file)]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"{directory.name}: done", flush=True)


def lock(log: IO[str], directory: Path) -> None:
    """Lock the log of a run. Raises InputError if another process holds the lock.

    The training process inherits the lock with its output. If this tool is killed and a training
    process survives, the next call does not start a second one.
    """
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{directory}: another process is training this run; wait until it ends"
        ) from error


def is_finished(directory: Path, segment: RunSegment) -> bool:
    """Return True if a run has all steps of its last segment."""
    try:
        curves = load_curves(directory)
    except InputError:
        return False
    return curves.tokens >= segment.step * STEP_TOKENS


def score(segment: RunSegment, device: torch.device) -> float:
    """Return the loss of the model at the end of a segment on the full validation set.

    The result is cached in a file.
    """
    run = segment.run
    cache = run.output_dir / f"score-{segment.step}.json"
    if cache.exists():
        return json.loads(cache.read_text(encoding="utf-8"))["loss"]
    stages = [_validated(stage, tokens=parse_count(ALL_TOKENS)) for stage in run.stages]
    inputs = open_inputs(run.model_copy(update={"stages": stages}))
    (validation,) = inputs.stages[-1].validation.values()
    path = run.output_dir / "checkpoints" / checkpoint_name(segment.step)
    manifest = read_manifest(path)
    stage = build_stage(run, len(run.stages) - 1, device)
    load_storage(path, manifest, stage.layout, stage.engine.storage())
    stage.engine.ready(manifest.adam_step)
    loss = mean_loss(stage, validation.reader, validation.sequences, masks=None)
    stage.release()
    tokens = validation.sequences * run.stages[0].data.sequence_length
    cache.write_text(json.dumps({"loss": loss, "tokens": tokens}), encoding="utf-8")
    return loss


def read_study(ablation: StateAblation, seeds: Sequence[int], scored: bool) -> Study:
    """Read the metrics of all runs. Raises InputError with the name of an incomplete run.

    With `scored`, the saved models are also evaluated on the full validation set.
    """

    def read(variant: Variant, seed: int) -> GrowthTransient:
        base = read_metrics(ablation.directory("base", seed) / METRICS_FILE)
        path = ablation.directory(variant, seed) / METRICS_FILE
        grown = [record for record in read_metrics(path) if record.get("stage") == 1]
        return read_transient([*base, *grown], CLOSE_STEPS * STEP_TOKENS, str(path))

    runs = {variant: tuple(read(variant, seed) for seed in seeds) for variant in VARIANTS}
    curves = [load_curves(ablation.directory("scratch", seed)) for seed in seeds]
    scores: dict[str, dict[Variant, tuple[float, ...]]] = {}
    scratch = {"loss at the end": tuple(run.validation.loss[-1] for run in curves)}
    if scored:
        device = init_process_group(read_launch())
        for index, name in enumerate((CLOSE_SCORE, END_SCORE)):
            scores[name] = {
                variant: tuple(
                    score(ablation.variant(seed, variant)[index], device) for seed in seeds
                )
                for variant in VARIANTS
            }
        scratch[END_SCORE] = tuple(score(ablation.scratch(seed)[-1], device) for seed in seeds)
        leave_process_group()
    return Study(tuple(seeds), runs, scores, scratch)


def main() -> None:
    """Train all runs and write the table, the numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/state-ablation"))
    parser.add_argument(
        "--corpus", type=Path, default=Path("data/stdlib"), help="created if missing"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs")
    parser.add_argument("--beta2", type=float, default=0.95, help="Adam's beta2; default: 0.95")
    parser.add_argument(
        "--scores",
        action="store_true",
        help="evaluate the saved models on the full validation set; doubles the time",
    )
    arguments = parser.parse_args()
    if not (arguments.corpus / "manifest.json").exists():
        prepare(["python-stdlib"], arguments.corpus, "train", 2048)
    ablation = StateAblation(arguments.output, arguments.corpus, arguments.beta2)
    train_all(ablation, arguments.seeds, arguments.jobs)
    study = read_study(ablation, arguments.seeds, arguments.scores)
    table = markdown(study, REFERENCE)
    (arguments.output / "table.md").write_text(table, encoding="utf-8")
    (arguments.output / "results.json").write_text(as_json(study), encoding="utf-8")
    plot(study, REFERENCE, arguments.output / "curves.png")
    print(table)


if __name__ == "__main__":
    main()
