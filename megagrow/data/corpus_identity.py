"""Identity of a corpus: digests of its tokens and of its tokenizer, independent of its path."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, WrapSerializer

from megagrow.config.schema import CorpusConfig, RunConfig
from megagrow.config.sections import Section, sets_as_written, sets_by_name
from megagrow.data.indexed import CorpusFile, with_suffix
from megagrow.data.manifest import CorpusManifest
from megagrow.data.tokenizers import gives_same_ids, load_tokenizer
from megagrow.errors import DataError, InputError

BLOCK_BYTES = 1 << 14
BLOCKS = 64
"""Blocks per file that `_sampled` reads: 1 MiB."""
OWNERS_NAMED = 3
"""Maximum number of corpora named in a warning."""
SUFFIXES = (".idx", ".bin", ".mask.idx", ".mask.bin")


@dataclass(frozen=True)
class UsedTokenizer:
    """Tokenizer of a corpus or of a run; equal for a moved or copied one."""

    checksum: str
    path: Path = field(compare=False)


@dataclass(frozen=True)
class CorpusIdentity:
    """Identity of a corpus; equal for a moved or copied corpus."""

    content: str
    """Digest of tokens, document boundaries and masks, `checksum:HEX` or `sampled:HEX`."""
    tokenizer: UsedTokenizer | None
    """None if unknown."""


def corpus_identity(prefix: Path) -> CorpusIdentity:
    """Return the identity of the corpus PREFIX.bin and PREFIX.idx, reading at most 4 MiB.

    With a manifest, `content` is a digest of the recorded checksums; the files are checked for
    their sizes only. A corpus of another program has no manifest: `content` is then a digest of
    the sizes of the files and of BLOCKS blocks of each, evenly spread from its start to its end,
    so a change between these blocks that keeps the size is not detected.

    Raises DataError if a file is missing or its size differs from the manifest.
    """
    manifest = CorpusManifest.describing(prefix)
    if manifest is None:
        return CorpusIdentity(f"sampled:{_digest(_sampled(prefix))}", None)
    recorded = _recorded(prefix, manifest)
    tokenizer = UsedTokenizer(manifest.tokenizer_checksum, prefix.parent / manifest.tokenizer)
    return CorpusIdentity(f"checksum:{_digest(recorded)}", tokenizer)


def corpus_identities(run: RunConfig) -> dict[str, CorpusIdentity]:
    """Return the identities of all corpora by path. Raises DataError for a damaged corpus."""
    lists = (*(stage.data.train for stage in run.stages), *run.data.validation.values())
    paths = dict.fromkeys(str(corpus.path) for corpora in lists for corpus in corpora)
    return {path: corpus_identity(Path(path)) for path in paths}


def _of_stages(train: object) -> object:
    """Return the identities recorded by earlier versions, which are those of all stages."""
    flat = isinstance(train, list) and all(isinstance(each, str) for each in train)
    return [train] if flat else train


class Contents(Section):
    """Identities of a run's data, recorded in checkpoints as `environment.contents`."""

    train: Annotated[list[list[str]], Field(min_length=1), BeforeValidator(_of_stages)]
    """Corpora of each stage; those of the last entry belong to all later stages too."""
    validation: Annotated[
        dict[str, list[str]], BeforeValidator(sets_by_name), WrapSerializer(sets_as_written)
    ]
    tokenizer: str | None
    """Checksum; None if neither the run nor its corpora name a tokenizer."""

    def of_stage(self, index: int) -> list[str]:
        """Return the identities of the training corpora of a stage."""
        return self.train[min(index, len(self.train) - 1)]


def data_contents(
    run: RunConfig, identities: Mapping[str, CorpusIdentity], tokenizer: str | None
) -> Contents:
    """Return the contents of a run from the identities of its corpora by path and its tokenizer."""

    def contents(corpora: Sequence[CorpusConfig]) -> list[str]:
        return [identities[str(corpus.path)].content for corpus in corpora]

    train = [contents(stage.data.train) for stage in run.stages]
    validation = {name: contents(corpora) for name, corpora in run.data.validation.items()}
    return Contents(train=train, validation=validation, tokenizer=tokenizer)


def one_tokenizer(used: Mapping[str, UsedTokenizer | None]) -> str | None:
    """Return the checksum of the tokenizer of a run, None if it is unknown.

    `used` are the tokenizers by owner as named in messages: prefixes of corpora, `data.tokenizer =
    FILE`. None is an unknown tokenizer. Raises DataError if two of them give different ids; those
    with different checksums are loaded and compared.
    """
    known = {owner: tokenizer for owner, tokenizer in used.items() if tokenizer is not None}
    if not known:
        return None
    first, reference = next(iter(known.items()))
    accepted = {reference}
    for owner, tokenizer in known.items():
        if tokenizer not in accepted and not _give_same_ids(tokenizer, reference):
            raise DataError(
                f"{owner}: another tokenizer (checksum {tokenizer.checksum[:12]}) than {first} "
                f"({reference.checksum[:12]}); the ids of one have other meanings in the other: "
                "prepare all corpora with one tokenizer and set data.tokenizer to it (a corpus has "
                "its tokenizer in its folder)"
            )
        accepted.add(tokenizer)
    return reference.checksum


def _give_same_ids(one: UsedTokenizer, other: UsedTokenizer) -> bool:
    """Return True if both tokenizers can be loaded and give the same ids."""
    try:
        return gives_same_ids(load_tokenizer(one.path), load_tokenizer(other.path))
    except InputError:
        return False


def unknown_tokenizer_warning(used: Mapping[str, UsedTokenizer | None]) -> str | None:
    """Return a warning that names the owners of unknown tokenizers, if there is a second owner."""
    unknown = [owner for owner, tokenizer in used.items() if tokenizer is None]
    if not unknown or len(used) == 1:
        return None
    named = ", ".join(unknown[:OWNERS_NAMED])
    more = len(unknown) - OWNERS_NAMED
    return (
        f"{named}{f' and {more} more' if more > 0 else ''}: no tokenizer is recorded (no "
        "manifest.json of megagrow prepare), so it cannot be compared with the other corpora's and "
        "data.tokenizer"
    )


def _recorded(prefix: Path, manifest: CorpusManifest) -> Iterator[bytes]:
    """Yield the recorded sizes and checksums of the files."""
    for suffix in SUFFIXES:
        path = with_suffix(prefix, suffix)
        record = manifest.files.get(path.name)
        if record is None:
            continue
        size = CorpusFile(path).size
        if size != record.size:
            raise DataError(
                f"{path}: {size} bytes, its manifest records {record.size}; copy the corpus again "
                "with its manifest.json, or prepare it again"
            )
        yield f"{suffix} {size} {record.checksum}".encode()


def _sampled(prefix: Path) -> Iterator[bytes]:
    """Yield sizes and blocks of the files."""
    for suffix in SUFFIXES:
        path = with_suffix(prefix, suffix)
        if suffix.startswith(".mask") and not path.is_file():
            continue
        file = CorpusFile(path)
        yield f"{suffix} {file.size}".encode()
        last = max(file.size - BLOCK_BYTES, 0)
        for start in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            yield file.read(start, min(BLOCK_BYTES, file.size))


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
