"""A growth from files to files, on one machine, in bounded memory: `megagrow grow`.

Needs no process group and no DeepSpeed. What it has done it keeps in a journal, so that the same
command resumes where another was killed; the result is published once it is verified on disk.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megagrow.checkpoint.manifest import Manifest, describe_layout
from megagrow.common.atomic_files import staging_folder
from megagrow.common.progress import WorkProgress
from megagrow.common.sizes import format_bytes
from megagrow.errors import ConfigError, ResourceError
from megagrow.formats.hugging_face_config import CONFIG_FILE, ORIGIN_KEY, config_of
from megagrow.formats.open_source import open_found, open_source
from megagrow.growth.map import Dense
from megagrow.offline.journal import JOURNAL_FILE, Journal
from megagrow.offline.plan import ConversionPlan, decide, form_of, target_layout
from megagrow.offline.request import Request
from megagrow.offline.target import Beside, Target, checkpoint_target, hugging_face_target
from megagrow.offline.text_loss import check_text_memory, text_loss, text_tokens
from megagrow.offline.writer import Writing, check_space
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.apply import Application

_FIXED_BYTES = 12 * 2**20
"""Bytes of buffers independent of the model's size."""

_BYTES_PER_ELEMENT = 48
"""Bytes held per element of a piece in the worst case: fp64 copies (dense terms)."""


def grow_files(request: Request, console: Console) -> None:
    """Grow the source of a request, or resume. Raises InputError for invalid requests."""
    request.check()
    source = open_source(request.source)
    write_goal(request, decide(request, source), console)


def write_goal(
    request: Request, goal: ConversionPlan, console: Console, beside: Beside | None = None
) -> None:
    """Write a planned target, or resume.

    `beside` lists additional files of a Hugging Face folder; without it only config.json is
    written.
    """
    at_once = _elements_at_once(goal, request.memory_bytes)
    target = _target(request, goal, beside)
    command = _command(request, goal, target)
    folder = staging_folder(request.out)
    if _was_finished(request.out, command):
        console.print(f"{request.out}: is finished", highlight=False)
        return
    texts = _text_tokens(request, goal)
    console.print(Text(_story(goal, request.out)))
    source_loss = text_loss(goal.source, texts) if texts else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder.parent, target, folder)
        with Journal(folder, command) as journal:
            work = _work(folder, target, goal, at_once)
            _do(work, journal, "copying" if goal.options is None else "growing", console)
            if source_loss is not None:
                target_loss = text_loss(open_found(folder), texts, goal.masks)
                _compare(goal, source_loss, target_loss, console)
            work.finish(request.out)
    except OSError as error:
        raise ResourceError(
            f"{request.out}: cannot be written ({error.strerror}); free the disk or the path, and "
            "give the same command again"
        ) from error
    console.print(f"{request.out}: written and checked", highlight=False)


def _work(folder: Path, target: Target, goal: ConversionPlan, at_once: int) -> Writing:
    application = Application(
        goal.source.read, goal.source.layout.plan, goal.growth, target.layout.plan, at_once
    )
    return Writing(folder, target, application.block, at_once)


def _do(work: Writing, journal: Journal, doing: str, console: Console) -> None:
    total = sum(work.target.sizes.values())
    with WorkProgress(console, doing, total) as progress:
        work.write(journal, progress)
    with WorkProgress(console, "checking", total) as progress:
        work.verify(journal, progress)


def _target(request: Request, goal: ConversionPlan, beside: Beside | None) -> Target:
    if (request.form or form_of(goal.source)) == "checkpoint":
        layout = target_layout(request, goal)
        return checkpoint_target(
            layout,
            lambda files: Manifest(
                goal.model.model_dump(),
                describe_layout(layout),
                goal.source.adam_step if goal.growth.keeps_step else 0,
                goal.state().as_json(),
                _environment(goal),
                files,
            ),
        )
    options = (request.zero_stage, request.dp, request.tp, request.weight_decay_on)
    if any(option is not None for option in options):
        raise ConfigError("a Hugging Face folder has no layout: leave out --zero-stage, --dp, --tp")
    if beside is None:
        like = goal.source.environment.get(ORIGIN_KEY, {}).get("config", {})
        beside = Beside({CONFIG_FILE: config_of(goal.model, request.stored_dtype, like)})
    return hugging_face_target(goal.model, request.stored_dtype, request.shard_bytes, beside)


