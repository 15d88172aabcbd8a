"""Report of a few runs: the page, the Markdown file, the JSON document and the plots."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import InputError
from tests.helpers.analysis.images import colors
from tests.helpers.analysis.records import append
from tests.helpers.source_tree import ROOT

LARGE = 3_200_000
SCRATCH = [(100, LARGE)]
GROWN = [(50, 800_000), (88, LARGE, 0.75e12)]
EVIL = '<script src="http://evil.example/x.js"></script>[/b]|$a^^_b$\x1b[2J' + "x" * 300


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def run_report(runs: list[Path], *options: str) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, runs), *options])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def report(runs: list[Path], output: Path) -> tuple[Page, dict[str, Any]]:
    """Return the page and the document."""
    run_report(runs, "--output", str(output))
    page = Page((output / "report.html").read_text(encoding="utf-8"))
    return page, json.loads((output / "report.json").read_text(encoding="utf-8"))


def renamed(run: Path, name: str, seed: int = 1) -> Path:
    path = run / "metrics.jsonl"
    text = path.read_text().replace(f'"name": "{run.name}"', f'"name": {name}', 1)
    path.write_text(text.replace('"seed": 1,', f'"seed": {seed},', 1))
    return run


def test_page_is_self_contained_and_escapes_texts(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [renamed(make_run("grown", GROWN), json.dumps(EVIL)), make_run("scratch", SCRATCH)]
    append(runs[0], kind="samples", samples=[{"prompt": EVIL, "text": f"a\n\tb{EVIL}"}])
    printed = run_report(runs, "--output", str(tmp_path / "out"))
    source = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    page, shown = Page(source), EVIL.replace("\x1b", r"\x1b")
    assert f"a    b{shown}" in page.text
    assert shown in page.text and shown in printed
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in source
    assert set(re.findall(r"url\((.)", source)) == {"#"}
    images = [attributes for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(images) == 10
    assert all(len(image["aria-label"] or "") > 20 for image in images)
    markdown = (tmp_path / "out/report.md").read_text()
    assert "<script" not in markdown and "&lt;script" in markdown
    assert r"&lt;/script>[/b]\|$a^^_b$\x1b[2Jxx" in markdown
    assert imread(tmp_path / "out/loss.png").shape[1] < 4000


def test_conclusion_is_first_and_contains_the_numbers(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Both end at 1.92e12 FLOPs; the grown run is 0.75e12 ahead and reaches the loss at 1.17e12."""
    runs = [make_run("grown", GROWN), make_run("scratch", SCRATCH)]
    for run in runs:
        append(run, kind="evaluation", results={"sciq": {"acc": 0.75}}, average=0.75)
    page, document = report(runs, tmp_path / "out")
    order = [tag for tag, attributes in page.tags if tag in ("h1", "p", "h2", "table")]
    assert order[:3] == ["h1", "p", "h2"]
    sp = next(row for row in document["speedups"] if row["account"] == "flops")
    assert sp["speedup"] == pytest.approx(1.92 / 1.17 - 1, abs=4e-3)
    assert sp["flops_saved"] == pytest.approx(1 - 1.17 / 1.92, abs=2e-3)
    first, better, *_, speedup = document["conclusion"]
    losses = [run["validation_loss"] for run in document["runs"]]
    assert first == f"Final validation loss: grown {losses[0]:.4f}, scratch {losses[1]:.4f}."
    assert better.startswith("grown has the lower loss at equal FLOPs (by ")
    assert f"speedup sp = {sp['speedup']:+.1%}" in speedup
    assert " ".join(document["conclusion"]) in page.text
    assert document["missing"] == [
        "Every setting was run with one seed: there are no error bars.",
    ]
    markdown = (tmp_path / "out/report.md").read_text()
    rows = {line.split(" | ")[0]: line for line in markdown.splitlines()}
    assert "800,000 -> 3,200,000 | 138 | 138,000 | 1.930e+12 | 1.930e+12" in markdown
    assert "a run directory has no config.yaml" in markdown
    assert rows["| sciq"] == "| sciq | acc | 0.7500 | 0.7500 |"
    names = ["loss-flops", "loss-tokens", "loss-seconds", "speedup", "spikes", "accuracy-seconds"]
    for name in names:
        assert "#d55e00" in (tmp_path / f"out/{name}.svg").read_text(), name
    assert {"#D55E00", "#0072B2"} <= colors(tmp_path / "out/loss.png")


