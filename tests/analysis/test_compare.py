import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megagrow.analysis.compare import compare_runs, load_runs
from megagrow.analysis.flop_accounting import Setting
from megagrow.analysis.seeds import group_runs, match_groups
from megagrow.errors import InputError

SMALL, LARGE = 800_000, 3_200_000
SCRATCH = [(200, LARGE)]
GROWN = [(100, SMALL), (175, LARGE, 1.5e12)]
WORSE = [(100, SMALL), (175, LARGE, 0.0, 1.6)]


def compare(runs: list[Path], output: Path) -> tuple[str, dict]:
    console = Console(record=True, width=120, file=StringIO())
    compare_runs(load_runs(runs), output, console)
    return console.export_text(), json.loads((output / "comparison.json").read_text())


def test_speedup_has_the_known_value(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Both end at 3.84e12 FLOPs; the grown run is 1.5e12 ahead and reaches the loss at 2.34e12."""
    runs = [make_run("scratch", SCRATCH), make_run("grown", GROWN)]
    text, document = compare(runs, tmp_path / "out")
    (found,) = document["comparisons"]
    assert (found["grown"], found["scratch"]) == ("grown", "scratch")
    assert found["compared_by"] == "validation"
    assert found["flops_scratch"] == pytest.approx(3.84e12)
    assert found["flops_grown"] == pytest.approx(2.34e12, rel=1e-3)
    assert found["speedup"] == pytest.approx(3.84 / 2.34 - 1, abs=2e-3)
    assert "Speedup sp = +64.1% (39.1% fewer FLOPs): growth was faster." in text
    assert "800,000 -> 3,200,000" in text
    assert "with one seed: there are no error bars" in text


def test_slower_growth_is_reported_as_slower(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run("grown", WORSE), make_run("scratch", SCRATCH)]
    text, document = compare(runs, tmp_path / "out")
    (found,) = document["comparisons"]
    assert found["loss"] == found["final_grown"] > found["final_scratch"]
    assert found["speedup"] < -0.3
    assert "more FLOPs): growth was not faster." in text


def test_a_run_that_starts_from_a_model_is_not_compared(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """A fine-tuned model has the same size, but its run does not contain its full cost."""
    setting = Setting(config_key="tuned", charges=(1.0,), has_full_cost=False)
    names = {"tuned": SCRATCH, "scratch": SCRATCH, "grown": GROWN}
    tuned, *others = load_runs([make_run(name, stages) for name, stages in names.items()])
    tuned = replace(tuned, setting=setting)
    (found,) = compare_runs([tuned, *others], tmp_path / "out", Console(file=StringIO()))
    (matched,) = match_groups(group_runs([tuned, *others]))
    assert found.scratch.name == matched.scratch.name == "scratch"
    with pytest.raises(InputError, match="no run from scratch"):
        compare_runs([tuned, others[1]], tmp_path / "out", Console(file=StringIO()))


def test_files_are_written(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(name, stages) for name, stages in (("a", GROWN), ("b", WORSE), ("c", SCRATCH))]
    _, document = compare(runs, tmp_path / "out")
    assert [one["grown"] for one in document["comparisons"]] == ["a", "b"]
    assert (tmp_path / "out/loss_vs_flops.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "out/comparison.md").read_text()
    assert "|  | a | b | c |" in written
    assert "![loss](loss_vs_flops.png)" in written


def test_runs_of_one_name_get_their_path(make_run: Callable[..., Path], tmp_path: Path) -> None:
    scratch, grown = make_run("scratch", SCRATCH), make_run("grown", GROWN)
    path = scratch / "metrics.jsonl"
    path.write_text(path.read_text().replace('"name": "scratch"', '"name": "grown"'))
    _, document = compare([grown, scratch], tmp_path / "out")
    assert [run["name"] for run in document["runs"]] == [f"grown ({grown})", f"grown ({scratch})"]


def test_training_loss_is_used_without_validation(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("scratch", SCRATCH), make_run("grown", GROWN)]
    for run in runs:
        path = run / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines(True) if '"validation"' not in line]
        path.write_text("".join(kept))
    text, document = compare(runs, tmp_path / "out")
    assert document["comparisons"][0]["compared_by"] == "training"
    assert document["comparisons"][0]["speedup"] == pytest.approx(0.64, abs=0.03)
    assert "Final training loss: grown" in text


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([SCRATCH, SCRATCH], "none of the runs grew"),
        ([GROWN], "grown0: no run from scratch with the same 3,200,000 parameters"),
        ([GROWN, [(200, SMALL)]], "no run from scratch with the same 3,200,000 parameters"),
    ],
)
def test_runs_without_a_counterpart_raise(
    stages: list, message: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run(f"grown{index}", one) for index, one in enumerate(stages)]
    with pytest.raises(InputError, match=message):
        compare_runs(load_runs(runs), tmp_path / "out", Console(quiet=True))


def test_runs_without_a_shared_loss_have_no_speedup(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """The run from scratch ends above the first loss of the grown run."""
    runs = [make_run("scratch", [(200, LARGE, 0.0, 90.0)]), make_run("grown", GROWN)]
    text, document = compare(runs, tmp_path / "out")
    assert document["comparisons"][0]["speedup"] is None
    assert "no validation loss is passed by both runs, so the speedup is undefined" in text
    assert (tmp_path / "out/loss_vs_flops.png").exists()