def _environment(goal: ConversionPlan) -> dict[str, Any]:
    """Return the source's environment extended by this growth."""
    if goal.options is None:
        return goal.source.environment
    return goal.source.environment | {"growth": _told(goal)}


def _told(goal: ConversionPlan) -> dict[str, Any]:
    """Return the manifest's record of a growth, kept until the model is trained."""
    return {
        "source": str(goal.source.path.resolve()),
        "source_model": goal.source.model.model_dump(),
        "options": None if goal.options is None else goal.options.model_dump(mode="json"),
        "stream": goal.stream,
        "masks": 0.0 if goal.is_masked else None,
    }


def _command(request: Request, goal: ConversionPlan, target: Target) -> dict[str, Any]:
    """Return all inputs that determine the output; the memory budget does not."""
    files = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in goal.source.files
    ]
    return {
        "growth": _told(goal),
        "files of the source": files,
        "target": target.described,
        "copies": {name: str(path.resolve()) for name, path in target.copies.items()},
        "sizes": target.sizes,
        "form": request.form,
    }


def _was_finished(out: Path, command: dict[str, Any]) -> bool:
    """Return True if the same command was interrupted with only its journal left to remove.

    Raises CheckpointError if the output is anything else.
    """
    if not out.exists():
        return False
    if not (out / JOURNAL_FILE).is_file():
        raise ConfigError(f"{out}: already exists; remove it or choose another path")
    with Journal(out, command):
        (out / JOURNAL_FILE).unlink()
    return True


def _elements_at_once(goal: ConversionPlan, memory: int) -> int:
    """Return the maximum elements of a piece. Raises ResourceError if not even one row fits."""
    specs = [*parameter_plan(goal.model, 1).values(), *goal.source.layout.plan.values()]
    widest = max(spec.cols for spec in specs)
    fixed = _FIXED_BYTES + _map_bytes(goal, widest)
    needed = fixed + widest * _BYTES_PER_ELEMENT
    if memory < needed:
        raise ConfigError(
            f"--memory {format_bytes(memory)} is too small for one row of this model: "
            f"{format_bytes(needed)} are needed"
        )
    return (memory - fixed) // _BYTES_PER_ELEMENT


def _map_bytes(goal: ConversionPlan, widest: int) -> int:
    """Return the bytes of the map's matrices, of the squares of one term's, and of projected
    rows."""
    growth = goal.growth
    terms = [
        term for table in (growth.weights, growth.moments) for t in table.values() for term in t
    ]
    fills = [fill for found in growth.fills.values() for fill in found]
    bases = [fill.basis for fill in fills if fill.basis is not None]
    sides = [side for t in terms if isinstance(t, Dense) for side in (t.left, t.right)]
    matrices = {id(m): m.nbytes for m in (*sides, *bases) if m is not None}
    projected = 64 * widest * 8 * 4 if bases else 0
    return sum(matrices.values()) + 2 * max(matrices.values(), default=0) + projected


def _text_tokens(request: Request, goal: ConversionPlan) -> list[Any]:
    if request.text is None:
        if request.tokenizer is not None:
            raise ConfigError("--tokenizer goes with --text")
        return []
    if request.tokenizer is None:
        raise ConfigError("--text needs --tokenizer, with which the model was trained")
    models = goal.source.model, goal.model
    texts = text_tokens(request.text, request.tokenizer, models)
    for model in models:
        check_text_memory(model, texts, request.memory_bytes)
    return texts


def _compare(goal: ConversionPlan, before: float, after: float, console: Console) -> None:
    """Print both losses. Raises an error if they differ although the growth preserves the
    function."""
    console.print(f"loss on the text: source {before:.6f}, target {after:.6f}", highlight=False)
    tolerance = 1e-3 if goal.options is None else goal.options.tolerance
    if goal.growth.preserves_function and abs(after - before) > tolerance:
        raise ConfigError(
            f"{goal.operators} should keep the function, but the loss on the text went from "
            f"{before:.6f} to {after:.6f}"
        )


def _story(goal: ConversionPlan, out: Path) -> str:
    state, source = goal.state(), goal.source
    kept = "keeps the function" if goal.growth.preserves_function else "changes the function"
    masks = "; its new parts stand behind masks that begin at 0" if goal.is_masked else ""
    return (
        f"{source.path} (step {state.counters.step}, {state.counters.tokens} tokens) -> {out}: "
        f"operators {goal.operators}, {kept}, stage {state.stage}{masks}"
    )
