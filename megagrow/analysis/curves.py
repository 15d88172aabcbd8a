"""A run's directory -> its curves: losses against FLOPs, tokens and seconds, and its growths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megagrow.analysis.flop_accounting import Account, Setting, charged, read_setting
from megagrow.analysis.run_metrics import Gauges, Score, read_gauges, read_scores
from megagrow.analysis.speedup import LossCurve
from megagrow.errors import DataError
from megagrow.evaluation.results_store import kept_files, read_kept
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics
from megagrow.train.reporting.writers import Record

SMOOTHING = 0.05
"""Training losses are averaged over this share of the run's tokens."""


@dataclass(frozen=True, slots=True)
class Series:
    """One kind of loss over a run: equally long columns, a row per measurement."""

    tokens: tuple[int, ...]
    flops: tuple[float, ...]
    """By the paper's 6 N per token; what the base cost is in it."""
    flops_true: tuple[float, ...]
    """As they are really done, attention included; what the base cost is in it."""
    seconds: tuple[float, ...]
    loss: tuple[float, ...]

    def curve(self) -> LossCurve:
        """The loss against FLOPs. Raises ValueError where nothing was measured."""
        return LossCurve(self.flops, self.loss)


@dataclass(frozen=True, slots=True)
class Growth:
    """Where in the run the model grew."""

    stage: int
    """The stage that it led to, counted from 0."""
    tokens: int
    flops: float
    flops_true: float
    seconds: float
    operator: str | None
    """The growth's, its parts joined by +; None where the record does not say."""


@dataclass(frozen=True, slots=True)
class RunCurves:
    """A finished run, as it is compared with others."""

    name: str
    seed: int
    parameters: tuple[int, ...]
    """Of each stage's model, in order."""
    tokens: int
    flops: float
    """Of all stages, by the paper's account: what the base cost is in it."""
    flops_true: float
    """As `flops`, by what is really computed."""
    seconds: float
    """Steps, growths and checkpoints."""
    train: Series
    """Smoothed, see `smooth`."""
    validation: Series
    growths: tuple[Growth, ...]
    gauges: Gauges
    scores: tuple[Score, ...]
    """What evaluations have found, during the run and of its checkpoints; often none."""
    setting: Setting | None
    """None where the run's directory has no config.yaml."""

    @property
    def whole(self) -> bool:
        """Whether all that its model has cost is in it, as far as is known. It is not in one that
        began with a model (`init_from`) or tunes one, whose FLOPs are compared with no others."""
        return self.setting is None or self.setting.whole

    @property
    def grown(self) -> bool:
        """Whether it stands for growing in comparisons."""
        return self.whole and bool(self.growths)

    @property
    def from_scratch(self) -> bool:
        """Whether it stands for training from scratch in comparisons."""
        return self.whole and not self.growths

    def spent(self, tokens: Sequence[int]) -> tuple[float, ...] | None:
        """FLOPs by the paper's charge (`accounts`) at points of the run; None where unknown."""
        if self.setting is None:
            return None
        starts = (0, *(growth.tokens for growth in self.growths))
        return tuple(charged(at, starts, self.setting.charges) for at in tokens)

    def curve(self, series: Series, account: Account) -> LossCurve | None:
        """One of the run's series against FLOPs by an account; None where that is unknown."""
        if account == "flops_charged":
            spent = self.spent(series.tokens)
        else:
            spent = series.flops if account == "flops" else series.flops_true
        return None if spent is None else LossCurve(spent, series.loss)


def load_run(directory: Path) -> RunCurves:
    """The curves of the finished run in `directory`.

    Raises InputError where there is no run, or it is unfinished or without a usable loss.
    """
    path = directory / METRICS_FILE
    try:
        return _curves(directory, path, read_metrics(path))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a record is not as it was written ({error!r})") from error


def _curves(directory: Path, path: Path, records: list[Record]) -> RunCurves:
    start = _last(records, "start")
    end = _last(records, "end")
    if start is None or end is None or end["step"] < start["run_steps"]:
        raise DataError(f"{directory}: the run is not finished; start it again and let it end")
    _check_losses(path, records)
    return RunCurves(
        name=start["name"],
        seed=start["seed"],
        parameters=tuple(start["parameters"]),
        tokens=end["tokens"],
        flops=end["flops"],
        flops_true=end["flops_true"],
        seconds=end["elapsed_seconds"],
        train=smooth(_trained(records), end["tokens"]),
        validation=_series(_kind(records, "validation")),
        growths=tuple(
            Growth(
                record["stage"],
                record["tokens"],
                record["flops"],
                record["flops_true"],
                record["elapsed_seconds"],
                record.get("operator"),
            )
            for record in _kind(records, "growth")
        ),
        gauges=read_gauges(_trained(records)),
        scores=read_scores(_kind(records, "evaluation"), _kept(directory)),
        setting=read_setting(directory),
    )


def _kept(directory: Path) -> list[Record]:
    return [read_kept(path) for path in kept_files(directory)]


def smooth(records: Sequence[Record], run_tokens: int, share: float = SMOOTHING) -> Series:
    """The training loss, each point the mean over the last `share` of the run's tokens.

    The window never reaches back over a growth: the jump there stays visible, and a stage's first
    point is its own. Records are weighted equally.
    """
    first, means = 0, []
    sums = list(accumulate((record["loss"] for record in records), initial=0.0))
    for index, record in enumerate(records):
        since = record["tokens"] - share * run_tokens
        while first < index and (
            records[first]["tokens"] <= since or records[first]["stage"] != record["stage"]
        ):
            first += 1
        means.append((sums[index + 1] - sums[first]) / (index + 1 - first))
    return _series(records, means)


def _series(records: Sequence[Record], losses: Sequence[float] | None = None) -> Series:
    return Series(
        tokens=tuple(record["tokens"] for record in records),
        flops=tuple(float(record["flops"]) for record in records),
        flops_true=tuple(float(record["flops_true"]) for record in records),
        seconds=tuple(float(record["elapsed_seconds"]) for record in records),
        loss=tuple(losses if losses is not None else (float(r["loss"]) for r in records)),
    )


def _kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _trained(records: Sequence[Record]) -> list[Record]:
    """The steps that changed something."""
    return [record for record in _kind(records, "train") if not record.get("skipped")]


def _last(records: Sequence[Record], kind: str) -> Record | None:
    return next((record for record in reversed(records) if record["kind"] == kind), None)


def _check_losses(path: Path, records: Sequence[Record]) -> None:
    trained = _trained(records)
    if not trained:
        raise DataError(f"{path}: no training loss was recorded; lower logging.interval")
    for record in trained + _kind(records, "validation"):
        if record["loss"] is None:
            raise DataError(
                f"{path}: the {record['kind']} loss at step {record['step']} is not finite; "
                "the run diverged, lower its learning rate"
            )
