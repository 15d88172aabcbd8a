"""`megagrow convert` for DeepSpeed's Universal Checkpoints and Megatron-LM's checkpoints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megagrow.cli.convert import request_of

Output = Annotated[Path, typer.Argument(help="What to write.", show_default=False)]
Ours = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint, a run directory (its newest), or a Hugging Face folder.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="The model: a file or a name. Needed where the files do not say it."),
]
ZeroStage = Annotated[int, typer.Option(min=0, max=3, help="Of the checkpoint.")]
Dp = Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")]
Decay = Annotated[str, typer.Option(help="all or matrices, as the run that goes on says.")]
Memory = Annotated[str, typer.Option(help="What may be held in memory.")]


def add_formats(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    for command in (universal_import, universal_export, megatron_import, megatron_export):
        app.command(command.__name__.replace("_", "-"))(command)


def universal_export(source: Ours, out: Output) -> None:
    """Write a DeepSpeed Universal Checkpoint: weights, Adam's moments and step."""
    from megagrow.offline.convert_formats import export_universal

    export_universal(source, out, Console())


def universal_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder with latest_universal, or that of one step.", show_default=False
        ),
    ],
    out: Output,
    model: Model = None,
    zero_stage: ZeroStage = 1,
    dp: Dp = 1,
    tp: Tp = 1,
    weight_decay_on: Decay = "all",
    memory: Memory = "512MiB",
) -> None:
    """Make a checkpoint of a DeepSpeed Universal Checkpoint."""
    from megagrow.offline.convert_formats import import_universal

    layout = {"zero_stage": zero_stage, "dp": dp, "tp": tp, "weight_decay_on": weight_decay_on}
    request = request_of(source, out, "checkpoint", memory, to=model, **layout)
    import_universal(request, Console())


def megatron_export(
    source: Ours,
    out: Output,
    tp: Tp = 1,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(min=1, help="Pads the vocabulary, times --tp, as in Megatron-LM.")
    ] = 128,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16.")] = "float32",
) -> None:
    """Write the weights for Megatron-LM (--ckpt-format torch, names of its core)."""
    from megagrow.offline.convert_formats import export_megatron

    export_megatron(
        source,
        out,
        tp=tp,
        divisible_by=make_vocab_size_divisible_by,
        dtype=dtype,
        console=Console(),
    )


def megatron_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder with latest_checkpointed_iteration.txt, or that of one iteration.",
            show_default=False,
        ),
    ],
    out: Output,
    model: Model = None,
    zero_stage: ZeroStage = 1,
    dp: Dp = 1,
    tp: Tp = 1,
    weight_decay_on: Decay = "all",
    memory: Memory = "512MiB",
) -> None:
    """Make a checkpoint of Megatron-LM's weights (torch format, names of its core or older)."""
    from megagrow.offline.convert_formats import import_megatron

    layout = {"zero_stage": zero_stage, "dp": dp, "tp": tp, "weight_decay_on": weight_decay_on}
    request = request_of(source, out, "checkpoint", memory, to=model, **layout)
    import_megatron(request, Console())
