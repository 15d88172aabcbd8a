"""Models between megagrow's checkpoints and the files of DeepSpeed's and Megatron-LM's jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megagrow.checkpoint.hugging_face_config import DTYPE_NAMES
from megagrow.checkpoint.megatron import open_megatron
from megagrow.checkpoint.megatron_export import MegatronTarget
from megagrow.checkpoint.megatron_layout import check_tp
from megagrow.checkpoint.new_folder import new_folder
from megagrow.checkpoint.opening import open_source
from megagrow.checkpoint.source import Source
from megagrow.checkpoint.universal import open_universal
from megagrow.checkpoint.universal_export import universal_bytes, write_universal
from megagrow.config.model_file import load_model
from megagrow.data.progress import WorkProgress
from megagrow.errors import InputError
from megagrow.train.file_growth import Goal, state_of, still_masked
from megagrow.train.grow_files import write_goal
from megagrow.train.grow_request import Request

ROOM = 2**20
"""Bytes on the disk for what is no tensor."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """A checkpoint of another program that is to become one of megagrow's."""

    path: Path
    out: Path
    model: str | None
    """A model file or a model's name; None: what the files say."""
    zero_stage: int
    dp: int
    tp: int
    weight_decay_on: str
    memory: str


def import_universal(request: Import, console: Console) -> None:
    """Makes a checkpoint of a Universal Checkpoint: weights, moments and Adam's step."""
    model = None if request.model is None else load_model(request.model)
    _write(open_universal(request.path, model), request, console)


def import_megatron(request: Import, console: Console) -> None:
    """Makes a checkpoint of Megatron-LM's weights; the optimizer begins anew."""
    model = None if request.model is None else load_model(request.model)
    _write(open_megatron(request.path, model), request, console)


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
    if dtype not in DTYPE_NAMES.values():
        raise InputError(f"--dtype {dtype}: should be one of {', '.join(DTYPE_NAMES.values())}")
    source = _open(path, console)
    check_tp(source.model, tp, f"--tp {tp}")
    stored = next(short for short, name in DTYPE_NAMES.items() if name == dtype)
    target = MegatronTarget(source, tp, divisible_by, stored)
    step = state_of(source).counters.step

    def write(folder: Path, advance: Callable[[int], None]) -> None:
        target.write(folder, step, advance)

    _export(source, out, target.nbytes, write, console)


def _open(path: Path, console: Console) -> Source:
    source = open_source(path, lambda text: console.print(text, highlight=False))
    if still_masked(source):
        raise InputError(
            f"{source.path}: parts of it still stand behind masks, without which it is another "
            "model; train it until they are let in"
        )
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


def _write(source: Source, wanted: Import, console: Console) -> None:
    request = Request(
        source=wanted.path,
        out=wanted.out,
        form="checkpoint",
        zero_stage=wanted.zero_stage,
        dp=wanted.dp,
        tp=wanted.tp,
        weight_decay_on=wanted.weight_decay_on,
        memory=wanted.memory,
    )
    request.check()
    write_goal(request, Goal(source, source.model, None, ""), console)
