"""The JSON Schema of run files accepts the shipped ones and marks errors."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megagrow.config.json_schema import run_schema
from tests.helpers.source_tree import ROOT

SHIPPED = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/demo").glob("*.yaml")]
SCHEMA = ROOT / "configs/run-file.schema.json"


class Yaml12(yaml.SafeLoader):
    """Loader that reads `1e-4` as a number, as editors do."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?e[-+]?[0-9]+"), list("0123456789")
)


VALID: dict[str, Any] = yaml.load((ROOT / "configs/gstack-1.1b.yaml").read_text("utf-8"), Yaml12)


def test_the_file_for_editors_is_current() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == run_schema(), (
        "run: megagrow config schema > configs/run-file.schema.json"
    )


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_run_files_are_valid_and_name_the_schema(file: Path) -> None:
    text = file.read_text("utf-8")
    jsonschema.validate(yaml.load(text, Yaml12), run_schema())
    (line,) = [line for line in text.splitlines() if "yaml-language-server" in line]
    assert (file.parent / line.partition("$schema=")[2]).resolve() == SCHEMA


@pytest.mark.parametrize(
    ("keys", "value"),
    {
        "unknown": (("sed",), 1),
        "unknown, in a section": (("batch", "global_size"), 8),
        "unknown, in a stage": (("stages", 1, "growth", "operators"), "midas"),
        "operator": (("stages", 1, "growth", "operator"), ["gstak"]),
        "count": (("stages", 0, "tokens"), "10 billion"),
        "type": (("seed",), "a"),
        "range": (("guards",), {"max_rewinds": -1}),
    }.values(),
)
def test_errors_are_marked(keys: tuple[Any, ...], value: Any) -> None:
    tree = json.loads(json.dumps(VALID))
    section = tree
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, run_schema())


def test_keys_are_described_and_none_is_internal() -> None:
    schema = run_schema()
    stage = schema["$defs"]["StageConfig"]["properties"]
    assert "exact_tokens" not in stage and "tokens_auto" not in stage
    assert "micro_batch_size_auto" not in schema["$defs"]["BatchConfig"]["properties"]
    for properties in (schema["properties"], schema["$defs"]["OptimizerConfig"]["properties"]):
        undescribed = [key for key, value in properties.items() if "description" not in value]
        assert not [key for key in undescribed if not {"$ref", "anyOf"} & properties[key].keys()]
