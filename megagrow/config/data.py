"""Sections of the data of a run and of its stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WrapSerializer

from megagrow.config.sections import Count, FilePath, Section, sets_as_written, sets_by_name


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class CorpusConfig(Section):
    """One tokenized corpus of a blend."""

    path: Annotated[FilePath, AfterValidator(_prefix)]
    """Path of the .bin and .idx files, without extension."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight in the blend, relative to the other corpora."""


def _corpora(value: object) -> object:
    """Return a path, or a list with paths, in the format of a list of corpora."""
    corpora = [value] if isinstance(value, str | Path) else value
    if not isinstance(corpora, list):
        return corpora
    return [{"path": each} if isinstance(each, str | Path) else each for each in corpora]


_CorporaInput = str | list[str | CorpusConfig]
Corpora = Annotated[
    list[CorpusConfig], BeforeValidator(_corpora, json_schema_input_type=_CorporaInput)
]
"""Corpora of a blend; a path is short for a corpus of weight 1."""

_SetsInput = _CorporaInput | dict[str, _CorporaInput]
ValidationSets = Annotated[
    dict[str, Annotated[Corpora, Field(min_length=1)]],
    BeforeValidator(sets_by_name, json_schema_input_type=_SetsInput),
    WrapSerializer(sets_as_written),
]
"""Corpora of each validation set by name."""


class StageDataConfig(Section):
    """Training data of a stage. Each token of a corpus is read once per epoch."""

    train: Corpora = Field(min_length=1)
    """Training corpora; more than one are blended. A path, or a list of paths, is short for corpora
    of weight 1."""
    sequence_length: Count
    """Tokens per sequence."""
    reset_position_ids: bool = False
    """Restart positions at 0 at each document (name from Megatron-LM)."""
    reset_attention_mask: bool = False
    """Restrict attention to the token's own document (name from Megatron-LM)."""
    corpus_position: Literal["continue", "restart"] = "continue"
    """Start of the corpora in a stage after the first: where earlier stages stopped reading them,
    or at their first token (docs/guides/stages.md#data)."""


class DataConfig(Section):
    """Data that a run has once: validation corpora and tokenizer."""

    validation: ValidationSets = Field(default={})
    """Corpora of the validation loss, or a mapping of names to the corpora of several validation
    sets, each with its own loss: `{web: data/web, code: [data/python, data/rust]}`. Empty disables
    it."""
    tokenizer: FilePath | None = None
    """A SentencePiece .model file, a tokenizer.json, or a Hugging Face folder. It is checked
    against the model's vocabulary and required by `evaluation` and `samples`. Checkpoints record
    its path."""


class RunFileData(DataConfig, StageDataConfig):
    """Data. The run has `validation` and `tokenizer` once; each token of a training corpus is read
    once per epoch."""


MEASUREMENTS = ("validation", "evaluation")
"""Sections of a stage that do not affect its training."""


def with_stage_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a run with its `MEASUREMENTS` and the stage keys of its `data` moved
    into all stages.

    A stage's own keys have precedence; its list of corpora replaces the default list. Values of
    the wrong type are kept, for the validation that follows.
    """
    data, stages = values.get("data"), values.get("stages")
    if not isinstance(stages, list | tuple):
        return dict(values)
    moved = {key: values[key] for key in MEASUREMENTS if key in values}
    stages = [{**moved, **stage} if isinstance(stage, Mapping) else stage for stage in stages]
    values = {key: item for key, item in values.items() if key not in moved} | {"stages": stages}
    if not isinstance(data, Mapping):
        return values
    keys = StageDataConfig.model_fields
    shared = {key: item for key, item in data.items() if key in keys}
    rest = {key: item for key, item in data.items() if key not in keys}
    if not shared:
        return values
    return {**values, "data": rest, "stages": [_with_data(stage, shared) for stage in stages]}


def with_run_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dump of a run with the `MEASUREMENTS` and the keys of `data` that all its stages
    share at the top, the inverse of `with_stage_defaults`."""
    first, *others = (stage["data"] for stage in values["stages"])
    shared = {key: item for key, item in first.items() if all(each[key] == item for each in others)}
    stages = [
        {**stage, "data": {key: item for key, item in stage["data"].items() if key not in shared}}
        for stage in values["stages"]
    ]
    stages = [stage if stage["data"] else _without(stage, "data") for stage in stages]
    top = {**values, "data": {**shared, **values["data"]}}
    for key in MEASUREMENTS:
        if all(stage[key] == stages[0][key] for stage in stages):
            top[key] = stages[0][key]
            stages = [_without(stage, key) for stage in stages]
    return {**top, "stages": stages}


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in mapping.items() if name != key}


def _with_data(stage: Any, shared: Mapping[str, Any]) -> Any:
    own = stage.get("data", {}) if isinstance(stage, Mapping) else None
    return {**stage, "data": {**shared, **own}} if isinstance(own, Mapping) else stage
