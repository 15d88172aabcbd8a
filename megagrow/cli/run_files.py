"""Commands about run files: `megagrow init`, `megagrow plan` and `megagrow config`."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.options import JsonOutput, Overrides, RunFile, count, existing_folder
from megagrow.common.tables import (
    print_json,
    print_lines,
    print_table,
    stdout_to_stderr,
    table_console,
)
from megagrow.errors import ConfigError, DataError

config_app = typer.Typer(help="Inspect run files.", no_args_is_help=True)

SECTIONS = {
    "recipe": "",
    "demo": "demo",
    "large": "large",
    "model": "model",
    "data": "data",
    "hardware": "hardware",
    "operator": "operators",
}
"""Kind of a file -> its folder in configs/."""


def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(help="Number of ranks; default: 1, or those of --cluster.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Predict the speed on a cluster of GPUs x nodes, such as h100:4x1, or of a file."
        ),
    ] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="List the fastest layouts that fit the cluster.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="GPU of each rank, such as h100.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory per GPU, such as 80GB; default: the GPU's.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="With --gpu: model FLOP utilization, such as 0.4.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Use the measured throughput of a run.")
    ] = None,
    watts: Annotated[float | None, typer.Option(help="Power per GPU; default: its TDP.")] = None,
    pue: Annotated[
        float, typer.Option(help="Energy of the data center / energy of the computers.")
    ] = 1.2,
    co2: Annotated[float, typer.Option(help="CO2 emissions, kg per kWh.")] = 0.48,
    price: Annotated[float | None, typer.Option(help="Price of one GPU-hour.")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Print the plan of a run without starting it: sizes, FLOPs, memory per rank, costs."""
    from megagrow.config.load import load_run

    with stdout_to_stderr(as_json) as stdout:
        run = load_run(run_file, overrides or ())
        from megagrow.planning.request import PlanRequest, plan_document, plan_request
        from megagrow.planning.tables import print_plan

        request = PlanRequest(
            world, gpu, gpu_memory, mfu, measured, watts, pue, co2, price, cluster, layouts
        )
        result = plan_request(run, request)
        if as_json:
            print_json(plan_document(result), stdout)
        else:
            print_plan(result, table_console())


@config_app.command()
def show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print a run file with all includes and defaults resolved."""
    from megagrow.config.load import load_run, to_yaml

    print(to_yaml(load_run(run_file, overrides or ())), end="")


@config_app.command("ls")
def list_files() -> None:
    """List the run files, models, data sets and hardware profiles that are found by name."""
    from megagrow.config.includes import files_in

    rows = [
        (kind, f"{section}/{name}" if kind in ("demo", "large") else name, _first_comment(file))
        for kind, section in SECTIONS.items()
        for name, file in sorted(files_in(section).items())
    ]
    print_table(table_console(), ("kind", "name", "content"), rows)


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of run files, for completion and error marks in editors."""
    from megagrow.config.json_schema import run_schema

    print(json.dumps(run_schema(), indent=2))


def _first_comment(file: Path) -> str:
    """Return the text of a file's first comment, "" without one."""
    with file.open(encoding="utf-8") as lines:
        comments = (line[1:].strip() for line in lines if line.startswith("# "))
        return next(comments, "")


def init(
    corpus: Annotated[
        Path,
        typer.Argument(help="Folder written by `megagrow prepare`.", callback=existing_folder),
    ],
    size: Annotated[
        int, typer.Option(parser=count, help="Parameters of the grown model, such as 10M.")
    ],
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=count, help="Tokens of the run. Default: 20 per parameter, at most 4 epochs."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Run file to write.")] = Path("run.yaml"),
) -> None:
    """Write a commented run file that grows a model of a size on a corpus."""
    from megagrow.common.atomic_files import write_text
    from megagrow.config.load import load_run
    from megagrow.config.run_file_template import PreparedCorpus, run_file
    from megagrow.data.manifest import CorpusManifest

    if output.exists():
        raise ConfigError(f"{output} exists; remove it or give another file with --output")
    manifest = CorpusManifest.read(corpus)
    if manifest is None or "train" not in manifest.splits:
        raise DataError(f"{corpus}: no corpus; give the --output folder of megagrow prepare")
    validation = manifest.splits.get("validation")
    prepared = PreparedCorpus(
        corpus,
        manifest.tokenizer,
        manifest.vocab_size,
        tokens=manifest.splits["train"].tokens,
        validation_tokens=0 if validation is None else validation.tokens,
    )
    write_text(output, run_file(prepared, size, tokens, output.stem))
    load_run(output)
    commands = [f"  megagrow {name} {shlex.quote(str(output))}" for name in ("plan", "train")]
    print_lines(table_console(), [f"{output} written. Next:", *commands])
