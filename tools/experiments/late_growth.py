"""Late growth from one layer, stacking and training from scratch, at equal FLOPs.

    OMP_NUM_THREADS=1 python -m tools.experiments.late_growth --output runs/late-growth

All runs have the WSD schedule: warm-up over 2% of the run, decay over the last 10%. The learning
rate of each optimizer is the best of LEARNING_RATES from scratch with the first seed. `one-layer`
is the control: the base of `late` to the end. `fixed` is the large model from scratch on the tokens
of `late`, which the mixing time requires. Writes table.md, results.json and a plot per optimizer to
the folder of the runs. Finished runs are kept; rerun the same command to resume. Each run is one
process with OMP_NUM_THREADS threads.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megagrow.analysis.curves import RunCurves, load_curves
from megagrow.analysis.growth_transient import paired_spread, spread
from megagrow.analysis.mixing import measure_mixing
from megagrow.analysis.plots import plot_runs
from megagrow.common.tables import markdown_table
from megagrow.config.load import load_run, to_yaml
from megagrow.config.model_file import load_model
from megagrow.config.schema import RunConfig
from megagrow.data.prepare import prepare
from megagrow.errors import InputError
from megagrow.model.layers.flops import paper_flops_per_token
from tools.experiments.state_ablation import lock

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 176,
}
"""Changes to the models of the demo: a quarter of their cost."""
SEQUENCES, STEP_TOKENS = 4, 4 * 256
WARMUP, DECAY = 0.02, 0.1
"""Shares of the steps of a run."""
OPTIMIZERS = ("adamw", "muon")
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TARGET = "demo-8l"
REFERENCES = ("scratch", "one-layer")
"""Arms from which the table has the differences."""


class Arm(NamedTuple):
    """One kind of run."""

    file: str
    """Run file of the demo."""
    base: str = TARGET
    """Model of the first stage."""
    share: float = 1.0
    """Share of the steps in the first stage; 1 without growth."""


ARMS = {
    "scratch": Arm("scratch"),
    "gstack": Arm("gstack", "demo-2l", 0.325),
    "late": Arm("late", "demo-1l", 0.8),
    "one-layer": Arm("scratch", "demo-1l"),
    "fixed": Arm("scratch"),
}


class Setting(NamedTuple):
    """Kind of run and optimizer; values of a setting are in the order of the seeds."""

    arm: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.optimizer}"


def flops_of(model: str) -> int:
    """Return the training FLOPs per token of one of the models, 6 N."""
    return paper_flops_per_token(load_model(model).model_copy(update=SIZES))


def steps_of(arm: str, steps: int) -> list[int]:
    """Return the steps of each stage with the FLOPs of `steps` steps from scratch.

    `fixed` has the steps of `late`.
    """
    _, base, share = ARMS[arm]
    if arm == "fixed":
        return [sum(steps_of("late", steps))]
    relative = share * flops_of(base) / flops_of(TARGET) + 1 - share
    total = round(steps / relative)
    first = round(share * total)
    return [first, total - first] if first < total else [total]


@dataclass(frozen=True)
class LateGrowth:
    """Run files of the experiment."""

    runs: Path
    corpus: Path
    steps: int
    """Steps of the run from scratch."""

    def run(self, setting: Setting, seed: int, lr: float) -> RunConfig:
        """Return one run."""
        parts = steps_of(setting.arm, self.steps)
        tokens = [count * STEP_TOKENS for count in parts]
        total = sum(tokens)
        name = f"{setting.arm}-{setting.optimizer}-{lr:g}-{seed}"
        changes: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "output_dir": self.runs / name,
            "data.train.0.path": self.corpus / "train",
            "data.validation.0.path": self.corpus / "validation",
            "data.tokenizer": self.corpus / "tokenizer.model",
            "parallel.zero_stage": 0,
            "batch": f"{{global_batch_size: {SEQUENCES}, micro_batch_size: {SEQUENCES}}}",
            "optimizer.lr": lr,
            "optimizer.min_lr": lr / 10,
            "schedule": f"{{type: wsd, warmup_tokens: {round(WARMUP * total)}, "
            f"decay_tokens: {round(DECAY * total)}}}",
            "validation": "{interval: 100000, tokens: 128K}",  # the complete set, at ends of stages
            "checkpoint.interval": 100_000,
            "logging.tensorboard": "false",
        }
        if setting.optimizer != "adamw":
            changes["optimizer.type"] = setting.optimizer
        grown = len(parts) > 1
        stages = [f"stages.{index}." if grown else "" for index in range(len(parts))]
        changes[f"{stages[0]}model"] = ARMS[setting.arm].base
        for stage, count in zip(stages, tokens, strict=True):
            changes |= {f"{stage}model.{key}": size for key, size in SIZES.items()}
            changes |= {f"{stage}at_tokens": "null"} if setting.arm == "late" else {}
            changes[f"{stage}tokens"] = count
        if grown:
            changes["stages.1.growth.lr_schedule"] = "continue"
            changes["stages.1.growth.optimizer_state"] = "null"
        file = CONFIGS / f"{ARMS[setting.arm].file}.yaml"
        return load_run(file, [f"{key}={value}" for key, value in changes.items()])


def train(run: RunConfig) -> RunCurves:
    """Train a run unless it is finished, and return its curves."""
    if not (curves := finished(run)):
        run.output_dir.mkdir(parents=True, exist_ok=True)
        file = run.output_dir / "run.yaml"
        file.write_text(to_yaml(run), encoding="utf-8")
        with (run.output_dir / "log.txt").open("a", encoding="utf-8") as log:
            lock(log, run.output_dir)
            command = [sys.executable, "-m", "megagrow", "train", str(file)]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        curves = load_curves(run.output_dir)
        print(f"{run.name}: {curves.validation.loss[-1]:.4f}", flush=True)
    return curves


def finished(run: RunConfig) -> RunCurves | None:
    """Return the curves of a run that has all its steps, else None."""
    try:
        return load_curves(run.output_dir)
    except InputError:
        return None


Results = dict[Setting, list[RunCurves]]


def train_all(
    experiment: LateGrowth, settings: Sequence[Setting], seeds: Sequence[int], jobs: int
) -> tuple[dict[str, dict[float, float]], Results]:
    """Train all runs, `jobs` at a time.

    Returns the final validation losses of the learning-rate search by optimizer, and the curves of
    each setting by seed.
    """
    optimizers = list(dict.fromkeys(setting.optimizer for setting in settings))
    with ThreadPoolExecutor(jobs) as pool:
        pairs = [(name, lr) for name in optimizers for lr in LEARNING_RATES]
        tried = pool.map(
            lambda pair: train(experiment.run(Setting("scratch", pair[0]), seeds[0], pair[1])),
            pairs,
        )
        search: dict[str, dict[float, float]] = {name: {} for name in optimizers}
        for (name, lr), curves in zip(pairs, tried, strict=True):
            search[name][lr] = curves.validation.loss[-1]
        best = {name: min(losses, key=losses.__getitem__) for name, losses in search.items()}
        work = [(setting, seed) for setting in settings for seed in seeds]
        curves_of = pool.map(
            lambda one: train(experiment.run(*one, best[one[0].optimizer])),
            work,
        )
        results: Results = {setting: [] for setting in settings}
        for (setting, _), curves in zip(work, curves_of, strict=True):
            results[setting].append(curves)
    return search, results


def final(results: Results, setting: Setting) -> list[float]:
    """Return the final validation losses of a setting."""
    return [curves.validation.loss[-1] for curves in results[setting]]


def mixing(results: Results, optimizer: str) -> list[float | None]:
    """Return the share of the tokens after the growth until `late` meets `fixed`, by seed.

    Smoothed training losses of runs on the same tokens are compared; None: not within the run.
    """
    shares: list[float | None] = []
    runs = (results[Setting(arm, optimizer)] for arm in ("late", "fixed"))
    for late, fixed in zip(*runs, strict=True):
        found = measure_mixing(late, fixed, "training")
        met = None if found is None else found.tokens
        shares.append(None if met is None else met / (late.tokens - late.growths[-1].tokens))
    return shares


def table(results: Results) -> str:
    """Return the final losses, and their paired differences from those of the REFERENCES."""
    arms = [arm for arm in REFERENCES if any(setting.arm == arm for setting in results)]
    columns = ["setting", "tokens", "FLOPs", "final validation loss"]
    rows = []
    for setting, runs in results.items():
        mean = spread(final(results, setting))
        loss = "-" if mean is None else f"{mean.mean:.4f} +- {mean.deviation:.4f}"
        differences = [interval(results, setting, arm) for arm in arms]
        row = [str(setting), f"{runs[0].tokens:,}", f"{runs[0].flops:.3e}", loss, *differences]
        rows.append(row)
    return markdown_table([*columns, *(f"minus {arm}, 95% interval" for arm in arms)], rows)


def interval(results: Results, setting: Setting, arm: str) -> str:
    """Return the mean difference from an arm and the half-width of its 95% interval.

    Differences are paired by seed, with the same optimizer; * marks intervals that exclude zero.
    """
    reference = Setting(arm, setting.optimizer)
    difference = paired_spread(final(results, setting), final(results, reference))
    if setting == reference or difference is None:
        return "-"
    mark = " *" if difference.is_clear else ""
    return f"{difference.mean:+.4f} +- {difference.margin:.4f}{mark}"


def as_json(search: dict[str, dict[float, float]], results: Results) -> str:
    """Return the numbers of the experiment."""
    document = {
        "learning_rates": search,
        "final_validation_loss": {str(one): final(results, one) for one in results},
        "mixing_share": {
            name: mixing(results, name) for name in search if Setting("fixed", name) in results
        },
    }
    return json.dumps(document, indent=1)


def main() -> None:
    """Train all runs and write the table, the numbers and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/late-growth"))
    parser.add_argument(
        "--corpus", type=Path, default=Path("data/stdlib"), help="created if missing"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=250, help="of the run from scratch")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs")
    arguments = parser.parse_args()
    if not (arguments.corpus / "manifest.json").exists():
        prepare(["python-stdlib"], arguments.corpus, "train", 2048)
    experiment = LateGrowth(arguments.output, arguments.corpus, arguments.steps)
    arms = dict.fromkeys(("scratch", *arguments.arms))
    settings = [Setting(arm, name) for arm in arms for name in arguments.optimizers]
    search, results = train_all(experiment, settings, arguments.seeds, arguments.jobs)
    (arguments.output / "table.md").write_text(table(results), encoding="utf-8")
    (arguments.output / "results.json").write_text(as_json(search, results), encoding="utf-8")
    for name in arguments.optimizers:
        drawn = [Setting(arm, name) for arm in arms if arm != "fixed"]
        plot_runs([results[one][0] for one in drawn], arguments.output / f"curves-{name}.png")
    print(table(results))


if __name__ == "__main__":
    main()
