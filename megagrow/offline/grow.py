"""Grow a model from files to files, on one machine, in bounded memory: `megagrow grow`.

Needs no process group and no DeepSpeed. A journal records the finished pieces, so that the same
command resumes after a crash. The result is published after it is verified on disk.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from megagrow.checkpoint.manifest import Manifest, describe_layout
from megagrow.common.atomic_files import staging_folder
from megagrow.common.progress import WorkProgress
from megagrow.common.sizes import format_bytes
from megagrow.common.tables import print_lines
from megagrow.errors import ConfigError, ResourceError, unwritable
from megagrow.formats.open_source import open_found, open_source
from megagrow.growth.map import Dense
from megagrow.offline.hugging_face_files import hugging_face_files
from megagrow.offline.journal import JOURNAL_FILE, Journal
from megagrow.offline.plan import ConversionPlan, form_of, make_plan, target_layout
from megagrow.offline.request import Request
from megagrow.offline.target import Target, checkpoint_target, hugging_face_target
from megagrow.offline.text_loss import check_text_memory, text_loss, text_tokens
from megagrow.offline.writer import Writing, check_space
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.apply import Application

_FIXED_BYTES = 12 * 2**20
"""Bytes of buffers independent of the model's size."""

_BYTES_PER_ELEMENT = 48
"""Bytes held per element of a piece in the worst case: fp64 copies (dense terms)."""
TEXT_TOLERANCE = 1e-3
"""Maximum change of the loss on a text, in nats, by an operator that preserves the function."""


def grow_files(request: Request, console: Console) -> None:
    """Grow the source of a request, or resume. Raises InputError for invalid requests."""
    request.check()
    source = open_source(request.source)
    write_plan(request, make_plan(request, source), console)


def write_plan(request: Request, plan: ConversionPlan, console: Console) -> None:
    """Write a planned target, or resume."""
    at_once = _elements_at_once(plan, request.memory_bytes)
    target = _target(request, plan)
    command = _command(request, plan, target)
    folder = staging_folder(request.out)
    if _was_finished(request.out, command):
        print_lines(console, [f"{request.out}: already finished"])
        return
    texts = _text_tokens(request, plan)
    print_lines(console, [_summary(plan, request.out)])
    source_loss = text_loss(plan.source, texts) if texts else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder.parent, target, folder)
        with Journal(folder, command) as journal:
            work = _writing(folder, target, plan, at_once)
            _run(work, journal, "copying" if plan.options is None else "growing", console)
            if source_loss is not None:
                target_loss = text_loss(open_found(folder), texts, plan.masks)
                _compare(plan, source_loss, target_loss, console)
            work.finish(request.out)
    except OSError as error:
        problem = unwritable(request.out, error)
        raise ResourceError(f"{problem}; then rerun the same command") from error
    print_lines(console, [f"{request.out}: written and checked"])


def _writing(folder: Path, target: Target, plan: ConversionPlan, at_once: int) -> Writing:
    application = Application(
        plan.source.read, plan.source.layout.plan, plan.growth, target.layout.plan, at_once
    )
    return Writing(folder, target, application.block, at_once)


def _run(work: Writing, journal: Journal, label: str, console: Console) -> None:
    total = sum(work.target.sizes.values())
    with WorkProgress(console, label, total) as progress:
        work.write(journal, progress)
    with WorkProgress(console, "checking", total) as progress:
        work.verify(journal, progress)


def _target(request: Request, plan: ConversionPlan) -> Target:
    if _form(request, plan) == "checkpoint":
        layout = target_layout(request, plan)
        return checkpoint_target(
            layout,
            lambda files: Manifest(
                plan.model.model_dump(),
                describe_layout(layout),
                plan.source.adam_step if plan.growth.keeps_step else 0,
                plan.state().as_json(),
                _environment(plan),
                files,
            ),
        )
    options = (request.zero_stage, request.dp, request.tp, request.weight_decay_on)
    if any(option is not None for option in options):
        raise ConfigError(
            "a Hugging Face folder has no layout; remove --zero-stage, --dp, --tp and "
            "--weight-decay-on"
        )
    extra_files = hugging_face_files(
        plan.source, plan.model, request.stored_dtype, request.tokenizer
    )
    return hugging_face_target(plan.model, request.stored_dtype, request.shard_bytes, extra_files)


def _form(request: Request, plan: ConversionPlan) -> str:
    return request.form or form_of(plan.source)


