"""Publication of a prepared corpus: all its files replace those of the previous one together.

The new files are written to OUTPUT/staged. Then OUTPUT/manifest.json is replaced by a marker, the
files are renamed, and the manifest replaces the marker. A reader finds the previous corpus, the new
one, or the marker, which it refuses. After a kill at any point, the next preparation under the lock
completes a publication that has its marker and removes everything else.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

from megagrow.common.atomic_files import remove, sync
from megagrow.common.directory_lock import DirectoryLock
from megagrow.data.manifest import NAME, CorpusManifest, Replacement
from megagrow.data.part_files import SPLITS
from megagrow.errors import ConfigError, DataError, ResourceError

STAGED = "staged"
_LEFTOVER = re.compile(r".+\.\d+\.partial")
"""Temporary files of killed processes, see `atomic_files.partial_path`."""


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Convert OSError (disk full, missing permission) to ResourceError."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{error.filename or output}: {error.strerror or error}") from error


@contextmanager
def open_output(output: Path) -> Iterator[None]:
    """Lock the folder of a corpus, and complete or remove what killed processes left there.

    Raises ResourceError if another process holds the lock, DataError if the manifest of an
    interrupted publication is damaged, and OSError.
    """
    with DirectoryLock(output, "prepares this corpus", "--output", temporary=True):
        _recover(output)
        yield


def finished_corpus(output: Path, fingerprint: str, overwrite: bool) -> CorpusManifest | None:
    """Return the manifest of the folder if it is the complete corpus of this fingerprint.

    Returns None if the corpus is to be written. Raises ConfigError if it would replace another one
    and `overwrite` is not set; a damaged corpus of the same fingerprint may be replaced.
    """
    advice = "remove it, choose another path, or pass --overwrite to replace it"
    try:
        found = CorpusManifest.read(output)
    except DataError as error:
        if overwrite:
            return None
        raise ConfigError(f"{error}, or pass --overwrite") from error
    if found is not None and found.fingerprint == fingerprint:
        return found if found.is_complete(output) else None
    if overwrite:
        return None
    if found is not None:
        raise ConfigError(
            f"{output}: already exists, prepared from other sources, options or another tokenizer; "
            + advice
        )
    for path in (output / NAME, *_corpora(output)):
        if path.exists():
            raise ConfigError(f"{path}: already exists, not written by megagrow prepare; {advice}")
    return None


def stage_corpus(output: Path) -> Path:
    """Create the empty folder for the files of a new corpus and return it."""
    staged = output / STAGED
    remove(staged)
    staged.mkdir()
    return staged


def publish_corpus(output: Path, manifest: CorpusManifest) -> None:
    """Replace the corpus of the folder by the staged one, of which `manifest` is the manifest."""
    for name in manifest.files:
        sync(output / STAGED / name)
    previous = None
    with suppress(DataError):  # a damaged manifest is overwritten
        previous = CorpusManifest.read(output)
    names = set(previous.files if previous else ()) | {path.name for path in _corpora(output)}
    obsolete = sorted(names - manifest.files.keys())
    replacement = Replacement(manifest=manifest, obsolete=obsolete)
    replacement.write(output)
    _complete(output, replacement)


def _complete(output: Path, replacement: Replacement) -> None:
    """Rename the staged files that are not yet renamed, and replace the marker by the manifest."""
    for name in replacement.manifest.files:
        staged, path = output / STAGED / name, output / name
        if staged.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(path)
    for path in (output / name for name in replacement.obsolete):
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other files remain in the folder
            path.parent.rmdir()
    for folder in {(output / name).parent for name in replacement.manifest.files}:
        sync(folder)
    replacement.manifest.write(output)
    remove(output / STAGED)


def _recover(output: Path) -> None:
    """Complete an interrupted publication and remove the files of killed processes."""
    replacement = Replacement.of(output)
    if replacement is not None:
        _complete(output, replacement)
    remove(output / STAGED)
    for path in output.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()


def _corpora(output: Path) -> Iterator[Path]:
    """Yield the paths that corpora and masks of a folder may have."""
    for name, mask, suffix in product(SPLITS, ("", ".mask"), (".bin", ".idx")):
        yield output / f"{name}{mask}{suffix}"
