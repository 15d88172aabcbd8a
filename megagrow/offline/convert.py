"""A model in another layout, as a Hugging Face folder, or out of one: `megagrow convert`.

Each is a growth between files by which nothing grows: streamed, journalled and read back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from megagrow.checkpoint.source import Source
from megagrow.errors import InputError
from megagrow.formats.hugging_face_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    ORIGIN_KEY,
    config_of,
    generation_of,
)
from megagrow.formats.hugging_face_tokenizer import (
    TokenizerFiles,
    is_tokenizer,
    tokenizer_files,
)
from megagrow.formats.open_source import open_source
from megagrow.offline.grow import write_goal
from megagrow.offline.plan import Goal, decide, form_of
from megagrow.offline.request import Request
from megagrow.offline.target import Beside


def reshard_files(request: Request, console: Console) -> None:
    """Writes a checkpoint in another layout. InputError if the source is none."""
    goal = _goal(request, console)
    if form_of(goal.source) != "checkpoint":
        raise InputError(f"{request.source}: a Hugging Face folder: use megagrow convert hf-import")
    write_goal(request, goal, console)


def import_hugging_face(request: Request, console: Console) -> None:
    """Writes the weights of a Hugging Face folder as a checkpoint of step 0, its moments zero.
    InputError if the source is none."""
    goal = _goal(request, console)
    if form_of(goal.source) != "huggingface":
        raise InputError(f"{request.source}: no Hugging Face folder, it has no {CONFIG_FILE}")
    write_goal(request, goal, console)


def export_hugging_face(request: Request, tokenizer: Path | None, console: Console) -> None:
    """Writes the weights as a folder that AutoModelForCausalLM and AutoTokenizer load.

    The tokenizer is the one given, that of the source's run, or that of the folder from which the
    source was imported; without any a line says that there is none.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False)

    goal = _goal(request, console)
    files = _tokenizer(tokenizer, goal.source, say)
    write_goal(request, goal, console, _beside(request, goal, files))


def _goal(request: Request, console: Console) -> Goal:
    request.check()
    source = open_source(request.source, lambda text: console.print(text, highlight=False))
    return decide(request, source)


def _beside(request: Request, goal: Goal, files: TokenizerFiles) -> Beside:
    # Where nothing is known of special tokens LlamaConfig would take ids 1 and 2 for them.
    like = _told(goal.source, ORIGIN_KEY, "config") or {"bos_token_id": None, "eos_token_id": None}
    documents = {
        CONFIG_FILE: config_of(goal.model, request.stored_dtype, {**like, **files.ids}),
        GENERATION_FILE: generation_of(_told(goal.source, ORIGIN_KEY), files.ids),
    }
    return Beside({**documents, **files.documents}, files.copies)


def _tokenizer(given: Path | None, source: Source, say: Callable[[str], None]) -> TokenizerFiles:
    if given is not None:
        return tokenizer_files(given, source.model.vocab_size)
    named = named_tokenizer(source)
    if named is not None and is_tokenizer(named):
        return tokenizer_files(named, source.model.vocab_size)
    why = "its run names none" if named is None else f"{named}, its run's, is not here"
    say(f"without a tokenizer: {why}; --tokenizer PATH adds one")
    return TokenizerFiles()


def named_tokenizer(source: Source) -> Path | None:
    """The tokenizer that the source's run names, or else the folder from which it was imported."""
    of_run = _told(source, "config", "data", "tokenizer")
    if isinstance(of_run, str):
        return Path(of_run)
    folder = _told(source, ORIGIN_KEY, "folder")
    return Path(folder) if isinstance(folder, str) and is_tokenizer(Path(folder)) else None


def _told(source: Source, *keys: str) -> Any:
    """A value of the source's environment; None where it has no such place."""
    value: Any = source.environment
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
