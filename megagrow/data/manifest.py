"""manifest.json of a prepared corpus: sources, contents, file sizes and checksums."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from megagrow.common.atomic_files import write_text
from megagrow.common.checksums import FileRecord, Files
from megagrow.common.json_text import parse_json
from megagrow.common.safe_paths import is_inner_path
from megagrow.errors import DataError

NAME = "manifest.json"
FORMAT: Final = "megagrow corpus 1"


class Split(BaseModel):
    """What PREFIX.bin holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    """EOS tokens included."""
    max_token_id: int


def _record_of(value: Any) -> FileRecord:
    return value if isinstance(value, FileRecord) else FileRecord.from_json(value, "blake2b")


_Record = Annotated[FileRecord, PlainValidator(_record_of), PlainSerializer(FileRecord.to_json)]


def corpus_files(folder: Path, paths: Iterable[Path]) -> Files:
    """Return the records of the files of a corpus by their paths relative to its folder."""
    return {str(path.relative_to(folder)): FileRecord.of(path, "blake2b") for path in paths}


class CorpusManifest(BaseModel):
    """A prepared corpus, as its manifest.json describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["megagrow corpus 1"] = FORMAT
    fingerprint: str
    """Of the sources and of everything that was asked for: the same one, the same corpus."""
    sources: list[str]
    tokenizer: str
    """Of the files below, the one to load the tokenizer from."""
    tokenizer_checksum: str
    vocab_size: int
    eos_id: int
    sequence_length: int | None = None
    """Of instructions: the length of the rows into which whole examples are packed."""
    splits: dict[str, Split]
    """By the name of the prefix: train, validation."""
    files: dict[str, _Record]
    """By the path from the manifest's folder."""

    @classmethod
    def beside(cls, prefix: Path) -> Self | None:
        """The manifest in the folder of a corpus; None if there is none, or another program's.

        Errors: InputError if it is damaged.
        """
        path = prefix.parent / NAME
        if not path.is_file():
            return None
        try:
            content = parse_json(path.read_bytes())
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                return None
            manifest = cls.model_validate(content)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path}: damaged; delete it or prepare the corpus again") from error
        for name in (manifest.tokenizer, *manifest.files):
            if not is_inner_path(name):
                raise DataError(f"{path}: names {name[:100]!r}, which is not in its folder")
        return manifest

    def write(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        write_text(folder / NAME, self.model_dump_json(indent=2) + "\n")

    def is_complete(self, folder: Path) -> bool:
        """Whether all files are there, with the right sizes (checksums: see `verify`)."""
        paths = {folder / name: record.size for name, record in self.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def verify(output: Path) -> CorpusManifest:
    """Compare each file of a prepared corpus with its checksum; InputError naming the first one
    that differs."""
    manifest = CorpusManifest.beside(output / NAME)
    if manifest is None:
        raise DataError(f"{output}: no {NAME}; not a folder that `megagrow prepare` has completed")
    for name, record in manifest.files.items():
        path = output / name
        if not path.is_file():
            raise DataError(f"{path}: missing; prepare the corpus again")
        if FileRecord.of(path, "blake2b") != record:
            raise DataError(f"{path}: not what was written (checksum); prepare the corpus again")
    return manifest
