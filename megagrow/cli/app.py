"""Assembly of the `megagrow` command line and its entry point."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megagrow import __version__
from megagrow.cli.checkpoint import checkpoint_app
from megagrow.cli.convert import convert_app
from megagrow.cli.doctor import doctor
from megagrow.cli.evaluate import evaluate
from megagrow.cli.fit import fit_app
from megagrow.cli.generate import generate
from megagrow.cli.options import (
    AnySource,
    DataParallel,
    Dtype,
    Memory,
    OutputPath,
    ShardSize,
    TensorParallel,
    WeightDecayOn,
    ZeroStage,
)
from megagrow.cli.report import report, watch
from megagrow.cli.run_files import config_app, init, plan
from megagrow.cli.train import prepare, prepare_instructions, train
from megagrow.common.log_setup import configure_logging
from megagrow.common.tables import escape_unencodable, table_console
from megagrow.errors import InputError, PeerLost, ResourceError, RunError

app = typer.Typer(no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
app.add_typer(fit_app, name="fit")
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("train")(train)
app.command("init")(init)
app.command("plan")(plan)
app.command("prepare")(prepare)
app.command("prepare-sft")(prepare_instructions)
app.command("doctor")(doctor)
app.command("report")(report)
app.command("watch")(watch)

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Base class of the errors of a command line, which typer does not export."""

REPORTER_GRACE_SECONDS = 20.0
"""Delay before a failing rank that prints no message exits.

Some launchers kill all ranks when one exits. The delay lets the reporting rank print its message
first; the launcher ends this rank when the reporting rank exits."""


def _print_version(requested: bool) -> None:
    if requested:
        print(f"megagrow {__version__}")
        raise typer.Exit


@app.callback()
def megagrow(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a language model by growing it."""
    # The deepspeed launcher passes --local_rank; LOCAL_RANK has the same value.
    configure_logging()


@app.command()
def grow(
    source: AnySource,
    out: OutputPath,
    to: Annotated[str, typer.Option(help="Target: a published model, a model file or a run file.")],
    stage: Annotated[
        int | None,
        typer.Option(help="Stage of the run file; default: the stage after SOURCE's."),
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option(help="Growth operator; once per axis.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="growth.KEY=VALUE", help="Override a growth option."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of random entries; default: the run's.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="checkpoint or huggingface; default: SOURCE's.")
    ] = None,
    zero_stage: ZeroStage = None,
    dp: DataParallel = None,
    tp: TensorParallel = None,
    weight_decay_on: WeightDecayOn = None,
    dtype: Dtype = "float32",
    shard_size: ShardSize = "5GB",
    memory: Memory = "1GiB",
    text: Annotated[
        Path | None, typer.Option(help="Report the loss on this text before and after.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer for --text and for a Hugging Face folder.")
    ] = None,
) -> None:
    """Grow a checkpoint from file to file; no GPU, bounded memory."""
    from megagrow.offline.grow import grow_files
    from megagrow.offline.request import Request

    request = Request(
        source=source,
        out=out,
        to=to,
        stage=stage,
        operators=tuple(operator or ()),
        overrides=tuple(overrides or ()),
        seed=seed,
        form=form,
        zero_stage=zero_stage,
        dp=dp,
        tp=tp,
        weight_decay_on=weight_decay_on,
        dtype=dtype,
        shard_size=shard_size,
        memory=memory,
        text=text,
        tokenizer=tokenizer,
    )
    grow_files(request, table_console())


def main() -> None:
    """Run the command line; print a user error once per host, on one line, with exit code 2.

    A file that cannot be accessed (permissions, a name that is too long) is a user error wherever
    it is found.
    """
    escape_unencodable()
    # torch reads it on import: without it, it prints a C++ stack trace if rank 0 is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        sys.exit(app(prog_name="megagrow", standalone_mode=False) or 0)
    except UsageError as error:
        _report_usage(error)
        sys.exit(InputError.code)
    except InputError as error:
        _report_once(f"error: {error}")
        sys.exit(error.code)
    except PeerLost as error:
        _report(f"error: {error}", error.is_reporter)
        sys.exit(error.code)
    except RunError as error:
        _report_once(f"error: {error}")
        sys.exit(error.code)
    except OSError as error:
        if error.filename is None:
            raise
        _report_once(f"error: {ResourceError(f'{error.filename}: {error.strerror}')}")
        sys.exit(ResourceError.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _report_usage(error: Any) -> None:
    """Report a wrong command line. A group without a command has printed its help."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message.replace("Value error, ", "").replace(": Input should", ": should")
    if message:
        _report_once(f"error: {message}; see {error.ctx.command_path} --help")


def _report_once(text: str) -> None:
    from megagrow.parallel.launch import read_launch

    try:
        first = read_launch().local_rank == 0
    except InputError:
        first = True
    _report(text, first)


def _report(text: str, is_reporter: bool) -> None:
    """Print a message on the reporting rank; on other ranks, wait until it is printed."""
    from megagrow.parallel.launch import launcher_kills_all_ranks, record_failure

    if is_reporter:
        print(text, file=sys.stderr, flush=True)
        record_failure(text)
    elif launcher_kills_all_ranks():
        time.sleep(REPORTER_GRACE_SECONDS)
