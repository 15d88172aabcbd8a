"""Which tokens of an instruction corpus are answer: a second corpus beside it, PREFIX.mask.

PREFIX.mask.bin and PREFIX.mask.idx are of the same indexed format, uint8, and as long as the
tokens: 1 where a token is answer. So the mask is read through a stream of its own, which goes
through the same blocks as that of the tokens.
"""

from collections.abc import Sequence
from pathlib import Path

from megagrow.config.schema import CorpusConfig
from megagrow.data.indexed import IndexedCorpus, with_suffix
from megagrow.data.manifest import Manifest
from megagrow.data.stream import TokenStream
from megagrow.errors import InputError


def mask_prefix(prefix: Path) -> Path:
    """The prefix of the mask that stands beside a corpus."""
    return with_suffix(prefix, ".mask")


def open_mask(
    stream: TokenStream, corpora: Sequence[CorpusConfig], seed: int, length: int, shuffle: bool
) -> TokenStream:
    """The stream of the masks of `stream`, which was opened with the same arguments: its label at
    a position is 1 where the stream's label is answer.

    Errors: InputError if a mask is missing, damaged or of another length than its corpus, or if
    the examples were packed into rows that are not `length` long.
    """
    masks = [_opened(corpus, length) for corpus in stream.corpora]
    return TokenStream(masks, [corpus.weight for corpus in corpora], seed, length, shuffle)


def _opened(corpus: IndexedCorpus, length: int) -> IndexedCorpus:
    prefix = mask_prefix(corpus.prefix)
    missing = next(
        (p for s in (".bin", ".idx") if not (p := with_suffix(prefix, s)).is_file()), None
    )
    if missing is not None:
        raise InputError(
            f"{missing}: no such file; stage: sft needs a mask beside its corpus: prepare it with "
            "megagrow prepare-sft"
        )
    mask = IndexedCorpus(prefix)
    if mask.num_tokens != corpus.num_tokens:
        raise InputError(
            f"{prefix}.bin: {mask.num_tokens} tokens are masked, the corpus has "
            f"{corpus.num_tokens}; prepare it again"
        )
    manifest = Manifest.beside(corpus.prefix)
    packed = manifest.sequence_length if manifest else None
    if packed not in (None, length):
        raise InputError(
            f"{corpus.prefix}: its examples stand in rows of {packed} tokens, "
            f"data.sequence_length is {length}; make them equal"
        )
    return mask
