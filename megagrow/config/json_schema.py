"""JSON Schema of run files, with which editors complete keys and mark errors."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from megagrow.config.overrides import BUILT_ON, DEFAULTS, PARTS, section_in
from megagrow.config.schema import RunConfig
from megagrow.config.sections import Section

Schema = dict[str, Any]


def run_schema() -> Schema:
    """Return the JSON Schema of a run file, a dialect that VS Code and other editors read.

    No key is required, because a base file or the defaults of all stages may set it. Relations
    between keys are not part of it: `megagrow plan` checks them.
    """
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    for section in _sections_in(RunConfig):
        # The schema of the run itself is not among the definitions.
        _describe(definitions.get(section.__name__, schema), section)
    stage = definitions["StageConfig"]["properties"]
    shared = {name: stage[name] for name in DEFAULTS if name not in RunConfig.model_fields}
    definitions["DataConfig"]["properties"] |= definitions["StageDataConfig"]["properties"]
    built_on = {name: {"type": "string", "description": text} for name, text in BUILT_ON.items()}
    schema["properties"] = built_on | schema["properties"] | shared
    schema["properties"]["stages"] = _list_or_changes(schema["properties"]["stages"])
    for properties in (schema["properties"], stage):
        for name in PARTS & properties.keys():
            _allow_names(properties, name, definitions)
    return schema


def _list_or_changes(stages: Schema) -> Schema:
    """Let `stages` also be a mapping of indices to changes of a base's stages."""
    single = {"^[0-9]+$": stages["items"]}
    changes = {"type": "object", "patternProperties": single, "additionalProperties": False}
    listed = {key: stages[key] for key in ("type", "items", "minItems")}
    rest = {key: value for key, value in stages.items() if key not in listed}
    return rest | {"anyOf": [listed, changes]}


def _allow_names(properties: Schema, name: str, definitions: dict[str, Schema]) -> None:
    """Let the section `name` be the name of a file, or extend one as its `base`."""
    reference = {"$ref": properties[name]["$ref"]}
    definition = definitions[reference["$ref"].rpartition("/")[2]]
    where = f"{name}/NAME.yaml in the search path"
    base = {"type": "string", "description": f"File that this section extends, {where}."}
    definition["properties"] = {"base": base, **definition["properties"]}
    file = {"type": "string", "description": f"Name of a file, {where}."}
    properties[name] = properties[name] | {"anyOf": [file, reference]}
    del properties[name]["$ref"]


def _describe(schema: Schema, section: type[Section]) -> None:
    """Add the docstrings of the keys; remove keys that no file has, and what is required."""
    schema.pop("required", None)
    texts = docstrings(section)
    for name, field in section.model_fields.items():
        if field.exclude:
            del schema["properties"][name]
        elif name in texts:
            schema["properties"][name]["description"] = texts[name]


def _sections_in(section: type[Section]) -> Iterator[type[Section]]:
    """Yield a section and all sections below it."""
    yield section
    for field in section.model_fields.values():
        below = section_in(field.annotation)
        if below is not None:
            yield from _sections_in(below)


def docstrings(section: type[Section]) -> dict[str, str]:
    """Return the docstrings of the fields of a section, each on one line.

    They are read from the source, because pydantic would parse them in every process of a run.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                texts[field.target.id] = " ".join(text.value.split())
    return texts
