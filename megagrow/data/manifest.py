"""manifest.json of a prepared corpus: sources, contents, file sizes and checksums."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from megagrow.common.atomic_files import write_text
from megagrow.common.checksums import FileRecord, Files
from megagrow.common.json_text import FILE_BYTES, parse_json, read_limited
from megagrow.common.safe_paths import is_inner_path
from megagrow.errors import DataError

NAME = "manifest.json"
FORMAT: Final = "megagrow corpus 1"


class Split(BaseModel):
    """Contents of PREFIX.bin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    """Number of tokens, including EOS tokens."""
    max_token_id: int


def _record_of(value: Any) -> FileRecord:
    return value if isinstance(value, FileRecord) else FileRecord.from_json(value, "blake2b")


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
    vocab_size: int
    eos_id: int
    sequence_length: int | None = None
    """Row length into which examples are packed; instruction corpora only."""
    splits: dict[str, Split]
    """Contents by prefix name: train, validation."""
    files: dict[str, _Record]
    """Files by path relative to the manifest's folder."""

    @classmethod
    def next_to(cls, prefix: Path) -> Self | None:
        """Read the manifest in the folder of a corpus.

        Returns None if it is absent or written by another program. Raises DataError if damaged.
        """
        path = prefix.parent / NAME
        if not path.is_file():
            return None
        try:
            content = parse_json(read_limited(path, FILE_BYTES, DataError))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                return None
            manifest = cls.model_validate(content)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path}: damaged; delete it or prepare the corpus again") from error
        for name in (manifest.tokenizer, *manifest.files):
            if not is_inner_path(name):
                raise DataError(f"{path}: refers to {name[:100]!r}, which is not in its folder")
        return manifest

    @classmethod
    def describing(cls, prefix: Path) -> Self | None:
        """Read the manifest that describes the corpus at `prefix`.

        Returns None if there is none, or if it describes other corpora in the folder only. Raises
        DataError if damaged.
        """
        manifest = cls.next_to(prefix)
        return manifest if manifest is not None and prefix.name in manifest.splits else None

    def write(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        write_text(folder / NAME, self.model_dump_json(indent=2) + "\n")

    def is_complete(self, folder: Path) -> bool:
        """Return True if all files exist with the recorded sizes (for checksums see `verify`)."""
        paths = {folder / name: record.size for name, record in self.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def verify(output: Path) -> CorpusManifest:
    """Verify the checksums of a prepared corpus. Raises DataError for the first mismatch."""
    manifest = CorpusManifest.next_to(output / NAME)
    if manifest is None:
        raise DataError(f"{output}: no {NAME}; `megagrow prepare` has not completed this folder")
    for name, record in manifest.files.items():
        path = output / name
        if not path.is_file():
            raise DataError(f"{path}: missing; prepare the corpus again")
        if FileRecord.of(path, "blake2b") != record:
            raise DataError(f"{path}: checksum mismatch; prepare the corpus again")
    return manifest
