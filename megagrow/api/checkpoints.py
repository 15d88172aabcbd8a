"""Checkpoints in the public API: grow, reshard, convert to and from Hugging Face, text loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from megagrow.api.runs import AnyPath, make_console

if TYPE_CHECKING:
    from megagrow.offline.request import Request


class LayoutOptions(TypedDict, total=False):
    """Keyword arguments for the layout of a written checkpoint. Default: that of the source."""

    zero_stage: int | None
    """ZeRO stage, 0 to 3."""
    dp: int | None
    """Data-parallel size."""
    tp: int | None
    """Tensor-parallel size."""
    weight_decay_on: str | None
    """Parameter groups of the optimizer: `all` or `matrices`."""


def grow(
    source: AnyPath,
    out: AnyPath,
    *,
    to: AnyPath,
    stage: int | None = None,
    operators: Sequence[str] = (),
    overrides: Sequence[str] = (),
    seed: int | None = None,
    form: str | None = None,
    dtype: str = "float32",
    shard_size: str = "5GB",
    tokenizer: AnyPath | None = None,
    memory: str = "1GiB",
    verbose: bool = False,
    **layout: Unpack[LayoutOptions],
) -> None:
    """Grow a checkpoint file to file on the CPU, in bounded memory.

    The result appears at `out` when it is complete and read back. An interrupted call continues
    when it is repeated.

    Args:
        source: Checkpoint, run directory (its newest valid checkpoint) or Hugging Face folder.
        out: Checkpoint or Hugging Face folder to write; must not exist.
        to: Target: a model file, a model name or a run file.
        stage: Index of the stage of a run file `to` that starts with this growth. Default: the
            stage after that of the source.
        operators: Growth operators, one per axis, such as `["direct_depth"]`.
        overrides: `growth.KEY=VALUE` options.
        seed: Seed of random entries. Default: that of the source's run.
        form: `checkpoint` or `huggingface`. Default: that of the source.
        dtype: `float32`, `float16` or `bfloat16`; weights of a Hugging Face folder.
        shard_size: Largest file of a Hugging Face folder, such as `5GB`.
        tokenizer: Tokenizer of a Hugging Face folder. Default: as in `export_hugging_face`.
        memory: Memory budget in addition to the process itself, such as `1GiB`.
        verbose: Print progress.
        **layout: Layout of a written checkpoint. Default: that of the source or of the stage.

    Raises:
        CheckpointError: The source or an option is invalid, or the growth needs training.
        ConfigError: The target or an override is invalid.
    """
    from megagrow.offline.grow import grow_files

    request = _request(
        source,
        out,
        form,
        memory,
        to=str(to),
        stage=stage,
        operators=tuple(operators),
        overrides=tuple(overrides),
        seed=seed,
        dtype=dtype,
        shard_size=shard_size,
        tokenizer=None if tokenizer is None else str(tokenizer),
        **layout,
    )
    grow_files(request, make_console(verbose))


def reshard(
    source: AnyPath,
    out: AnyPath,
    *,
    memory: str = "512MiB",
    verbose: bool = False,
    **layout: Unpack[LayoutOptions],
) -> None:
    """Write a checkpoint in another parallel layout, optimizer state included.

    Args:
        source: Checkpoint or run directory (its newest valid checkpoint).
        out: Checkpoint to write; must not exist.
        memory: Memory budget in addition to the process itself, such as `1GiB`.
        verbose: Print progress.
        **layout: Layout of the written checkpoint.

    Raises:
        CheckpointError: The source is not a valid checkpoint, or the layout is invalid.
    """
    from megagrow.offline.convert import reshard_files

    reshard_files(_request(source, out, "checkpoint", memory, **layout), make_console(verbose))


def export_hugging_face(
    source: AnyPath,
    out: AnyPath,
    *,
    dtype: str = "float32",
    shard_size: str = "5GB",
    tokenizer: AnyPath | None = None,
    memory: str = "512MiB",
    verbose: bool = False,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Args:
        source: Checkpoint or run directory (its newest valid checkpoint).
        out: Folder to write; must not exist.
        dtype: `float32`, `float16` or `bfloat16`.
        shard_size: Largest weight file, such as `5GB`.
        tokenizer: SentencePiece model, tokenizer.json or Hugging Face folder. Default: that of
            the source's run, of its corpora, or of the folder from which the model was imported;
            without any, no tokenizer is written.
        memory: Memory budget in addition to the process itself, such as `1GiB`.
        verbose: Print progress.

    Raises:
        CheckpointError: The source is invalid, or its growth masks are still ramping.
        DataError: The tokenizer is invalid.
    """
    from megagrow.offline.convert import export_hugging_face as export

    request = _request(
        source,
        out,
        "huggingface",
        memory,
        dtype=dtype,
        shard_size=shard_size,
        tokenizer=None if tokenizer is None else str(tokenizer),
    )
    export(request, make_console(verbose))


def import_hugging_face(
    source: AnyPath,
    out: AnyPath,
    *,
    memory: str = "512MiB",
    verbose: bool = False,
    **layout: Unpack[LayoutOptions],
) -> None:
    """Write a checkpoint of step 0 with the weights of a Hugging Face folder and zero moments.

    Args:
        source: Hugging Face folder of a model of a supported family (safetensors).
        out: Checkpoint to write; must not exist.
        memory: Memory budget in addition to the process itself, such as `1GiB`.
        verbose: Print progress.
        **layout: Layout of the written checkpoint. Default: one rank.

    Raises:
        CheckpointError: The folder or the layout is invalid.
    """
    from megagrow.offline.convert import import_hugging_face as import_weights

    import_weights(_request(source, out, "checkpoint", memory, **layout), make_console(verbose))


def text_loss(source: AnyPath, text: AnyPath, tokenizer: AnyPath) -> float:
    """Return the mean loss of a model on a text, in nats per predicted token (fp32, on the CPU).

    One layer is in memory at a time. The text is cut into sequences of at most 512 tokens.

    Args:
        source: Checkpoint, run directory (its newest valid checkpoint) or Hugging Face folder.
        text: UTF-8 file.
        tokenizer: Tokenizer with which the model was trained.

    Raises:
        CheckpointError: The source is invalid, its growth masks are still ramping, or the text is
            shorter than two tokens.
        DataError: The tokenizer is invalid.
    """
    from megagrow.errors import CheckpointError
    from megagrow.formats.open_source import open_source
    from megagrow.offline.text_loss import text_loss as loss
    from megagrow.offline.text_loss import text_tokens
    from megagrow.train.source_state import STILL_MASKED, still_masked

    opened = open_source(Path(source))
    if still_masked(opened):
        raise CheckpointError(f"{opened.path}: {STILL_MASKED}")
    return loss(opened, text_tokens(Path(text), str(tokenizer), (opened.model,)))


def _request(
    source: AnyPath, out: AnyPath, form: str | None, memory: str, **options: Any
) -> "Request":
    from megagrow.offline.request import Request

    return Request(source=Path(source), out=Path(out), form=form, memory=memory, **options)
