"""manifest.json of a prepared corpus: sources, contents, file sizes and checksums."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from megagrow.common.atomic_files import write_text
from megagrow.common.checksums import FileRecord, Files
from megagrow.common.json_text import FILE_BYTES, parse_json, read_limited
from megagrow.common.untrusted_values import Tally, is_inner_path
from megagrow.data.indexed import HEADER
from megagrow.errors import DataError, InputError

NAME = "manifest.json"
FORMAT: Final = "megagrow corpus 1"
REPLACING: Final = "megagrow corpus 1, being replaced"
INDEX_BYTES, DOCUMENT_BYTES = HEADER.size + 8, 20
"""Size of an index of documents of one sequence: these bytes and those of each document."""
LARGEST_ID = 2**31 - 1
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
Model = TypeVar("Model", bound=BaseModel)


class Split(BaseModel):
    """Contents of PREFIX.bin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: Tally
    tokens: Tally
    """Number of tokens, including EOS tokens."""
    max_token_id: Annotated[int, Field(strict=True, ge=-1, le=LARGEST_ID)]
    """-1 without tokens."""


def _record_of(value: Any) -> FileRecord:
    record = value if isinstance(value, FileRecord) else FileRecord.from_json(value, "blake2b")
    if not _CHECKSUM.fullmatch(record.checksum):
        raise ValueError("blake2b must be 64 hexadecimal digits")
    return record


_Record = Annotated[FileRecord, PlainValidator(_record_of), PlainSerializer(FileRecord.to_json)]


def corpus_files(folder: Path, paths: Iterable[Path]) -> Files:
    """Return the records of the files of a corpus by their paths relative to its folder."""
    return {str(path.relative_to(folder)): FileRecord.of(path, "blake2b") for path in paths}


class CorpusManifest(BaseModel):
    """Description of a prepared corpus, stored as manifest.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["megagrow corpus 1"] = FORMAT
    fingerprint: str
    """Fingerprint of the sources and options; equal fingerprints mean equal corpora."""
    sources: list[str]
    tokenizer: str
    """Entry of `files` from which the tokenizer is loaded."""
    tokenizer_checksum: str
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=LARGEST_ID + 1)]
    eos_id: Annotated[int, Field(strict=True, ge=0, le=LARGEST_ID)]
    sequence_length: Annotated[Tally, Field(ge=1)] | None = None
    """Row length into which examples are packed; instruction corpora only."""
    splits: dict[str, Split]
    """Contents by prefix name: train, validation."""
    skipped: dict[str, Tally] = {}
    """Number of documents of the sources that are not in the corpus, by reason."""
    files: dict[str, _Record]
    """Files by path relative to the manifest's folder."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Compare the numbers with each other."""
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is not below vocab_size {self.vocab_size}")
        for name, split in self.splits.items():
            self._check_split(name, split)
        return self

    def _check_split(self, name: str, split: Split) -> None:
        tokens, index = self.files.get(f"{name}.bin"), self.files.get(f"{name}.idx")
        if tokens is None or index is None:
            raise ValueError(f"files lacks {name}.bin or {name}.idx")
        if not 0 <= split.max_token_id < self.vocab_size:
            raise ValueError(
                f"splits.{name}: max_token_id {split.max_token_id} is not below vocab_size "
                f"{self.vocab_size}"
            )
        itemsize, rest = divmod(tokens.size, max(split.tokens, 1))
        if rest or itemsize not in (2, 4) or split.max_token_id >= 256**itemsize:
            raise ValueError(f"splits.{name}: {split.tokens} tokens are not {tokens.size} bytes")
        # Rows of instructions are filled with documents that are not counted.
        documents, rest = divmod(index.size - INDEX_BYTES, DOCUMENT_BYTES)
        expected = documents if self.sequence_length else split.documents
        if (
            rest
            or documents != expected
            or not 1 <= split.documents <= min(documents, split.tokens)
        ):
            raise ValueError(
                f"splits.{name}: {split.documents} documents are not {index.size} bytes of index"
            )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the manifest in the folder of corpora.

        Returns None if it is absent or written by another program. Raises DataError if it is
        damaged, or if the corpus is being replaced.
        """
        path = folder / NAME
        content = _content(path)
        if content.get("format") == REPLACING:
            raise DataError(
                f"{path}: the corpus is being replaced, or its replacement was interrupted; wait, "
                "or rerun the interrupted megagrow prepare to complete it"
            )
        if content.get("format") != FORMAT:
            return None
        manifest: Self = _validated(cls, content, path)
        _check_names(path, (manifest.tokenizer, *manifest.files))
        return manifest

    @classmethod
    def describing(cls, prefix: Path) -> Self | None:
        """Read the manifest that describes the corpus at `prefix`.

        Returns None if there is none, or if it describes other corpora in the folder only. Raises
        DataError if damaged.
        """
        manifest = cls.read(prefix.parent)
        return manifest if manifest is not None and prefix.name in manifest.splits else None

    @classmethod
    def tokenizer_of(cls, prefix: Path) -> Path | None:
        """Return the path of the tokenizer of the corpus at `prefix`, None if it is not recorded.

        Raises DataError if the manifest is damaged.
        """
        manifest = cls.describing(prefix)
        return None if manifest is None else prefix.parent / manifest.tokenizer

    def write(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        write_text(folder / NAME, self.model_dump_json(indent=2) + "\n")

    def is_complete(self, folder: Path) -> bool:
        """Return True if all files exist with the recorded sizes (for checksums see `verify`)."""
        paths = {folder / name: record.size for name, record in self.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


class Replacement(BaseModel):
    """Content of manifest.json while the files of a corpus are replaced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["megagrow corpus 1, being replaced"] = REPLACING
    manifest: CorpusManifest
    """Manifest of the new corpus."""
    obsolete: list[str]
    """Files of the previous corpus to remove, by path relative to the folder."""

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """Read the replacement of a corpus that has not been completed, None without one."""
        path = folder / NAME
        content = _content(path)
        if content.get("format") != REPLACING:
            return None
        found: Self = _validated(cls, content, path)
        _check_names(path, (found.manifest.tokenizer, *found.manifest.files, *found.obsolete))
        return found

    def write(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        write_text(folder / NAME, self.model_dump_json(indent=2) + "\n")


def _content(path: Path) -> dict[str, Any]:
    """Return the object in a file, an empty one if there is no file. Raises DataError."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(read_limited(path, FILE_BYTES, DataError))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _damaged(path) from error
    return content if isinstance(content, dict) else {}


def _validated(model: type[Model], content: dict[str, Any], path: Path) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        message = first["msg"].removeprefix("Value error, ")[:200]
        raise _damaged(path, f" ({f'{where}: ' if where else ''}{message})") from error


def _damaged(path: Path, reason: str = "") -> InputError:
    return DataError(f"{path}: damaged{reason}; delete it or prepare the corpus again")


def _check_names(path: Path, names: Iterable[str]) -> None:
    for name in names:
        if not is_inner_path(name):
            raise DataError(f"{path}: refers to {name[:100]!r}, which is not in its folder")


def verify(output: Path) -> CorpusManifest:
    """Verify the checksums of a prepared corpus. Raises DataError for the first mismatch."""
    manifest = CorpusManifest.read(output)
    if manifest is None:
        raise DataError(f"{output}: no {NAME}; `megagrow prepare` has not completed this folder")
    for name, record in manifest.files.items():
        path = output / name
        if not path.is_file():
            raise DataError(f"{path}: missing; prepare the corpus again")
        if FileRecord.of(path, "blake2b") != record:
            raise DataError(f"{path}: checksum mismatch; prepare the corpus again")
    return manifest
