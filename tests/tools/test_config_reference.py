"""docs/reference/configuration.md is current, complete and correct."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megagrow.config.load import load_run
from megagrow.config.overrides import BUILT_ON, DEFAULTS
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.sections import Section
from tests.helpers.config_keys import sections_in

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/docs/config_reference.py"
PAGE = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")

ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*) \|$", flags=re.MULTILINE)
ROWS = {path: tuple(cells) for path, *cells in ROW.findall(PAGE)}
"""Path of a key -> type, default, meaning."""


def keys_of(section: type[Section], path: str = "") -> Iterator[str]:
    """Yield the path of every key of a section on the page, including subsections."""
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        yield f"{path}{name}"
        for kind, items in sections_in(field.annotation):
            yield from keys_of(kind, f"{path}{name}{items}.")


def test_the_page_is_current() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_has_a_row_with_a_meaning() -> None:
    at_the_top = {path for path in keys_of(StageConfig) if path.split(".")[0] in DEFAULTS}
    in_a_stage = {f"stages.N.{path}" for path in at_the_top}
    run = {path for path in keys_of(RunConfig) if path not in in_a_stage or path.count(".") == 2}
    assert len(run) > 80 and len(at_the_top) > 40
    assert ROWS.keys() == run | at_the_top | BUILT_ON.keys()
    short = [path for path, (_, _, meaning) in ROWS.items() if len(meaning.split()) < 2]
    assert short == []


def test_links_between_sections_are_valid() -> None:
    headings = re.findall(r"^##+ `([\w.]+)`$", PAGE, flags=re.MULTILINE)
    anchors = {heading.replace(".", "").lower() for heading in headings}
    links = set(re.findall(r"\]\(#(\w+)\)", PAGE))
    assert len(links) > 15 and links <= anchors


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run with all sections, each with its required keys only."""
    model = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    model |= {"intermediate_size": 8, "vocab_size": 9}
    probe = {"operators": ["direct_depth", "midas"]}
    values = {
        "name": "all",
        "output_dir": "runs/all",
        "data": {"train": [{"path": "a"}], "validation": [{"path": "b"}], "sequence_length": 8},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 0.1},
        "tokens": 1000,
        "model": model,
        "stages": [{}, {"growth": {"probe": probe, "new_entries": {}}}],
        "samples": {"prompts": ["a"]},
        "evaluation": {},
        "guards": {"loss_spike": {}, "skip_step": {}},
    }
    values["model"] |= {"rope_scaling": {"rope_type": "linear", "factor": 2}}
    values["data"]["tokenizer"] = "t.model"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_defaults_are_those_of_a_loaded_run(run_file: Path) -> None:
    plain = load_run(run_file)
    absent = {"data.tokenizer", "model.rope_scaling", "stages.N.growth", "evaluation", "samples"}
    absent |= {"guards.loss_spike", "guards.skip_step"}
    absent |= {"stages.N.growth.new_entries", "stages.N.growth.probe"}
    absent |= {"data.validation", *BUILT_ON}
    written = {path: default[1:-1] for path, (_, default, _) in ROWS.items() if default[0] == "`"}
    absent |= {path for path in written if path.startswith("deepspeed")}  # needs zero_stage: 3
    defaults = {path: text for path, text in written.items() if path not in absent}
    assert len(defaults) > 60
    for path, text in defaults.items():
        place = path.replace("stages.N", "stages.1").replace(".NAME", "").replace(".N.", ".0.")
        assert load_run(run_file, [f"{place}={text}"]) == plain, path
