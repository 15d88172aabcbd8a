"""Convert models to another layout and to or from other formats (`megagrow convert`).

Each conversion applies the identity growth map with the code of offline growth, in bounded memory.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from megagrow.checkpoint.source import Source
from megagrow.common.atomic_files import atomic_folder
from megagrow.common.progress import WorkProgress
from megagrow.common.tables import print_lines
from megagrow.config.includes import load_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.deepspeed_universal import open_universal, universal_bytes, write_universal
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
from megagrow.formats.megatron import MegatronTarget, open_megatron
from megagrow.formats.megatron_layout import check_tp
from megagrow.formats.open_source import open_source
from megagrow.offline.grow import write_plan
from megagrow.offline.plan import ConversionPlan, form_of, make_plan
from megagrow.offline.request import Request
from megagrow.offline.target import ExtraFiles
from megagrow.train.source_state import STILL_MASKED, state_of, still_masked

logger = logging.getLogger(__name__)


def reshard_files(request: Request, console: Console) -> None:
    """Write a checkpoint in another layout.

    Raises CheckpointError if the source is not a checkpoint.
    """
    plan = _plan(request)
    if form_of(plan.source) != "checkpoint":
        raise CheckpointError(
            f"{request.source}: is a Hugging Face folder; use megagrow convert hf-import"
        )
    write_plan(request, plan, console)


def import_hugging_face(request: Request, console: Console) -> None:
    """Write the weights of a Hugging Face folder as a checkpoint of step 0 with zero moments.

    Raises CheckpointError if the source is not a Hugging Face folder.
    """
    plan = _plan(request)
    if form_of(plan.source) != "huggingface":
        raise CheckpointError(
            f"{request.source}: not a Hugging Face folder, it has no {CONFIG_FILE}"
        )
    write_plan(request, plan, console)


def export_hugging_face(request: Request, tokenizer: Path | None, console: Console) -> None:
    """Write the weights as a folder that AutoModelForCausalLM and AutoTokenizer load.

    The tokenizer is `tokenizer`, else that of the source's run, else that of the folder from which
    the source was imported. Logs a warning if there is none.
    """
    plan = _plan(request)
    files = _tokenizer(tokenizer, plan.source)
    write_plan(request, plan, console, _extra_files(request, plan, files))


def _plan(request: Request) -> ConversionPlan:
    request.check()
    source = open_source(request.source)
    return make_plan(request, source)


def _extra_files(request: Request, plan: ConversionPlan, files: TokenizerFiles) -> ExtraFiles:
    # Without special token ids in the config, LlamaConfig uses 1 and 2 by default.
    like = _environment_value(plan.source, ORIGIN_KEY, "config") or {
        "bos_token_id": None,
        "eos_token_id": None,
    }
    documents = {
        CONFIG_FILE: config_of(plan.model, request.stored_dtype, {**like, **files.ids}),
        GENERATION_FILE: generation_of(_environment_value(plan.source, ORIGIN_KEY), files.ids),
    }
    return ExtraFiles({**documents, **files.documents}, files.copies)


def _tokenizer(given: Path | None, source: Source) -> TokenizerFiles:
    if given is not None:
        return tokenizer_files(given, source.model.vocab_size)
    named = named_tokenizer(source)
    if named is not None and is_tokenizer(named):
        return tokenizer_files(named, source.model.vocab_size)
    reason = "its run has none" if named is None else f"{named}, its run's, does not exist"
    logger.warning("exported without a tokenizer: %s; add one with --tokenizer PATH", reason)
    return TokenizerFiles()


def named_tokenizer(source: Source) -> Path | None:
    """Return the tokenizer of the source's run, or the folder from which it was imported."""
    of_run = _environment_value(source, "config", "data", "tokenizer")
    if isinstance(of_run, str):
        return Path(of_run)
    folder = _environment_value(source, ORIGIN_KEY, "folder")
    return Path(folder) if isinstance(folder, str) and is_tokenizer(Path(folder)) else None


def _environment_value(source: Source, *keys: str) -> Any:
    """Return a value of the source's environment, or None if absent."""
    value: Any = source.environment
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


ROOM = 2**20
"""Disk space reserved for files other than tensors, in bytes."""


def import_universal(request: Request, console: Console) -> None:
    """Convert a Universal Checkpoint: weights, moments and Adam's step.

    `to` names the model if the files do not record it.
    """
    _import(open_universal, request, console)


def import_megatron(request: Request, console: Console) -> None:
    """Convert Megatron-LM weights; the optimizer state is reinitialized.

    `to` names the model if the files do not record it.
    """
    _import(open_megatron, request, console)


def export_universal(path: Path, out: Path, console: Console) -> None:
    """Write a checkpoint or a Hugging Face model as a Universal Checkpoint."""
    source = _open(path)
    step = state_of(source).counters.step

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        write_universal(source, folder, step, advance)

    _export(source, out, universal_bytes(source), write, console)


def export_megatron(
    path: Path, out: Path, *, tp: int, divisible_by: int, dtype: str, console: Console
) -> None:
    """Write the weights of a checkpoint or a Hugging Face model for Megatron-LM."""
    request = Request(source=path, out=out, dtype=dtype)
    request.check()
    source = _open(path)
    check_tp(source.model, tp, f"--tp {tp}")
    target = MegatronTarget(source, tp, divisible_by, request.stored_dtype)
    step = state_of(source).counters.step

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        target.write(folder, step, advance)

    _export(source, out, target.nbytes, write, console)


def _open(path: Path) -> Source:
    source = open_source(path)
    if still_masked(source):
        raise CheckpointError(f"{source.path}: {STILL_MASKED}")
    return source


def _export(
    source: Source,
    out: Path,
    size: int,
    write: Callable[[Path, Callable[[int], None]], None],
    console: Console,
) -> None:
    with (
        atomic_folder(out, size + ROOM) as folder,
        WorkProgress(console, "writing", size) as progress,
    ):
        write(folder, progress.advance)
    print_lines(console, [f"{source.path} -> {out}: written and checked"])


def _import(
    opened: Callable[[Path, ModelConfig | None], Source], request: Request, console: Console
) -> None:
    model = None if request.to is None else load_model(request.to)
    source = opened(request.source, model)
    request.check()
    write_plan(request, ConversionPlan(source, source.model, None, ""), console)
