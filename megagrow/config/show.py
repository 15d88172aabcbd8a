"""Prints a run with every default filled in, as a run file."""

from typing import Any

import yaml

from megagrow.common.sizes import format_count, format_large
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.stage_length import LENGTHS, lengths_in


def to_yaml(run: RunConfig) -> str:
    """The whole of `run` as YAML: loading it gives an equal run.

    A stage's length stands there by the key that the run file gave it by, so that it still follows
    from the rest where that is changed.
    """
    tree = _readable(run.model_dump(mode="json"))
    stages = [_as_written(*pair) for pair in zip(run.stages, tree["stages"], strict=True)]
    return yaml.safe_dump(tree | {"stages": stages}, sort_keys=False)


def _as_written(stage: StageConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """A stage with the one length key that its run file gives."""
    *_, given = lengths_in(tree)  # `tokens`, which is always there, comes first
    left_out = [key for key in LENGTHS if key != given]
    shown = {key: value for key, value in tree.items() if key not in left_out}
    return shown | {"tokens": "auto"} if stage.tokens_auto else shown


def _readable(value: Any, key: str = "") -> Any:
    """`value` with the token counts in it written for people."""
    if isinstance(value, dict):
        return {inner: _readable(item, inner) for inner, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if value is None:
        return None
    form = {"tokens": format_count, "flops": format_large}.get(key.split("_")[-1])
    return form(value) if form and isinstance(value, int) else value
