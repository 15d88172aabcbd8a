"""Comparison of a run with the configuration recorded in the checkpoint it resumes from.

The classes of the keys are those of `config/resume_rules.py`. Lengths that a key gives in steps or
by default are compared in tokens, so that a new batch size does not shift them without notice.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.source import Source
from megagrow.common.untrusted_values import problems_of_values
from megagrow.config.deprecated import rename_recorded
from megagrow.config.differences import ABSENT, ConfigChange, config_changes
from megagrow.config.load import recorded_run
from megagrow.config.resume_rules import Effect, is_in
from megagrow.config.schema import GrowthConfig, ModelConfig, RunConfig
from megagrow.config.sections import sets_by_name
from megagrow.data.corpus_identity import Contents
from megagrow.data.manifest import CorpusManifest
from megagrow.data.tokenizers import gives_same_ids, load_tokenizer, tokenizers_at
from megagrow.errors import CheckpointError, ConfigError, printable
from megagrow.formats.hugging_face_origin import HuggingFaceOrigin
from megagrow.formats.hugging_face_tokenizer import is_tokenizer
from megagrow.train.growth_event.run_growths import as_grown, as_trained, keys_without_effect
from megagrow.train.schedule import derived_lengths
from megagrow.train.source_state import state_of, state_of_checkpoint
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)

TOKENIZER = "data.tokenizer_contents"


def changes_since(
    run: RunConfig,
    contents: Contents | None,
    state: RunState,
    model: ModelConfig,
    environment: Mapping[str, Any],
) -> list[ConfigChange]:
    """Return the changes of a run since a checkpoint was saved.

    Args:
        run: the run that resumes.
        contents: its `data_contents`; None compares no contents.
        state: position of the checkpoint.
        model: model of the checkpoint.
        environment: environment recorded in the checkpoint.

    Raises CheckpointError if the recorded configuration is damaged, ConfigError as `as_trained`.
    """
    if state.stage >= len(run.stages):
        return [ConfigChange(f"stages.{state.stage}", "present", ABSENT, Effect.FIXED)]
    recorded, then = _recorded(environment)
    run = as_trained(run, state)
    if recorded is not None:
        with suppress(ConfigError):
            recorded = as_trained(recorded, state)
    new = run.model_dump(mode="json")
    old = copy.deepcopy(new) if recorded is None else recorded.model_dump(mode="json")
    if contents is not None:
        _add_contents(old, new, then, contents)
    _add_growth_of_files(old, new, state.stage, environment.get("growth"))
    old["stages"][state.stage]["model"] = model.model_dump(mode="json")
    for side in (old, new):
        side["init_from"] = side["init_from"] and _absolute(side["init_from"])
    changes = config_changes(old, new, state.stage)
    if recorded is not None:
        before, after = (_with_past_operators(each, state) for each in (recorded, run))
        equal = {*keys_without_effect(recorded, run, state), *_equal_lengths(before, after, state)}
        changes = [replace(c, effect=Effect.NONE) if is_in(c.key, equal) else c for c in changes]
        if state.stage < len(recorded.stages):
            changes += _shifted_lengths(before, after, state.stage, changes)
    tokens = f"stages.{state.stage}.tokens"
    if run.stages[state.stage].tokens < state.stage_tokens:
        changes = [
            replace(c, effect=Effect.CONTRADICTION) if c.key == tokens else c for c in changes
        ]
    return changes


def checkpoint_changes(
    run: RunConfig, contents: Contents | None, manifest: Manifest
) -> list[ConfigChange]:
    """Return the changes of a run since a checkpoint with this manifest was saved."""
    state, model = state_of_checkpoint(manifest), ModelConfig(**manifest.model)
    return changes_since(run, contents, state, model, manifest.environment)


def changes_since_source(
    run: RunConfig, contents: Contents | None, source: Source
) -> list[ConfigChange]:
    """Return the changes between the run that saved the source of `init_from` and the new run.

    The new run may differ in everything but the tokenizer. Its first stage is compared with the
    stage in which the source was saved.
    """
    recorded, then = _recorded(source.environment)
    if recorded is None:
        return _change_of_folder_tokenizer(run, source)
    old, new = (each.model_dump(mode="json") for each in (recorded, run))
    stage = min(state_of(source).stage, len(old["stages"]) - 1)
    old["stages"], new["stages"] = old["stages"][stage : stage + 1], new["stages"][:1]
    old["stages"][0]["model"] = source.model.model_dump(mode="json")  # may be grown since
    if contents is not None:
        if then is not None:
            then = then.model_copy(update={"train": [then.of_stage(stage)]})
        _add_contents(old, new, then, contents)
    changes = config_changes(old, new, stage=0)
    return [
        replace(change, effect=Effect.FROM_NOW_ON)
        if change.effect is Effect.CONTRADICTION and change.key != TOKENIZER
        else change
        for change in changes
        if change.key not in ("name", "output_dir", "init_from")
    ]


def _change_of_folder_tokenizer(run: RunConfig, source: Source) -> list[ConfigChange]:
    """Compare the tokenizer in the Hugging Face folder of a source with that of the run.

    Another format of the same tokenizer is no change.
    """
    folder, own = HuggingFaceOrigin.recorded(source.environment).folder, _tokenizer_file(run)
    if folder is None or own is None or not is_tokenizer(Path(folder)):
        return []
    here, there = load_tokenizer(own), list(tokenizers_at(Path(folder)))
    if any(gives_same_ids(each, here) for each in there):
        return []
    values = f"{folder} ({there[0].checksum[:12]})", f"{own} ({here.checksum[:12]})"
    return [ConfigChange(TOKENIZER, *values, Effect.CONTRADICTION)]


def _tokenizer_file(run: RunConfig) -> Path | None:
    """Return the tokenizer of a run: `data.tokenizer`, or the copy in the folder of a corpus."""
    corpora = (corpus for stage in run.stages for corpus in stage.data.train)
    of_corpora = (CorpusManifest.tokenizer_of(corpus.path) for corpus in corpora)
    return run.data.tokenizer or next(filter(None, of_corpora), None)


def check_changes(changes: Sequence[ConfigChange], allowed: Sequence[str], checkpoint: str) -> None:
    """Raise an InputError for changes that are neither compatible nor allowed.

    Args:
        changes: from `changes_since`.
        allowed: keys or sections of `--allow-change`, or `all`.
        checkpoint: the checkpoint or source, for the message.
    """
    fixed = [change for change in changes if change.effect is Effect.FIXED]
    if fixed:
        raise CheckpointError(
            f"{checkpoint}: does not fit the run: {_listed(fixed)}; restore the old value, or set "
            "another output_dir"
        )
    refused = [
        change
        for change in changes
        if change.effect is Effect.CONTRADICTION and not is_in(change.key, allowed)
    ]
    if refused:
        keys = " ".join(f"--allow-change {change.key}" for change in refused)
        raise ConfigError(
            f"{checkpoint}: the run contradicts the configuration that it was saved with: "
            f"{_listed(refused)}; restore the old value, set another output_dir, or force it with "
            f"{keys}"
        )


def _recorded(environment: Mapping[str, Any]) -> tuple[RunConfig | None, Contents | None]:
    """Return the run and the contents recorded in a checkpoint; None for what it does not have.

    Checkpoints converted from other formats record no run, those of earlier versions no contents.
    """
    config, contents = environment.get("config"), environment.get("contents")
    try:
        run = None if config is None else recorded_run(config)
    except ValidationError as error:
        logger.warning(
            "the configuration in the checkpoint is unreadable, only its model is compared: %s",
            printable(problems_of_values(error)),
        )
        return None, None
    if run is None or contents is None:
        return run, None
    try:
        known = Contents.model_validate(contents)
    except ValidationError as error:
        raise CheckpointError(
            f"the contents recorded in the checkpoint are invalid: {problems_of_values(error)}"
        ) from error
    stages = enumerate(run.stages)
    train = [len(stage.data.train) == len(known.of_stage(index)) for index, stage in stages]
    if not all(train) or _sizes(known.validation) != _sizes(run.data.validation):
        raise CheckpointError("the contents recorded in the checkpoint do not match its run")
    return run, known


def _sizes(sets: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    return {name: len(corpora) for name, corpora in sets.items()}


def _add_growth_of_files(
    old: dict[str, Any], new: dict[str, Any], stage: int, growth: Mapping[str, Any] | None
) -> None:
    """Add the growth of a checkpoint that `megagrow grow` wrote, whose run had other plans."""
    known = len(old["stages"])
    old["stages"] += copy.deepcopy(new["stages"][known : stage + 1])
    try:
        if growth is None or growth.get("options") is None:
            return
        old["stages"][stage]["growth"] = GrowthConfig.model_validate(
            rename_recorded(growth["options"], ("growth",))
        ).model_dump(mode="json")
        seed = int(growth["stream"].partition("/")[0])
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        problem = problems_of_values(error) if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"the growth recorded in the checkpoint is invalid ({problem})"
        ) from error
    if seed != new["seed"]:  # otherwise the seed of the source's run is compared
        old["seed"] = seed


def _add_contents(
    old: dict[str, Any], new: dict[str, Any], recorded: Contents | None, now: Contents
) -> None:
    """Add the contents of corpora and tokenizer; paths stand for contents that are not recorded."""
    for side, known in ((old, recorded), (new, now if recorded else None)):
        for index, stage in enumerate(side["stages"]):
            _add_contents_of(stage["data"]["train"], known.of_stage(index) if known else None)
        sets = side["data"]["validation"]
        for name, corpora in sets_by_name(sets).items():
            _add_contents_of(corpora, known.validation[name] if known else None)
    tokenizers = (recorded or now).tokenizer, now.tokenizer
    if None not in tokenizers:
        for side, tokenizer in zip((old, new), tokenizers, strict=True):
            side["data"]["tokenizer_contents"] = tokenizer


def _add_contents_of(corpora: list[dict[str, Any]], known: Sequence[str] | None) -> None:
    for index, corpus in enumerate(corpora):
        corpus["contents"] = known[index] if known else _absolute(corpus["path"])


def _shifted_lengths(
    old: RunConfig, new: RunConfig, stage: int, changes: Sequence[ConfigChange]
) -> list[ConfigChange]:
    """Return the lengths of a stage that differ in tokens although their own keys are unchanged."""
    lengths = zip(
        derived_lengths(old, stage).items(), derived_lengths(new, stage).values(), strict=True
    )
    found = []
    for (key, before), after in lengths:
        place = f"stages.{stage}.{key}"
        own = any(change.key.startswith(place.removesuffix("_tokens")) for change in changes)
        if before != after and not own:
            values = f"{before} tokens", f"{after} tokens"
            found.append(ConfigChange(place, *values, Effect.CONTRADICTION))
    return found


def _with_past_operators(run: RunConfig, state: RunState) -> RunConfig:
    """Return the run with the operators that probes have chosen; others are found as changes."""
    known = state.operators[: len(run.stages) - 1]
    try:
        return as_grown(run, replace(state, operators=known))
    except ConfigError:
        return run


def _equal_lengths(old: RunConfig, new: RunConfig, state: RunState) -> Iterator[str]:
    """Yield the keys of lengths that are equal in tokens, in the stages up to the current one."""
    for index in range(min(state.stage + 1, len(old.stages), len(new.stages))):
        before, after = derived_lengths(old, index), derived_lengths(new, index)
        if before["schedule.warmup_tokens"] == after["schedule.warmup_tokens"]:
            yield from (f"stages.{index}.schedule.warmup_{unit}" for unit in ("steps", "tokens"))
        if before["growth.ramp_tokens"] == after["growth.ramp_tokens"]:
            yield f"stages.{index}.growth.ramp_tokens"


def _listed(changes: Sequence[ConfigChange]) -> str:
    return ", ".join(change.difference for change in changes)


def _absolute(path: str) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, ValueError):  # a recorded path may be anything
        return path
