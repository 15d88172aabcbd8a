"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.common.sizes import parse_count
from megagrow.errors import CheckpointError, DataError


def existing_folder(path: Path) -> Path:
    """Return the path, checked before a command imports torch."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    return path


def existing_paths(paths: list[Path]) -> list[Path]:
    """Return the paths, checked before a command imports torch."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or directory")
    return paths


def count(text: str) -> int:
    """Return the number of 1 or more in a text such as `32k` or `2M`."""
    try:
        number = parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if number < 1:
        raise typer.BadParameter("should be 1 or more")
    return number


RunFile = Annotated[
    Path, typer.Argument(help="Run file (YAML), or a name of `config ls`.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, such as parallel.zero_stage=3."
    ),
]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON document; log lines go to stderr.")
]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint, or run directory (newest checkpoint).",
        show_default=False,
        callback=existing_folder,
    ),
]
AnySource = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint, run directory (newest checkpoint), or Hugging Face folder.",
        show_default=False,
        callback=existing_folder,
    ),
]
RunDirectory = Annotated[
    Path,
    typer.Argument(
        help="Run directory, or folder of checkpoints.",
        show_default=False,
        callback=existing_folder,
    ),
]
RunDirectories = Annotated[
    list[Path],
    typer.Argument(help="Run directories.", show_default=False, callback=existing_paths),
]
OutputPath = Annotated[
    Path, typer.Argument(help="Checkpoint or folder to write.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Model file or published name. Required if the files do not define it."
    ),
]

# Options of commands that run a model on the launched ranks.
RunTokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Tokenizer. Default: the tokenizer of the run."),
]
LaunchedTensorParallel = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")]
ForwardDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16. Default: bfloat16 on GPUs."),
]

_DP = typer.Option("--dp", min=1, help="Data-parallel ranks.")
_TP = typer.Option("--tp", min=1, help="Tensor-parallel ranks.")
# Layout options for a source that has a layout, which is the default.
ZeroStage = Annotated[
    int | None,
    typer.Option("--zero-stage", min=0, max=3, help="ZeRO stage. Default: SOURCE's."),
]
DataParallel = Annotated[int | None, _DP]
TensorParallel = Annotated[int | None, _TP]
WeightDecayOn = Annotated[
    str | None,
    typer.Option("--weight-decay-on", help="Optimizer groups: all or matrices. Default: SOURCE's."),
]
# Layout options for a source without a layout.
NewZeroStage = Annotated[int, typer.Option("--zero-stage", min=0, max=3, help="ZeRO stage.")]
NewDataParallel = Annotated[int, _DP]
NewTensorParallel = Annotated[int, _TP]
NewWeightDecayOn = Annotated[
    str,
    typer.Option(
        "--weight-decay-on",
        help="Optimizer groups: all or matrices, as in the run that resumes from it.",
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Dtype of exported weights: float32, float16 or bfloat16.")
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", help="Maximum size of a Hugging Face file.")
]
Memory = Annotated[str, typer.Option("--memory", help="Memory limit for tensors.")]
