"""Convert models to another layout and to or from other formats (`megagrow convert`).

Each conversion applies the identity growth map with the code of offline growth, in bounded memory.
"""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from megagrow.checkpoint.source import Source
from megagrow.common.atomic_files import atomic_folder
from megagrow.common.progress import WorkProgress
from megagrow.common.tables import print_lines
from megagrow.config.model_file import load_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.deepspeed_universal import open_universal, universal_bytes, write_universal
from megagrow.formats.hugging_face_config import CONFIG_FILE
from megagrow.formats.megatron import MegatronTarget, open_megatron
from megagrow.formats.megatron_layout import check_tp
from megagrow.formats.open_source import log_warnings, open_source
from megagrow.offline.grow import write_plan
from megagrow.offline.plan import ConversionPlan, form_of, make_plan
from megagrow.offline.request import Request
from megagrow.train.source_state import STILL_MASKED, state_of, still_masked


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


def export_hugging_face(request: Request, console: Console) -> None:
    """Write the weights as a folder that AutoModelForCausalLM and AutoTokenizer load.

    The tokenizer is that of the request, or the one that the source names. Logs a warning if there
    is none.
    """
    write_plan(request, _plan(request), console)


def _plan(request: Request) -> ConversionPlan:
    request.check()
    source = open_source(request.source)
    return make_plan(request, source)


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
    log_warnings(source)
    request.check()
    write_plan(request, ConversionPlan(source, source.model, None, ""), console)