def test_each_validation_set_has_its_losses(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """A set added later does not change the curve of the first one."""
    run = make_run("scratch", SCRATCH)
    path = run / "metrics.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    last = [record for record in written if record["kind"] == "validation"][-1]
    last["losses"] = {"validation": last["loss"], "code": 1.25}
    path.write_text("".join(json.dumps(record) + "\n" for record in written))
    page, document = report([run], tmp_path / "out")
    (found,) = document["runs"]
    assert found["validation_loss"] == last["loss"]
    assert found["validation_losses"] == last["losses"]
    assert "| code | 1.2500 |" in (tmp_path / "out/report.md").read_text()
    assert "Last validation losses" in page.text


def test_one_run_without_growth_gets_a_report(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run("scratch", SCRATCH)
    environment = {
        "started": "2026-03-01T12:30:00+01:00",
        "hardware": {"device": "NVIDIA H100", "ranks": 8},
        "packages": {"torch": "2.13.0", "megagrow": None},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    page, document = report([run], tmp_path / "out")
    loss = document["runs"][0]["validation_loss"]
    assert document["conclusion"] == [
        f"Final validation loss of scratch: {loss:.4f} after 100.0k tokens, 1.92e+12 FLOPs and "
        "50s of training."
    ]
    assert (document["missing"], document["equal_cost"], document["speedups"]) == ([], [], [])
    assert document["runs"][0]["started"] == "2026-03-01T11:30:00+00:00"
    for text in ("2026-03-01 11:30 UTC", "NVIDIA H100, 8 ranks", "torch 2.13.0"):
        assert text in page.text
    assert "mean of the last 5% of tokens; faint: each step" in page.text
    assert "prefers-color-scheme: dark" in (tmp_path / "out/report.html").read_text()


def test_unfinished_and_unmatched_runs_are_reported_as_missing(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run("half", [(50, 800_000), (88, LARGE)], end=False)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"run_steps": 138', '"run_steps": 1380'))
    page, document = report([run], tmp_path / "out")
    assert document["conclusion"][0].startswith("Latest validation loss of half")
    assert document["missing"] == [
        "half is not finished: step 138 of 1,380.",
        "The speedup of half is unknown: add a run from scratch with the same 3,200,000 "
        "parameters.",
    ]
    assert "138 of 1,380" in page.text


def test_a_run_that_starts_from_a_model_is_not_compared(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("grown", GROWN), make_run("tuned", SCRATCH)]
    text = (ROOT / "configs/demo/scratch.yaml").read_text()
    (runs[1] / "config.yaml").write_text(f"{text}\ninit_from: elsewhere\n")
    _, document = report(runs, tmp_path / "out")
    assert document["equal_cost"] == document["speedups"] == []
    assert (
        "tuned does not contain the training cost of its initial model and is not compared."
        in document["missing"]
    )


def test_seeds_get_an_error_bar(make_run: Callable[..., Path], tmp_path: Path) -> None:
    slower = [(50, 800_000), (88, LARGE, 0.6e12)]
    runs = [
        make_run("grown", GROWN),
        renamed(make_run("again", slower), '"again"', seed=2),
        make_run("scratch", SCRATCH),
    ]
    page, document = report(runs, tmp_path / "out")
    assert "grown (2 seeds)" in page.text
    assert re.search(r"\+4\d\.\d% to \+6\d\.\d%, s\.d\. \d+\.\d%, 2 pairs", page.text)
    assert "no error bar" not in page.text
    assert [len(one["losses"]) for one in document["equal_cost"][0]["settings"]] == [2, 1]


def test_runs_of_one_name_get_their_path(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run("grown", GROWN), renamed(make_run("scratch", SCRATCH), '"grown"')]
    _, document = report(runs, tmp_path / "out")
    assert [run["name"] for run in document["runs"]] == [f"grown ({run})" for run in runs]


def test_training_loss_is_used_without_validation(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("scratch", SCRATCH), make_run("grown", GROWN)]
    path = runs[0] / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines(True) if '"validation"' not in line]
    path.write_text("".join(kept))
    _, document = report(runs, tmp_path / "out")
    assert document["speedups"][0]["compared_by"] == "training"
    assert document["conclusion"][0].startswith("Final training loss: scratch ")
    assert document["missing"][0].startswith("scratch has fewer than two validation losses")


def test_runs_without_a_shared_loss_get_a_page(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("grown", GROWN), make_run("scratch", [(100, LARGE, 0.0, 90.0)])]
    page, document = report(runs, tmp_path / "out")
    assert any("so the speedup is undefined" in line for line in document["missing"])
    assert document["speedups"][0]["speedup"] is None
    assert "undefined" in page.text
    assert not (tmp_path / "out/speedup.svg").exists()
    assert (tmp_path / "out/memory-bytes.svg").exists()


def test_json_is_printed_without_files(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run("grown", GROWN), make_run("scratch", SCRATCH)]
    monkeypatch.chdir(tmp_path)
    printed = json.loads(run_report(runs, "--json"))
    assert not (tmp_path / "report").exists()
    assert "Page: report/report.html" in run_report(runs)
    assert printed == json.loads((tmp_path / "report/report.json").read_text())
    page = (ROOT / "docs/guides/reports.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_]+)`", page))
    inner = [printed[key][0] for key in ("runs", "equal_cost", "speedups")]
    inner += [printed["runs"][0]["growths"][0], inner[1]["settings"][0], printed]
    assert {key for value in inner for key in value} <= described


def test_folder_without_records_raises(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/metrics\.jsonl: no such file; give the directory"):
        report([tmp_path / "empty"], tmp_path / "out")
