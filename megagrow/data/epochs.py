"""Epochs: the number of times that a run reads each corpus."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megagrow.common.sizes import format_short
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import stage_tokens
from megagrow.data.batches import open_stream
from megagrow.data.stream import TokenStream

MANY_EPOCHS = 4
"""Up to here repeated tokens are almost as good as new ones (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class CorpusEpochs:
    """Tokens that a run reads of one corpus."""

    prefix: Path
    tokens: int
    """Tokens of the corpus."""
    read: int
    """Tokens read of it, with repetitions."""

    @property
    def epochs(self) -> float:
        return self.read / self.tokens

    def line(self) -> str:
        """Return a log line: path, size, epochs."""
        return (
            f"corpus {self.prefix} | {format_short(self.tokens)} tokens | {self.epochs:.2f} epochs"
        )

    def warning(self) -> str | None:
        """Return a warning if the corpus is repeated more often than is known to help."""
        if self.epochs <= MANY_EPOCHS:
            return None
        return (
            f"{self.prefix}: read for {self.epochs:.1f} epochs; repeated tokens lose their value "
            f"beyond about {MANY_EPOCHS} (Muennighoff et al. 2023, arXiv:2305.16264)"
        )


def stream_epochs(run: RunConfig, stream: TokenStream) -> tuple[CorpusEpochs, ...]:
    """Return the epochs of each corpus of the training stream, without tokens read by growths."""
    tokens = sum(stage_tokens(stage, run.data.sequence_length) for stage in run.stages)
    return tuple(
        CorpusEpochs(corpus.prefix, corpus.num_tokens, stream.tokens_read(index, tokens))
        for index, corpus in enumerate(stream.corpora)
    )


def epoch_warnings(run: RunConfig, epochs: Iterable[CorpusEpochs]) -> list[str]:
    """Return warnings about many epochs; instruction data is usually read several times."""
    if run.objective == "sft":
        return []
    return [warning for each in epochs if (warning := each.warning()) is not None]


def epoch_lines(run: RunConfig) -> list[str]:
    """Return the epochs of each training corpus and warnings. Raises DataError for a bad corpus."""
    stream = open_stream(run.data.train, run.seed, run.data.sequence_length)
    epochs = stream_epochs(run, stream)
    warnings = (f"Warning: {text}" for text in epoch_warnings(run, epochs))
    return [*(each.line() for each in epochs), *warnings]
