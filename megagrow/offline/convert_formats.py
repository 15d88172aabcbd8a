"""Models between megagrow's checkpoints and the files of DeepSpeed's and Megatron-LM's jobs."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from megagrow.checkpoint.source import Source
from megagrow.common.atomic_folder import new_folder
from megagrow.common.progress import WorkProgress
from megagrow.config.model_file import load_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import InputError
from megagrow.formats.deepspeed_universal import open_universal
from megagrow.formats.deepspeed_universal_export import universal_bytes, write_universal
from megagrow.formats.megatron import open_megatron
from megagrow.formats.megatron_export import MegatronTarget
from megagrow.formats.megatron_layout import check_tp
from megagrow.formats.open_source import open_source
from megagrow.offline.grow import write_goal
from megagrow.offline.plan import Goal
from megagrow.offline.request import Request
from megagrow.train.source_state import STILL_MASKED, state_of, still_masked

ROOM = 2**20
"""Bytes on the disk for what is no tensor."""


def import_universal(request: Request, console: Console) -> None:
    """Makes a checkpoint of a Universal Checkpoint: weights, moments and Adam's step. `to` names
    the model where the files do not say it."""
    _import(open_universal, request, console)


def import_megatron(request: Request, console: Console) -> None:
    """Makes a checkpoint of Megatron-LM's weights; the optimizer begins anew. `to` as above."""
    _import(open_megatron, request, console)


def export_universal(path: Path, out: Path, console: Console) -> None:
    """Writes a checkpoint, or a Hugging Face model, as a Universal Checkpoint."""
    source = _open(path, console)
    step = state_of(source).counters.step

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        write_universal(source, folder, step, advance)

    _export(source, out, universal_bytes(source), write, console)


def export_megatron(
    path: Path, out: Path, *, tp: int, divisible_by: int, dtype: str, console: Console
) -> None:
    """Writes the weights of a checkpoint, or of a Hugging Face model, for Megatron-LM."""
    request = Request(source=path, out=out, dtype=dtype)
    request.check()
    source = _open(path, console)
    check_tp(source.model, tp, f"--tp {tp}")
    target = MegatronTarget(source, tp, divisible_by, request.stored_dtype)
    step = state_of(source).counters.step

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        target.write(folder, step, advance)

    _export(source, out, target.nbytes, write, console)


def _open(path: Path, console: Console) -> Source:
    source = open_source(path, lambda text: console.print(text, highlight=False))
    if still_masked(source):
        raise InputError(f"{source.path}: {STILL_MASKED}")
    return source


def _export(
    source: Source,
    out: Path,
    size: int,
    write: Callable[[Path, Callable[[int], None]], None],
    console: Console,
) -> None:
    with (
        new_folder(out, size + ROOM) as folder,
        WorkProgress(console, "writing", size) as progress,
    ):
        write(folder, progress.advance)
    console.print(f"{source.path} -> {out}: written and checked", highlight=False)


def _import(
    opened: Callable[[Path, ModelConfig | None], Source], request: Request, console: Console
) -> None:
    model = None if request.to is None else load_model(request.to)
    source = opened(request.source, model)
    request.check()
    write_goal(request, Goal(source, source.model, None, ""), console)
