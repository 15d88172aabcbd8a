"""Text sources for tests, read as `megagrow prepare` reads them."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megagrow.data.sources.documents import RecordOptions, read_documents
from megagrow.data.sources.folders import Selection
from megagrow.data.sources.units import find_sources
from megagrow.errors import InputError

TEXTS = [f"text number {i}: \u00e9\u4f60 " + "x" * (i % 50) for i in range(500)]


def json_lines(texts: Iterable[str], key: str = "text") -> bytes:
    """Return records with the texts as JSON lines."""
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def read_texts(
    names: Iterable[str | Path],
    key: str = "text",
    selection: Selection | None = None,
    skipped: Counter[str] | None = None,
    **options: Any,
) -> list[str]:
    """Return the texts of all documents; `options` are those of RecordOptions."""
    chosen = RecordOptions(key, **options)
    found = find_sources(list(map(str, names)), key, selection)
    return [doc.text for unit in found.units for doc in read_documents(unit, chosen, skipped)]


def skipped_files(folder: Path, **options: Any) -> dict[str, str]:
    """Return the files of a folder that are not read, with the reasons."""
    found = find_sources([str(folder)], selection=Selection(**options) if options else None)
    return {item.path: item.reason for item in found.skipped}


def refusal_of(names: Iterable[str | Path], key: str = "text", **options: Any) -> str:
    """Return the error message for sources that cannot be read."""
    with pytest.raises(InputError) as caught:
        read_texts(names, key, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
