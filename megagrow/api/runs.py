"""Runs in the public API: prepare data, load, train, read metrics, evaluate."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from megagrow.config.schema import RunConfig
    from megagrow.data.manifest import CorpusManifest

AnyPath = str | PathLike[str]


def prepare(
    sources: Sequence[AnyPath],
    output: AnyPath,
    *,
    tokenizer: str = "train",
    vocab_size: int | None = None,
    validation_fraction: float = 0.01,
    workers: int | None = None,
    seed: int = 1234,
    overwrite: bool = False,
    verbose: bool = False,
) -> "CorpusManifest":
    """Tokenize text into the indexed corpora OUTPUT/train and OUTPUT/validation.

    Args:
        sources: Files or folders (text, .jsonl[.gz|.zst], .parquet), `hf:NAME[:CONFIG[:SPLIT]]`
            or `python-stdlib`.
        output: Folder of the corpus. Finished parts of an interrupted call are reused.
        tokenizer: `train` (SentencePiece), a SentencePiece model or a Hugging Face tokenizer.
        vocab_size: Tokens of a trained vocabulary (default 32,000), or the largest vocabulary
            that an existing tokenizer may have.
        validation_fraction: Share of the documents in [0, 1); 0 writes no validation corpus.
        workers: Processes. Default: one per core.
        seed: Selects the validation documents.
        overwrite: Replace another corpus in `output`.
        verbose: Print progress.

    Returns:
        The manifest of the corpus, with documents and tokens of each split.

    Raises:
        ConfigError: `output` holds another corpus and `overwrite` is not set.
        DataError: A source, the tokenizer or an option is invalid, or a split is empty.
    """
    from megagrow.data.prepare import prepare as prepare_corpus

    return prepare_corpus(
        [str(source) for source in sources],
        Path(output),
        tokenizer,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        workers=workers,
        seed=seed,
        overwrite=overwrite,
        console=make_console(verbose),
    )


def verify_corpus(output: AnyPath) -> "CorpusManifest":
    """Compare every file of a prepared corpus with its checksum.

    Args:
        output: Folder written by `prepare`.

    Returns:
        The manifest of the corpus.

    Raises:
        DataError: The corpus is incomplete, or a file differs; the message names the first one.
    """
    from megagrow.data.manifest import verify

    return verify(Path(output))


def load_run(path: AnyPath, overrides: Sequence[str] = ()) -> "RunConfig":
    """Load and validate a run file.

    Args:
        path: YAML file. Relative paths in it are relative to the current directory.
        overrides: `KEY=VALUE` strings, applied in order, such as `optimizer.lr=1e-3`.

    Returns:
        The immutable configuration with all defaults and stages resolved.

    Raises:
        ConfigError: The file, a key or a value is invalid.
    """
    from megagrow.config.load import load_run as load

    return load(Path(path), overrides)


def train(run: "RunConfig", *, allow_changes: Sequence[str] = ()) -> str | None:
    """Train a run to its end, growth events included. Collective.

    Resumes from the newest valid checkpoint in `run.output_dir`. Call it outside of an initialized
    process group: it creates one and destroys it.

    Args:
        run: Configuration from `load_run`.
        allow_changes: Keys whose values may contradict the checkpoint (docs/guides/checkpoints.md).

    Returns:
        The name of the signal that stopped the run after a checkpoint, or None if it completed.

    Raises:
        InputError: The run, its data or its checkpoints are invalid.
        RunError: The run diverged or lost a rank.
    """
    from megagrow.common.lasting_output import lasting_output, log_file
    from megagrow.parallel.launch import read_launch
    from megagrow.run import train as train_run

    with lasting_output(log_file(run.output_dir, read_launch().rank)):
        return train_run(run, allowed=allow_changes)


def read_metrics(run_dir: AnyPath) -> list[dict[str, Any]]:
    """Read the records of a run.

    Args:
        run_dir: The run's `output_dir`.

    Returns:
        One dict per line of metrics.jsonl, in order. `kind` is start, train, validation,
        evaluation, growth, checkpoint, rewind, lost,
        config_change or end. Losses are in nats per token, times in
        seconds, memory in bytes (docs/reference/file-formats.md).

    Raises:
        DataError: The file is missing or damaged.
    """
    from megagrow.train.reporting.metrics import METRICS_FILE
    from megagrow.train.reporting.metrics import read_metrics as read

    return read(Path(run_dir) / METRICS_FILE)


def evaluate(
    checkpoint: AnyPath,
    tasks: Sequence[str] = ("gstack",),
    *,
    data_dir: AnyPath | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    tokenizer: str | None = None,
    tp: int = 1,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on tasks of lm-eval (extra `eval`). Collective.

    Args:
        checkpoint: Checkpoint, run directory (its newest valid checkpoint) or Hugging Face folder.
        tasks: Task names; `gstack` is the paper's eight tasks.
        data_dir: Folder with local files of the tasks. Default: the Hugging Face hub.
        batch_size: Sequences per forward pass.
        limit: Documents per task. Default: all.
        tokenizer: Default: that of the checkpoint's run.
        tp: Tensor-parallel size; the remaining ranks are data parallel.
        dtype: `float32` or `bfloat16`. Default: bfloat16 on GPUs, float32 on CPUs.

    Returns:
        `results` (task -> metric -> value, with `METRIC_stderr`), `average` (mean accuracy or
        None), `checkpoint`, `limit`, and for a checkpoint of a run `step`, `tokens`, `flops` and
        `elapsed_seconds`. The same on all ranks.

    Raises:
        DataError: lm-eval, a task, its data or the tokenizer is missing, or `tp` does not fit.
        CheckpointError: The checkpoint is damaged.
        RunError: Another rank has exited.
    """
    from megagrow.evaluation.evaluator import require_lm_eval

    require_lm_eval()
    from megagrow.evaluation.launched import watched_topology
    from megagrow.evaluation.runner import evaluate_checkpoint

    with watched_topology(tp) as topology:
        return evaluate_checkpoint(
            Path(checkpoint),
            tuple(tasks),
            topology,
            data_dir=None if data_dir is None else Path(data_dir),
            batch_size=batch_size,
            limit=limit,
            tokenizer=tokenizer,
            dtype=dtype,
        )


def make_console(verbose: bool) -> "Console":
    """Return a console that prints to stdout, or nothing if not `verbose`."""
    from rich.console import Console

    return Console(quiet=not verbose)
