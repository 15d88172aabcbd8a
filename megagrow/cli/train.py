"""`megagrow train`, and the preparation of its data: `megagrow prepare`, `megagrow prepare-sft`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megagrow import __version__
from megagrow.cli.options import Overrides, RunFile, count
from megagrow.common.gpu_specs import find_gpu
from megagrow.common.lasting_output import log_file, make_output_last
from megagrow.common.log_setup import LogLevel, configure_logging
from megagrow.common.tables import table_console
from megagrow.errors import ConfigError

if TYPE_CHECKING:
    from megagrow.config.schema import RunConfig

logger = logging.getLogger(__name__)

Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Read only these files of a folder; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Skip these files and folders; repeatable."),
]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="CONDITION",
        help="Read only records with KEY=VALUE or KEY!=VALUE; `a.b` is nested; repeatable.",
    ),
]
SkipInvalid = Annotated[
    bool, typer.Option("--skip-invalid", help="Skip and count records without a valid text.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another corpus in the output folder.")
]


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build one rank and print its plan; train nothing."),
    ] = False,
    world: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: number of ranks; default: 1.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="With --dry-run: rank to build; default: 0.")
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="With --dry-run: also simulate the rank's steps on a GPU."),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="With --dry-run: GPU for micro_batch_size: auto, such as h100."),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Resume although KEY, or a key below it, contradicts the checkpoint; repeatable; "
            "`all` allows every key.",
        ),
    ] = None,
    stop_code: Annotated[
        int, typer.Option(min=0, max=125, help="Exit code after a stop by a signal.")
    ] = 0,
    log_level: Annotated[
        LogLevel,
        typer.Option(help="Lowest severity printed by rank 0; other ranks print warnings."),
    ] = LogLevel.INFO,
) -> None:
    """Train a run, growth included; resumes from its newest checkpoint."""
    from megagrow.config.load import load_run
    from megagrow.config.resume_rules import check_allowed

    check_allowed(allow_change or ())
    if not dry_run and (world is not None or rank is not None):
        raise ConfigError("--world and --rank need --dry-run; the launcher sets them in a real run")
    for option, value in (("--simulate", simulate), ("--gpu", gpu)):
        if value and not dry_run:
            raise ConfigError(f"{option} needs --dry-run")
    run = load_run(run_file, overrides or ())
    if dry_run:
        _dry_run(run, world or 1, rank or 0, allow_change or (), simulate, gpu)
        return
    _open_log(run, log_level)
    from megagrow.run import train as train_run  # its libraries keep references to the streams

    if train_run(run, log_level, allow_change or ()) is not None:
        raise typer.Exit(stop_code)


def _dry_run(
    run: "RunConfig",
    world: int,
    rank: int,
    allowed: Sequence[str],
    simulate: bool,
    gpu: str | None,
) -> None:
    """Print the plan of one rank; raise the problems that prevent the run from starting."""
    from megagrow.planning.dry_run import dry_run
    from megagrow.planning.dry_run_tables import print_dry_run

    memory = None if gpu is None else find_gpu(gpu).memory
    result = dry_run(run, world, rank, allowed, simulate, memory)
    print_dry_run(result, table_console())
    _raise_problems(result.problems)


def _open_log(run: "RunConfig", log_level: str) -> None:
    """Set up the output and print the first line, before the slow imports."""
    from megagrow.parallel.launch import read_launch

    launch = read_launch()
    make_output_last(log_file(run.output_dir, launch.rank))
    configure_logging(log_level, launch.rank, launch.world_size)
    logger.info("run %s | megagrow %s | loading", run.name, __version__)


def _raise_problems(problems: Sequence[str]) -> None:
    """Raise the problems that a dry run has printed; a single one is repeated."""
    if problems:
        summary = problems[0] if len(problems) == 1 else f"{len(problems)} problems, see above"
        raise ConfigError(f"the run would not start: {summary}")


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders (text, JSON, JSON lines, Parquet; .gz, .zst, .bz2, .xz), "
            "hf:NAME[:CONFIG[:SPLIT]], or python-stdlib.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the prepared corpus.")],
    tokenizer: Annotated[
        str, typer.Option(help="`train`, or a SentencePiece model, or a Hugging Face tokenizer.")
    ],
    vocab_size: Annotated[
        int | None, typer.Option(parser=count, help="Size of a trained vocabulary, such as 32k.")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Fraction of the documents used for validation.")
    ] = 0.01,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes; default: all cores.")
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="JSON key or column of the text; `a.b` is nested.")
    ] = "text",
    seed: Annotated[int, typer.Option(help="Seed that selects the validation documents.")] = 1234,
    overwrite: Overwrite = False,
    include: Include = None,
    exclude: Exclude = None,
    filters: Filters = None,
    skip_invalid: SkipInvalid = False,
) -> None:
    """Tokenize text into the indexed format for training; resumable."""
    from megagrow.data.prepare import prepare as prepare_corpus

    prepare_corpus(
        sources,
        output,
        tokenizer,
        vocab_size,
        validation_fraction,
        workers,
        text_key,
        seed,
        overwrite=overwrite,
        include=include or (),
        exclude=exclude or (),
        filters=filters or (),
        skip_invalid=skip_invalid,
    )


def prepare_instructions(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Alpaca format: JSON lists or .jsonl of instruction, input, output.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the prepared instructions.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the model.")],
    sequence_length: Annotated[
        int,
        typer.Option(
            parser=count, help="Sequence length of the run; complete examples are packed into it."
        ),
    ],
    validation_fraction: Annotated[
        float, typer.Option(help="Fraction of the examples used for validation.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed that selects the validation examples.")] = 1234,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize instructions for supervised fine-tuning, with a loss mask of the answers."""
    from megagrow.data.sft_prepare import prepare_sft

    prepare_sft(
        files,
        output,
        tokenizer,
        sequence_length,
        validation_fraction,
        seed,
        overwrite=overwrite,
    )
