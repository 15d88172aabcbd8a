"""Files of a written Hugging Face folder other than weights: configs, tokenizer, texts."""

import logging
from pathlib import Path
from typing import Any

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig
from megagrow.data.manifest import CorpusManifest
from megagrow.data.tokenizers import tokenizers_at
from megagrow.errors import DataError, InputError
from megagrow.formats.hugging_face_origin import TOKENIZER_SETTINGS_FILE, HuggingFaceOrigin
from megagrow.formats.hugging_face_tokenizer import TokenizerFiles, is_tokenizer, tokenizer_files
from megagrow.offline.target import ExtraFiles

logger = logging.getLogger(__name__)


def hugging_face_files(
    source: Source, model: ModelConfig, dtype: str, tokenizer: str | None
) -> ExtraFiles:
    """Return the files of a folder that AutoModelForCausalLM and AutoTokenizer load.

    The tokenizer is `tokenizer`, or the one that the source names. Logs a warning if there is none.

    Args:
        source: source of the weights, with the origin of a model that was imported.
        model: written model.
        dtype: safetensors dtype name of the weights.
        tokenizer: tokenizer given by the user.

    Raises:
        DataError: the given tokenizer cannot be read or does not fit the model.
    """
    origin = HuggingFaceOrigin.recorded(source.environment)
    if tokenizer is None:
        path, files = _named_files(source, model.vocab_size)
    else:
        path = Path(tokenizer)
        files = tokenizer_files(path, model.vocab_size)
        warn_of_other_tokenizer(source, path)
    for line in files.warnings:
        logger.warning("%s", line)
    folders = () if path is None else (str(path.resolve()), str(path.resolve().parent))
    own = origin.folder in folders
    documents: dict[str, dict[str, Any] | str] = dict(files.documents)
    settings = files.documents.get(TOKENIZER_SETTINGS_FILE)
    if settings is not None and not files.has_chat_template and tokenizer is None:
        template = {} if origin.chat_template is None else {"chat_template": origin.chat_template}
        documents[TOKENIZER_SETTINGS_FILE] = {**settings, **template}
    configs = origin.documents(model, dtype, files.ids, own)
    return ExtraFiles({**origin.texts, **configs, **documents}, files.copies)


def _named_files(source: Source, vocab_size: int) -> tuple[Path | None, TokenizerFiles]:
    """Return the tokenizer that the source names and its files; logs a warning without one."""
    path = None
    try:
        path = named_tokenizer(source)
        if path is None:
            reason = "the source names none"
        elif not is_tokenizer(path):
            reason = f"{path}, named by the source, does not exist"
        else:
            return path, tokenizer_files(path, vocab_size)
    except InputError as error:
        reason = str(error)
    logger.warning("written without a tokenizer: %s; add one with --tokenizer PATH", reason)
    return path, TokenizerFiles()


def named_tokenizer(source: Source) -> Path | None:
    """Return the tokenizer of a source, or None.

    It is the first existing one of: the run's `data.tokenizer`, the tokenizers of its training
    corpora, the folder from which the model was imported. If none exists, it is the first one
    named. Raises DataError if none of them is the one with which the model was trained.
    """
    named = [*_of_run(source.environment), *_of_folder(source.environment)]
    existing = [path for path in named if is_tokenizer(path)]
    trained_with = recorded_tokenizer(source.environment)
    if not existing or trained_with is None:
        return next(iter([*existing, *named]), None)
    for path in existing:
        if has_checksum(path, trained_with):
            return path
    raise DataError(
        f"{existing[0]}: another tokenizer than the one {source.path} was trained with (checksum "
        f"{trained_with[:12]}); it has changed since, pass the original with --tokenizer"
    )


def warn_of_other_tokenizer(source: Source, path: Path) -> None:
    """Log a warning if a tokenizer given by the user is not the one of the source's run."""
    trained_with = recorded_tokenizer(source.environment)
    if trained_with is not None and not has_checksum(path, trained_with):
        logger.warning(
            "%s: not the tokenizer file with which %s was trained (checksum %s); the results are "
            "wrong unless it is the same tokenizer in another format",
            path,
            source.path,
            trained_with[:12],
        )


def recorded_tokenizer(environment: dict[str, Any]) -> str | None:
    """Return the checksum of the tokenizer with which a checkpoint was trained, if recorded."""
    contents = environment.get("contents")
    checksum = contents.get("tokenizer") if isinstance(contents, dict) else None
    return checksum if isinstance(checksum, str) else None


def has_checksum(path: Path, checksum: str) -> bool:
    """Return True if one of the tokenizers at a path has a checksum. Raises InputError."""
    return any(tokenizer.checksum == checksum for tokenizer in tokenizers_at(path))


def _of_run(environment: dict[str, Any]) -> list[Path]:
    config = environment.get("config")
    # Earlier versions recorded the corpora in the run's own section.
    sections = [_value(each, "data") for each in (config, *_entries(config, "stages"))]
    named = _value(sections[0], "tokenizer")
    paths = [Path(named)] if isinstance(named, str) else []
    corpora = [_value(each, "path") for data in sections for each in _entries(data, "train")]
    for path in dict.fromkeys(each for each in corpora if isinstance(each, str)):
        try:
            own = CorpusManifest.tokenizer_of(Path(path))
        except DataError as error:
            logger.warning("the tokenizer of a corpus is not used: %s", error)
            continue
        paths += [] if own is None else [own]
    return paths


def _value(section: Any, key: str) -> Any:
    """Return the value of a key of an untrusted section, None if it has none."""
    return section.get(key) if isinstance(section, dict) else None


def _entries(section: Any, key: str) -> list[Any]:
    """Return the list at a key of an untrusted section, empty if it has none."""
    value = _value(section, key)
    return value if isinstance(value, list) else []


def _of_folder(environment: dict[str, Any]) -> list[Path]:
    """Return the folder from which the model was imported, unless it has no tokenizer."""
    folder = HuggingFaceOrigin.recorded(environment).folder
    path = None if folder is None else Path(folder)
    return [path] if path is not None and (is_tokenizer(path) or not path.exists()) else []
