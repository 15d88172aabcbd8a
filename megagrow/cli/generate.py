"""`megagrow generate`: complete prompts with a checkpoint."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megagrow.cli.options import (
    AnySource,
    ForwardDtype,
    LaunchedTensorParallel,
    RunTokenizer,
    count,
)
from megagrow.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megagrow.evaluation.completion import CompletionOptions


def generate(
    checkpoint: AnySource,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable. May be empty.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text file with one prompt per line.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from the terminal; Ctrl-D ends.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(parser=count, help="Generated tokens per prompt.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divisor of the logits; 0 takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the K most likely tokens; 0: from all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the tokens with this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum probability relative to the highest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, help="Above 1: tokens in the text become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends a text; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled tokens.")] = 1234,
    tokenizer: RunTokenizer = None,
    tp: LaunchedTensorParallel = 1,
    dtype: ForwardDtype = None,
) -> None:
    """Continue prompts with a checkpoint of any layout, in one process or under torchrun."""
    if interactive == bool(prompt or prompts):
        raise ConfigError("give either prompts (--prompt TEXT, --prompts FILE) or --interactive")
    from megagrow.evaluation.evaluator import require_transformers

    require_transformers()
    from megagrow.evaluation.completion import CompletionOptions, read_prompts
    from megagrow.evaluation.generation import Sampling

    given = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    sampling = Sampling(temperature > 0, temperature, top_k, top_p, min_p, repetition_penalty)
    options = CompletionOptions(max_tokens, sampling, tuple(stop or ()), seed)
    _complete(None if interactive else given, options, checkpoint, tokenizer, tp, dtype)


def _complete(
    prompts: list[str] | None,
    options: "CompletionOptions",
    checkpoint: Path,
    tokenizer: str | None,
    tp: int,
    dtype: str | None,
) -> None:
    """Complete the prompts, or those that rank 0 reads from the terminal; print on rank 0."""
    from megagrow.evaluation.completion import Completer
    from megagrow.evaluation.launched import watched_topology
    from megagrow.evaluation.logprobs import ModelScorer
    from megagrow.evaluation.model import load_model
    from megagrow.formats.open_source import require_source
    from megagrow.parallel.agreement import run_on_rank_zero

    require_source(checkpoint)
    with watched_topology(tp) as topology:
        if topology.dp > 1:
            ranks = topology.dp * topology.tp
            raise ConfigError(f"generation is tensor parallel: use --tp {ranks} on {ranks} ranks")
        loaded = load_model(checkpoint, topology, tokenizer, dtype)
        length = loaded.config.max_position_embeddings
        scorer = ModelScorer(loaded, topology)
        completer = Completer(scorer, loaded.tokenizer, loaded.generation, length, options)
        writes, streams = topology.rank == 0, run_on_rank_zero(sys.stdout.isatty)
        asked = iter(lambda: run_on_rank_zero(_ask), None) if prompts is None else iter(prompts)
        for prompt in asked:
            _write(prompt, writes and prompts is not None)
            try:
                if streams:
                    completer.stream(prompt, lambda part: _write(part, writes))
                else:
                    _write(completer.complete([prompt])[0], writes)
            except DataError as error:  # the prompt fills the context, on all ranks
                if prompts is not None:
                    raise
                _write(f"error: {error}", writes)
            _write("\n\n", writes)


def _ask() -> str | None:
    """Return a line of the terminal, None at its end."""
    try:
        return input("> ")
    except EOFError:
        return None


def _write(text: str, writes: bool) -> None:
    if writes:
        sys.stdout.write(text)
        sys.stdout.flush()
