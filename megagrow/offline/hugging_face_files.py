"""Files of a written Hugging Face folder other than weights: configs, tokenizer, texts."""

import logging
from pathlib import Path
from typing import Any

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig
from megagrow.data.manifest import CorpusManifest
from megagrow.errors import DataError
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
    path = named_tokenizer(source) if tokenizer is None else Path(tokenizer)
    if tokenizer is None:
        files = _named_files(path, model.vocab_size)
    else:
        files = tokenizer_files(Path(tokenizer), model.vocab_size)
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


def _named_files(path: Path | None, vocab_size: int) -> TokenizerFiles:
    if path is None:
        reason = "the source names none"
    elif not is_tokenizer(path):
        reason = f"{path}, named by the source, does not exist"
    else:
        try:
            return tokenizer_files(path, vocab_size)
        except DataError as error:
            reason = str(error)
    logger.warning("written without a tokenizer: %s; add one with --tokenizer PATH", reason)
    return TokenizerFiles()


def named_tokenizer(source: Source) -> Path | None:
    """Return the tokenizer of a source, or None.

    It is the first existing one of: the run's `data.tokenizer`, the tokenizers of its training
    corpora, the folder from which the model was imported. If none exists, it is the first one
    named.
    """
    named = [*_of_run(source.environment), *_of_folder(source.environment)]
    return next((path for path in named if is_tokenizer(path)), named[0] if named else None)


def _of_run(environment: dict[str, Any]) -> list[Path]:
    config = environment.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        return []
    paths = [Path(data["tokenizer"])] if isinstance(data.get("tokenizer"), str) else []
    corpora = data.get("train")
    for corpus in corpora if isinstance(corpora, list) else []:
        path = corpus.get("path") if isinstance(corpus, dict) else None
        if not isinstance(path, str):
            continue
        prefix = Path(path)
        try:
            manifest = CorpusManifest.next_to(prefix)
        except DataError as error:
            logger.warning("the tokenizer of a corpus is not used: %s", error)
            continue
        if manifest is not None:
            paths.append(prefix.parent / manifest.tokenizer)
    return paths


def _of_folder(environment: dict[str, Any]) -> list[Path]:
    """Return the folder from which the model was imported, unless it has no tokenizer."""
    folder = HuggingFaceOrigin.recorded(environment).folder
    path = None if folder is None else Path(folder)
    return [path] if path is not None and (is_tokenizer(path) or not path.exists()) else []
