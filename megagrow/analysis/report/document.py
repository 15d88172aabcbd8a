"""JSON document of a report, with the numbers of its page (docs/guides/reports.md)."""

from dataclasses import asdict
from typing import Any

from megagrow.analysis.curves import SMOOTHING, RunCurves
from megagrow.analysis.growth_transient import spikes
from megagrow.analysis.report.content import Report
from megagrow.analysis.seeds import Matchup

FORMAT = 1


def as_document(report: Report) -> dict[str, Any]:
    """Return a report as JSON values; unknown values are None."""
    return {
        "format": FORMAT,
        "conclusion": report.conclusion,
        "missing": report.missing,
        "smoothing": SMOOTHING,
        "runs": [_run(run) for run in report.runs],
        "equal_cost": [
            {
                "axis": one.axis,
                "at": one.at,
                "settings": [
                    {"name": group.name, "losses": group.losses, "mean": group.mean}
                    for group in one.groups
                ],
            }
            for one in report.equal_costs
        ],
        "speedups": [row for matchup in report.matchups for row in _speedups(matchup)],
        "mixing_times": [
            {
                "grown": mixing.matchup.grown.name,
                "fixed_size": mixing.matchup.scratch.name,
                "compared_by": mixing.matchup.kind,
                "growth_tokens": mixing.matchup.grown.runs[0].growths[-1].tokens,
                "mixing_tokens": mixing.tokens,
                "pairs": [asdict(pair) for pair in mixing.pairs],
            }
            for mixing in report.mixing_times
        ],
    }


def _run(run: RunCurves) -> dict[str, Any]:
    return {
        "name": run.name,
        "directory": str(run.directory),
        "seed": run.seed,
        "parameters": run.parameters,
        "step": run.step,
        "planned_steps": run.planned_steps,
        "finished": run.finished,
        "tokens": run.tokens,
        "flops": run.flops,
        "flops_true": run.flops_true,
        "seconds": run.seconds,
        "training_loss": run.train.loss[-1],
        "validation_loss": run.validation.loss[-1] if run.validation.loss else None,
        "validation_losses": {name: each.loss[-1] for name, each in run.validation_sets.items()},
        "evaluation": run.scores[-1].results if run.scores else None,
        "accuracy": run.scores[-1].average if run.scores else None,
        "growths": _growths(run),
        "samples": asdict(run.samples) if run.samples else None,
        "started": run.origin.started.isoformat() if run.origin.started else None,
        "device": run.origin.device,
        "ranks": run.origin.ranks,
        "versions": dict(run.origin.versions),
    }


def _growths(run: RunCurves) -> list[dict[str, Any]]:
    measured = {spike.growth: spike for spike in spikes(run)}
    rows = []
    for growth in run.growths:
        spike = measured.get(growth)
        rows.append(
            asdict(growth)
            | {
                "loss_before": spike.before if spike else None,
                "peak_loss": spike.peak if spike else None,
                "recovery_tokens": spike.recovery_tokens if spike else None,
            }
        )
    return rows


def _speedups(matchup: Matchup) -> list[dict[str, Any]]:
    """Return the speedup at the lowest shared loss by each account; None if it is undefined."""
    rows = []
    for account, levels in matchup.levels.items():
        level = levels[-1] if levels else None
        rows.append(
            {
                "grown": matchup.grown.name,
                "scratch": matchup.scratch.name,
                "compared_by": matchup.kind,
                "account": account,
                "loss": level.loss if level else None,
                "speedup": level.mean if level else None,
                "speedups": level.speedups if level else None,
                "deviation": level.deviation if level else None,
                "flops_saved": level.saved if level else None,
            }
        )
    return rows
