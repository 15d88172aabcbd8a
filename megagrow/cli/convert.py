"""`megagrow convert`: change the layout of a checkpoint, import and export other formats."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.options import (
    AnySource,
    CheckpointPath,
    DataParallel,
    Dtype,
    Memory,
    ModelOption,
    NewDataParallel,
    NewTensorParallel,
    NewWeightDecayOn,
    NewZeroStage,
    OutputPath,
    ShardSize,
    TensorParallel,
    WeightDecayOn,
    ZeroStage,
)
from megagrow.common.tables import table_console

convert_app = typer.Typer(
    help="Convert checkpoints between layouts and formats; no GPU, bounded memory.",
    no_args_is_help=True,
)

MEMORY = "512MiB"


@convert_app.command()
def reshard(
    source: CheckpointPath,
    out: OutputPath,
    zero_stage: ZeroStage = None,
    dp: DataParallel = None,
    tp: TensorParallel = None,
    weight_decay_on: WeightDecayOn = None,
    memory: Memory = MEMORY,
) -> None:
    """Write a checkpoint in another layout, optimizer state included."""
    from megagrow.api import reshard as reshard_checkpoint

    reshard_checkpoint(
        source,
        out,
        zero_stage=zero_stage,
        dp=dp,
        tp=tp,
        weight_decay_on=weight_decay_on,
        memory=memory,
        verbose=True,
    )


@convert_app.command("hf-export")
def hf_export(
    source: CheckpointPath,
    out: OutputPath,
    dtype: Dtype = "float32",
    shard_size: ShardSize = "5GB",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="SentencePiece .model, tokenizer.json or Hugging Face folder. Default: the "
            "tokenizer of SOURCE's run, corpora or original Hugging Face folder."
        ),
    ] = None,
    memory: Memory = MEMORY,
) -> None:
    """Write a folder for Hugging Face transformers: weights, configs, tokenizer."""
    from megagrow.api import export_hugging_face

    export_hugging_face(
        source,
        out,
        dtype=dtype,
        shard_size=shard_size,
        tokenizer=tokenizer,
        memory=memory,
        verbose=True,
    )


@convert_app.command("hf-import")
def hf_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face folder of a llama, mistral, qwen2, qwen3 or olmo2 model.",
            show_default=False,
        ),
    ],
    out: OutputPath,
    zero_stage: ZeroStage = None,
    dp: DataParallel = None,
    tp: TensorParallel = None,
    weight_decay_on: WeightDecayOn = None,
    memory: Memory = MEMORY,
) -> None:
    """Write a checkpoint of a Hugging Face folder's weights: step 0, optimizer moments zero."""
    from megagrow.api import import_hugging_face

    import_hugging_face(
        source,
        out,
        zero_stage=zero_stage,
        dp=dp,
        tp=tp,
        weight_decay_on=weight_decay_on,
        memory=memory,
        verbose=True,
    )


@convert_app.command("universal-export")
def universal_export(source: AnySource, out: OutputPath) -> None:
    """Write a DeepSpeed Universal Checkpoint: weights, Adam's moments and step."""
    from megagrow.offline.convert import export_universal

    export_universal(source, out, table_console())


@convert_app.command("universal-import")
def universal_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with latest_universal, or the folder of one step.", show_default=False
        ),
    ],
    out: OutputPath,
    model: ModelOption = None,
    zero_stage: NewZeroStage = 1,
    dp: NewDataParallel = 1,
    tp: NewTensorParallel = 1,
    weight_decay_on: NewWeightDecayOn = "all",
    memory: Memory = MEMORY,
) -> None:
    """Write a checkpoint from a DeepSpeed Universal Checkpoint."""
    from megagrow.offline.convert import import_universal
    from megagrow.offline.request import Request

    request = Request(
        source=source,
        out=out,
        form="checkpoint",
        to=model,
        zero_stage=zero_stage,
        dp=dp,
        tp=tp,
        weight_decay_on=weight_decay_on,
        memory=memory,
    )
    import_universal(request, table_console())


@convert_app.command("megatron-export")
def megatron_export(
    source: AnySource,
    out: OutputPath,
    tp: NewTensorParallel = 1,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(min=1, help="Pad the vocabulary to a multiple of this times --tp.")
    ] = 128,
    dtype: Dtype = "float32",
) -> None:
    """Write the weights for Megatron-LM (--ckpt-format torch, names of Megatron core)."""
    from megagrow.offline.convert import export_megatron

    export_megatron(
        source,
        out,
        tp=tp,
        divisible_by=make_vocab_size_divisible_by,
        dtype=dtype,
        console=table_console(),
    )


@convert_app.command("megatron-import")
def megatron_import(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with latest_checkpointed_iteration.txt, or the folder of one iteration.",
            show_default=False,
        ),
    ],
    out: OutputPath,
    model: ModelOption = None,
    zero_stage: NewZeroStage = 1,
    dp: NewDataParallel = 1,
    tp: NewTensorParallel = 1,
    weight_decay_on: NewWeightDecayOn = "all",
    memory: Memory = MEMORY,
) -> None:
    """Write a checkpoint from Megatron-LM weights (torch format, core or legacy names)."""
    from megagrow.offline.convert import import_megatron
    from megagrow.offline.request import Request

    request = Request(
        source=source,
        out=out,
        form="checkpoint",
        to=model,
        zero_stage=zero_stage,
        dp=dp,
        tp=tp,
        weight_decay_on=weight_decay_on,
        memory=memory,
    )
    import_megatron(request, table_console())
