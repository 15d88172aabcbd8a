"""Report of a few runs: contents of the page, the Markdown file and the plots."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from megagrow.analysis.report import write_report
from megagrow.errors import InputError
from tests.helpers.analysis.images import colors
from tests.helpers.analysis.records import append

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


def report(runs: list[Path], output: Path) -> Page:
    write_report(runs, output, Console(width=900))
    return Page((output / "report.html").read_text(encoding="utf-8"))


def renamed(run: Path, name: str, seed: int = 1) -> Path:
    path = run / "metrics.jsonl"
    text = path.read_text().replace(f'"name": "{run.name}"', f'"name": {name}', 1)
    path.write_text(text.replace('"seed": 1,', f'"seed": {seed},', 1))
    return run


def test_page_is_self_contained_and_escapes_names(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [renamed(make_run("grown", GROWN), json.dumps(EVIL)), make_run("scratch", SCRATCH)]
    page = report(runs, tmp_path / "out")
    assert EVIL.replace("\x1b", r"\x1b") in page.text
    assert EVIL.replace("\x1b", r"\x1b") in capsys.readouterr().out
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    assert all(len(image["alt"] or "") > 30 for image in images)
    style = (tmp_path / "out/report.html").read_text().split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    for name in ("report.md", "comparison.md"):
        markdown = (tmp_path / "out" / name).read_text()
        assert "<script" not in markdown and "&lt;script" in markdown
        assert r"&lt;/script>[/b]\|$a^^_b$\x1b[2Jxx" in markdown
    plot = imread(tmp_path / "out/loss_vs_flops.png")
    assert plot.shape[1] < 4000


def test_run_table_is_first_and_contains_the_numbers(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Both end at 1.92e12 FLOPs; the grown run is 0.75e12 ahead and reaches the loss at 1.17e12."""
    runs = [make_run("grown", GROWN), make_run("scratch", SCRATCH)]
    for run in runs:
        append(run, kind="evaluation", results={"sciq": {"acc": 0.75}}, average=0.75)
    page = report(runs, tmp_path / "out")
    order = [tag for tag, _ in page.tags if tag in ("table", "img")]
    assert order[0] == "table" and order.index("img") > order.count("table") - 1
    markdown = (tmp_path / "out/report.md").read_text()
    rows = {line.split(" | ")[0]: line for line in markdown.splitlines()}
    assert "800,000 -> 3,200,000 | 138,000 | 1.930e+12 | 1.930e+12" in markdown
    assert "| grown | scratch | 6 N per token, base in full |" in markdown
    found = re.search(r"base in full \| [\d.]+ \| \+([\d.]+)% \| one seed, no error bar", markdown)
    assert found and float(found[1]) / 100 == pytest.approx(1.92 / 1.17 - 1, abs=4e-3)
    assert (
        "a run directory has no config.yaml, so FLOPs by the paper's charge are unknown" in markdown
    )
    assert rows["| sciq"] == "| sciq | acc | 0.7500 | 0.7500 |"
    for name in ("loss_vs_flops", "speedup", "loss_by_cost", "spikes", "gauges", "accuracy"):
        seen = colors(tmp_path / f"out/{name}.png")
        assert "#D55E00" in seen, name


def test_seeds_get_an_error_bar(make_run: Callable[..., Path], tmp_path: Path) -> None:
    slower = [(50, 800_000), (88, LARGE, 0.6e12)]
    runs = [
        make_run("grown", GROWN),
        renamed(make_run("again", slower), '"again"', seed=2),
        make_run("scratch", SCRATCH),
    ]
    page = report(runs, tmp_path / "out")
    assert "grown (2 seeds)" in page.text
    assert re.search(r"\+4\d\.\d% to \+6\d\.\d%, s\.d\. \d+\.\d%, 2 pairs", page.text)
    assert "no error bar" not in page.text


def test_runs_without_a_shared_loss_get_a_page(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("grown", GROWN), make_run("scratch", [(100, LARGE, 0.0, 90.0)])]
    page = report(runs, tmp_path / "out")
    assert "no validation loss is passed by both runs, so the speedup is undefined" in page.text
    assert "undefined" in page.text
    assert not (tmp_path / "out/speedup.png").exists()
    assert (tmp_path / "out/gauges.png").exists()


def test_folder_without_records_raises(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/metrics\.jsonl: no such file; give the directory"):
        report([tmp_path / "empty"], tmp_path / "out")
