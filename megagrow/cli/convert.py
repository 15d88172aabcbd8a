"""The command line's `megagrow convert`: a model in another layout, or in other tools' formats."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from megagrow.offline.request import Request

convert_app = typer.Typer(
    help="Write a model in another layout or for other tools; no GPU, bounded memory.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Argument(help="What to write.", show_default=False)]
Checkpoint = Annotated[
    Path,
    typer.Argument(help="A checkpoint, or a run directory (its newest).", show_default=False),
]
ZeroStage = Annotated[int | None, typer.Option(min=0, max=3, help="Default: SOURCE's.")]
DataParallel = Annotated[int | None, typer.Option("--dp", min=1, help="Data-parallel ranks.")]
TensorParallel = Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")]
WeightDecayOn = Annotated[
    str | None, typer.Option(help="all or matrices: the optimizer's groups. Default: SOURCE's.")
]
Memory = Annotated[str, typer.Option(help="What may be held in memory.")]

MEMORY = "512MiB"


@convert_app.command()
def reshard(
    source: Checkpoint,
    out: Out,
    zero_stage: ZeroStage = None,
    dp: DataParallel = None,
    tp: TensorParallel = None,
    weight_decay_on: WeightDecayOn = None,
    memory: Memory = MEMORY,
) -> None:
    """Write a checkpoint in another layout, optimizer state included."""
    from megagrow.offline.convert import reshard_files

    layout = {"zero_stage": zero_stage, "dp": dp, "tp": tp, "weight_decay_on": weight_decay_on}
    reshard_files(request_of(source, out, "checkpoint", memory, **layout), Console())


@convert_app.command("hf-export")
def hf_export(
    source: Checkpoint,
    out: Out,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    shard_size: Annotated[str, typer.Option(help="Size of a file, at most.")] = "5GB",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A SentencePiece .model, a tokenizer.json or a Hugging Face folder. Default: that "
            "of SOURCE's run."
        ),
    ] = None,
    memory: Memory = MEMORY,
) -> None:
    """Write a folder that Hugging Face's transformers loads: weights, configs, tokenizer."""
    from megagrow.offline.convert import export_hugging_face

    form = {"dtype": dtype, "shard_size": shard_size}
    request = request_of(source, out, "huggingface", memory, **form)
    export_hugging_face(request, tokenizer, Console())


@convert_app.command("hf-import")
def hf_import(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder of a Llama model.", show_default=False)
    ],
    out: Out,
    zero_stage: ZeroStage = None,
    dp: DataParallel = None,
    tp: TensorParallel = None,
    weight_decay_on: WeightDecayOn = None,
    memory: Memory = MEMORY,
) -> None:
    """Write a checkpoint with the weights of a Hugging Face folder, its moments zero, step 0."""
    from megagrow.offline.convert import import_hugging_face

    layout = {"zero_stage": zero_stage, "dp": dp, "tp": tp, "weight_decay_on": weight_decay_on}
    import_hugging_face(request_of(source, out, "checkpoint", memory, **layout), Console())


def request_of(source: Path, out: Path, form: str, memory: str, **options: Any) -> "Request":
    """What a command asks for."""
    from megagrow.offline.request import Request

    return Request(source=source, out=out, form=form, memory=memory, **options)