def _environment(plan: ConversionPlan) -> dict[str, Any]:
    """Return the source's environment extended by this growth."""
    if plan.options is None:
        return plan.source.environment
    return plan.source.environment | {"growth": _growth_record(plan)}


def _growth_record(plan: ConversionPlan) -> dict[str, Any]:
    """Return the manifest's record of a growth, kept until the model is trained."""
    return {
        "source": str(plan.source.path.resolve()),
        "source_model": plan.source.model.model_dump(),
        "options": None if plan.options is None else plan.options.model_dump(mode="json"),
        "stream": plan.stream,
        "masks": 0.0 if plan.is_masked else None,
    }


def _command(request: Request, plan: ConversionPlan, target: Target) -> dict[str, Any]:
    """Return all inputs that determine the output; the memory budget does not."""
    files = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in plan.source.files
    ]
    return {
        "growth": _growth_record(plan),
        "files of the source": files,
        "target": target.described,
        "copies": {name: str(path.resolve()) for name, path in target.copies.items()},
        "sizes": target.sizes,
        "form": request.form,
    }


def _was_finished(out: Path, command: dict[str, Any]) -> bool:
    """Return True if the same command was interrupted with only its journal left to remove.

    Raises an InputError if the output exists for any other reason.
    """
    if not out.exists():
        return False
    if not (out / JOURNAL_FILE).is_file():
        raise ConfigError(f"{out}: already exists; remove it or choose another path")
    with Journal(out, command):
        (out / JOURNAL_FILE).unlink()
    return True


def _elements_at_once(plan: ConversionPlan, memory: int) -> int:
    """Return the maximum elements of a piece. Raises ConfigError if not even one row fits."""
    specs = [*parameter_plan(plan.model, 1).values(), *plan.source.layout.plan.values()]
    widest = max(spec.cols for spec in specs)
    fixed = _FIXED_BYTES + _map_bytes(plan, widest)
    needed = fixed + widest * _BYTES_PER_ELEMENT
    if memory < needed:
        raise ConfigError(
            f"--memory {format_bytes(memory)} is too small for one row of this model: "
            f"{format_bytes(needed)} are needed"
        )
    return (memory - fixed) // _BYTES_PER_ELEMENT


def _map_bytes(plan: ConversionPlan, widest: int) -> int:
    """Return the bytes of the map: its matrices, their squares in one term, and projected rows."""
    growth = plan.growth
    terms = [
        term for table in (growth.weights, growth.moments) for t in table.values() for term in t
    ]
    fills = [fill for found in growth.fills.values() for fill in found]
    bases = [fill.basis for fill in fills if fill.basis is not None]
    sides = [side for t in terms if isinstance(t, Dense) for side in (t.left, t.right)]
    matrices = {id(m): m.nbytes for m in (*sides, *bases) if m is not None}
    projected = 64 * widest * 8 * 4 if bases else 0
    return sum(matrices.values()) + 2 * max(matrices.values(), default=0) + projected


def _text_tokens(request: Request, plan: ConversionPlan) -> list[Any]:
    if request.text is None:
        if request.tokenizer is not None and _form(request, plan) == "checkpoint":
            raise ConfigError("--tokenizer requires --text or --format huggingface")
        return []
    if request.tokenizer is None:
        raise ConfigError("--text requires --tokenizer: the one that the model was trained with")
    models = plan.source.model, plan.model
    texts = text_tokens(request.text, request.tokenizer, models)
    for model in models:
        check_text_memory(model, texts, request.memory_bytes)
    return texts


def _compare(plan: ConversionPlan, before: float, after: float, console: Console) -> None:
    """Print both losses.

    Raises ConfigError if they differ although the growth preserves the function.
    """
    print_lines(console, [f"loss on the text: source {before:.6f}, target {after:.6f}"])
    tolerance = None if plan.options is None else plan.options.tolerance
    tolerance = TEXT_TOLERANCE if tolerance is None else tolerance
    if plan.growth.preserves_function and abs(after - before) > tolerance:
        raise ConfigError(
            f"{plan.operators} must preserve the function, but the loss on the text changed "
            f"from {before:.6f} to {after:.6f}"
        )


def _summary(plan: ConversionPlan, out: Path) -> str:
    state, source = plan.state(), plan.source
    written = f"{source.path} (step {state.counters.step}, {state.counters.tokens} tokens) -> {out}"
    if plan.options is None:
        return written
    kept = "preserves the function" if plan.growth.preserves_function else "changes the function"
    masks = "; growth masks start at 0" if plan.is_masked else ""
    return f"{written}: operators {plan.operators}, {kept}, stage {state.stage}{masks}"
