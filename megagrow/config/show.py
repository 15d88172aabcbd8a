"""Prints a run with every default filled in, as a run file."""

from typing import Any

import yaml

from megagrow.config.schema import RunConfig
from megagrow.config.sizes import format_count


def to_yaml(run: RunConfig) -> str:
    """The whole of `run` as YAML: loading it gives an equal run."""
    return yaml.safe_dump(_readable(run.model_dump(mode="json")), sort_keys=False)


def _readable(value: Any, key: str = "") -> Any:
    """`value` with the token counts in it written for people."""
    if isinstance(value, dict):
        return {inner: _readable(item, inner) for inner, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    counted = key.split("_")[-1] == "tokens" and value is not None
    return format_count(value) if counted else value
