"""The command line: prepare, train, grow, convert, checkpoint, eval, plan, doctor, report, fit."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megagrow.cli.checkpoint import checkpoint_app
from megagrow.cli.convert import convert_app
from megagrow.cli.doctor import doctor
from megagrow.cli.evaluate import evaluate
from megagrow.cli.fit import fit_app
from megagrow.cli.train import train
from megagrow.common.log_setup import configure_logging
from megagrow.common.tables import Overrides, RunFile, table_console
from megagrow.errors import ConfigError, InputError, PeerLost, RunError

app = typer.Typer(no_args_is_help=True, add_completion=False)
config_app = typer.Typer(help="Look at run files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
app.add_typer(fit_app, name="fit")
app.command("eval")(evaluate)
app.command("train")(train)
app.command("doctor")(doctor)

REPORT_SECONDS = 20.0
"""Delay before a rank that prints no error exits, so that the launcher does not kill the reporting
rank before it has printed. The launcher ends it as soon as that rank has exited."""


@app.callback()
def megagrow(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a language model by growing it."""
    # `local_rank` is set by the deepspeed launcher, and ignored: LOCAL_RANK has the same value.
    configure_logging()


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(help="Ranks that the run is to have; default: 1.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Predict its speed on h100:8x64 (8 to a node, 64 nodes), or a YAML's."),
    ] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="The fastest layouts that fit the cluster.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="Of each rank: h100, h200, a100 ...")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="80GB; default: the GPU's.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Of the GPU's FLOP/s, such as 0.4.")] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="As fast as this run was.")
    ] = None,
    watts: Annotated[float | None, typer.Option(help="Of a GPU; default: its TDP.")] = None,
    pue: Annotated[float, typer.Option(help="Energy of the data centre / computers.")] = 1.2,
    co2: Annotated[float, typer.Option(help="kg per kWh.")] = 0.48,
    price: Annotated[float | None, typer.Option(help="Of a GPU-hour.")] = None,
) -> None:
    """Show what a run is going to be: sizes, FLOPs, memory per rank, costs; starts nothing."""
    from megagrow.config.load import load_run
    from megagrow.planning.request import PlanRequest, answer
    from megagrow.planning.tables import show_answer

    request = PlanRequest(
        world, gpu, gpu_memory, mfu, measured, watts, pue, co2, price, cluster, layouts
    )
    answered = answer(load_run(run_file, overrides or ()), request)
    show_answer(answered, table_console())


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders (text, .jsonl[.gz|.zst], .parquet), hf:NAME[:CONFIG[:SPLIT]], "
            "or python-stdlib.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the prepared corpus.")],
    tokenizer: Annotated[
        str, typer.Option(help="`train`, a SentencePiece model, or a Hugging Face tokenizer.")
    ],
    vocab_size: Annotated[int | None, typer.Option(help="Size of a trained vocabulary.")] = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents.")] = 0.01,
    workers: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Decides which documents are validation.")] = 1234,
) -> None:
    """Tokenise text into the indexed format that runs read; resumable."""
    from megagrow.data.prepare import prepare as prepare_corpus

    prepare_corpus(
        sources, output, tokenizer, vocab_size, validation_fraction, workers, text_key, seed
    )


@app.command("prepare-sft")
def prepare_instructions(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Alpaca's format: JSON lists, or .jsonl, of instruction, input, output.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the prepared instructions.")],
    tokenizer: Annotated[str, typer.Option(help="The model's tokenizer.")],
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Of the run: whole examples are packed into it.")
    ],
    validation_fraction: Annotated[float, typer.Option(help="Share of the examples.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Decides which examples are validation.")] = 1234,
) -> None:
    """Tokenise instructions for runs with objective: sft, with a mask that says what is answer."""
    from megagrow.data.sft_prepare import prepare_sft

    prepare_sft(files, output, tokenizer, sequence_length, validation_fraction, seed)


@app.command()
def grow(
    source: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, a run directory (its newest), or a Hugging Face folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="The checkpoint or folder to write.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="The target: a model, its file, or a run file.")],
    stage: Annotated[
        int | None, typer.Option(help="Of the run file; default: the one after the source's.")
    ] = None,
    operator: Annotated[list[str] | None, typer.Option(help="Given once for each axis.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="growth.KEY=VALUE", help="An option of it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random numbers; default: the run's.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="checkpoint or huggingface; default: SOURCE's.")
    ] = None,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="Default: SOURCE's.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks.")] = None,
    weight_decay_on: Annotated[str | None, typer.Option(help="all or matrices.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Hugging Face: float32, float16, bfloat16.")
    ] = "float32",
    shard_size: Annotated[str, typer.Option(help="Hugging Face: size of a file.")] = "5GB",
    memory: Annotated[str, typer.Option(help="What may be held in memory.")] = "1GiB",
    text: Annotated[Path | None, typer.Option(help="Tell the losses on this text.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The tokenizer for it.")] = None,
) -> None:
    """Grow a checkpoint file to file, or write it in another layout; no GPU, bounded memory."""
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
    grow_files(request, Console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder of the page, the tables and the plots.")],
    against: Annotated[
        str | None, typer.Option(help="`paper`: the paper's results beside the runs.")
    ] = None,
) -> None:
    """Compare grown runs with runs from scratch: losses, FLOPs, measured speedup, as one page."""
    from megagrow.analysis.report import write_report

    if against not in (None, "paper"):
        raise ConfigError(f"--against {against}: give `paper`, or leave it out")
    write_report(runs, output, Console(), against_paper=against == "paper")


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print a run file with all its parts and defaults resolved."""
    from megagrow.config.load import load_run, to_yaml

    print(to_yaml(load_run(run_file, overrides or ())), end="")


def main() -> None:
    """Entry point. An InputError is one line on the first rank of each host, exit code 2."""
    try:
        app()
    except InputError as error:
        _report_once(f"error: {error}")
        sys.exit(2)
    except PeerLost as error:
        _report(f"error: {error}", error.is_reporter)
        sys.exit(error.code)
    except RunError as error:
        _report_once(f"error: {error}")
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _report_once(text: str) -> None:
    from megagrow.parallel.launch import read_launch

    try:
        first = read_launch().local_rank == 0
    except InputError:
        first = True
    _report(text, first)


def _report(text: str, is_reporter: bool) -> None:
    """Print an error line, or wait for the rank that prints it."""
    from megagrow.parallel.launch import launcher_kills_all_ranks

    if is_reporter:
        print(text, file=sys.stderr, flush=True)
    elif launcher_kills_all_ranks():
        time.sleep(REPORT_SECONDS)
