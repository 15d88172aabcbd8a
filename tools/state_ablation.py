"""What should become of Adam's moments when a model is stacked? Four policies, measured.

    OMP_NUM_THREADS=1 python tools/state_ablation.py --output runs/state-ablation

On the demo's corpus, for every seed: the demo's base is trained once; from its end every policy
grows it with either schedule and trains on, all on the same tokens; and the large model is trained
from scratch on as many FLOPs. Writes table.md, results.json and curves.png beside the runs.
Finished runs are kept, so that the same command goes on where it was stopped. Every run is one
process; OMP_NUM_THREADS is how many cores each may use.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megagrow.analysis.aftermath import Aftermath, aftermath
from megagrow.analysis.curves import load_run as read_curves
from megagrow.analysis.variants import Study, Variant, as_json, markdown, plot
from megagrow.config.load import load_run
from megagrow.config.parameters import paper_flops_per_token
from megagrow.config.schema import RunConfig
from megagrow.config.show import to_yaml
from megagrow.data.prepare import prepare
from megagrow.errors import InputError
from megagrow.train.metrics import METRICS_FILE, read_metrics

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
GSTACK, SCRATCH = CONFIGS / "gstack.yaml", CONFIGS / "scratch.yaml"
REFERENCE = Variant("transport", "rewarm")
VARIANTS = tuple(
    Variant(policy, schedule)
    for schedule in ("rewarm", "continue")
    for policy in ("transport", "asymmetric", "keep_v", "reset")
)
STEP_TOKENS = 8 * 256  # global batch x sequence length
BASE_STEPS, GROWN_STEPS = 105, 140
CLOSE_STEPS, CLOSE_INTERVAL = 50, 5
"""Just after the growth the validation loss is measured so often ..."""
INTERVAL = 35
"""... and elsewhere so often; a divisor of a quarter of the grown stage, and of the base."""


@dataclass(frozen=True)
class Leg:
    """A part of a run with one validation interval; the next leg goes on from its checkpoint."""

    run: RunConfig
    end: int
    """Steps of the run's last stage at which the leg ends."""
    interval: int

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
            "checkpoint.interval": 100_000,  # only at the end of a leg
            "logging.tensorboard": "false",
        }
        return load_run(file, [*(f"{key}={value}" for key, value in common.items()), *changes])


def train_all(ablation: Ablation, seeds: Sequence[int], jobs: int) -> None:
    """All runs, `jobs` at a time; the first that fails ends it with its error."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, [ablation.base(seed) for seed in seeds]))
        work = [
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
    for leg in legs:
        file = directory / f"until-{leg.end}.yaml"
        file.write_text(to_yaml(leg.shortened()), encoding="utf-8")
        with (directory / "log.txt").open("a", encoding="utf-8") as log:
            command = [sys.executable, "-m", "megagrow", "train", str(file)]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"{directory.name}: done", flush=True)


def is_finished(directory: Path, leg: Leg) -> bool:
    """Whether a run has had all steps of its last leg."""
    try:
        curves = read_curves(directory)
    except InputError:
        return False
    return curves.tokens >= sum(stage.tokens for stage in leg.shortened().stages)


def read_study(ablation: Ablation, seeds: Sequence[int]) -> Study:
    """What all the runs have measured. InputError names a run that has not all of it."""

    def read(variant: Variant, seed: int) -> Aftermath:
        path = ablation.directory(variant, seed) / METRICS_FILE
        return aftermath(read_metrics(path), CLOSE_STEPS * STEP_TOKENS, str(path))

    return Study(
        tuple(seeds),
        {variant: tuple(read(variant, seed) for seed in seeds) for variant in VARIANTS},
        tuple(
            read_curves(ablation.directory("scratch", seed)).validation.loss[-1] for seed in seeds
        ),
    )


def main() -> None:
    """Corpus, runs, table, numbers and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/state-ablation"))
    parser.add_argument("--corpus", type=Path, default=Path("data/stdlib"), help="made if absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--beta2", type=float, default=0.95, help="Adam's; default: 0.95")
    given = parser.parse_args()
    if not (given.corpus / "manifest.json").exists():
        prepare(["python-stdlib"], given.corpus, "train", 2048)
    ablation = Ablation(given.output, given.corpus, given.beta2)
    train_all(ablation, given.seeds, given.jobs)
    study = read_study(ablation, given.seeds)
    table = markdown(study, REFERENCE)
    (given.output / "table.md").write_text(table, encoding="utf-8")
    (given.output / "results.json").write_text(as_json(study), encoding="utf-8")
    plot(study, REFERENCE, CLOSE_STEPS * STEP_TOKENS, given.output / "curves.png")
    print(table)


if __name__ == "__main__":
    main()
