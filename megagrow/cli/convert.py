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
AnySource = Annotated[
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
NewZeroStage = Annotated[int, typer.Option(min=0, max=3, help="Of the checkpoint.")]
NewDataParallel = Annotated[int, typer.Option("--dp", min=1, help="Data-parallel ranks.")]
NewTensorParallel = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")]
NewWeightDecayOn = Annotated[
    str, typer.Option(help="all or matrices, as the run that goes on says.")
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


@convert_app.command("universal-export")
def universal_export(source: AnySource, out: Out) -> None:
    """Write a DeepSpeed Universal Checkpoint: weights, Adam's moments and step."""
    from megagrow.offline.convert import export_universal

    export_universal(source, out, Console())


@convert_app.command("universal-import")
def universal_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder with latest_universal, or that of one step.", show_default=False
        ),
    ],
    out: Out,
    model: Model = None,
    zero_stage: NewZeroStage = 1,
    dp: NewDataParallel = 1,
    tp: NewTensorParallel = 1,
    weight_decay_on: NewWeightDecayOn = "all",
    memory: Memory = MEMORY,
) -> None:
    """Make a checkpoint of a DeepSpeed Universal Checkpoint."""
    from megagrow.offline.convert import import_universal

    layout = {"zero_stage": zero_stage, "dp": dp, "tp": tp, "weight_decay_on": weight_decay_on}
    request = request_of(source, out, "checkpoint", memory, to=model, **layout)
    import_universal(request, Console())


@convert_app.command("megatron-export")
def megatron_export(
    source: AnySource,
    out: Out,
    tp: NewTensorParallel = 1,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(min=1, help="Pads the vocabulary, times --tp, as in Megatron-LM.")
    ] = 128,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16.")] = "float32",
) -> None:
    """Write the weights for Megatron-LM (--ckpt-format torch, names of its core)."""
    from megagrow.offline.convert import export_megatron

    export_megatron(
        source,
        out,
        tp=tp,
        divisible_by=make_vocab_size_divisible_by,
        dtype=dtype,
        console=Console(),
    )


@convert_app.command("megatron-import")
def megatron_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder with latest_checkpointed_iteration.txt, or that of one iteration.",
            show_default=False,
        ),
    ],
    out: Out,
    model: Model = None,
    zero_stage: NewZeroStage = 1,
    dp: NewDataParallel = 1,
    tp: NewTensorParallel = 1,
    weight_decay_on: NewWeightDecayOn = "all",
    memory: Memory = MEMORY,
) -> None:
    """Make a checkpoint of Megatron-LM's weights (torch format, names of its core or older)."""
    from megagrow.offline.convert import import_megatron

    layout = {"zero_stage": zero_stage, "dp": dp, "tp": tp, "weight_decay_on": weight_decay_on}
    request = request_of(source, out, "checkpoint", memory, to=model, **layout)
    import_megatron(request, Console())


def request_of(source: Path, out: Path, form: str, memory: str, **options: Any) -> "Request":
    """What a command asks for."""
    from megagrow.offline.request import Request

    return Request(source=source, out=out, form=form, memory=memory, **options)
