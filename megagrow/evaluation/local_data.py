"""Documents of the `gstack` tasks from local files, with the columns that lm-eval's tasks read.

The formats are .jsonl, .parquet and the published form of two data sets: LogiQA's text with eight
lines per question, and WikiText's concatenated articles. The latter two are converted to the hub's
documents by the rules of the original conversion scripts: lm_eval/datasets/
{logiqa/logiqa,wikitext/wikitext}.py of https://github.com/EleutherAI/lm-evaluation-harness at
1241d1c7 and 24444126. The hub's EleutherAI/wikitext_document_level was derived from the second.

LAMBADA needs no conversion: its file has the column `text` that the task reads. The file published
by OpenAI (https://huggingface.co/datasets/craffel/openai_lambada at 98dc6136) has 1819752 bytes and
SHA-256 4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226. The size listed for the
hub's EleutherAI/lambada_openai is also 1.82 MB; its hash is not published.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megagrow.common.json_text import FILE_BYTES, parse_json, read_limited
from megagrow.errors import DataError

Doc = dict[str, Any]

_TITLE = re.compile(r"= (?!=).*(?<!=) =")
"""Title line of a WikiText article, without surrounding blanks; section titles have more = signs.
Two formulas of the test set also match. They start an article on the hub as well, which therefore
has 62 articles."""

_ROWS = 256
"""Rows of a parquet file converted at a time."""

_LOGIQA_LINES = 8
"""Lines per question: empty line, letter of the answer, passage, question, four options."""


def read_documents(task: str, folder: Path) -> list[Doc]:
    """Return the documents of a task, one dict of columns per document.

    Raises InputError if the task's file is missing or malformed.
    """
    path, read = _find_file(task, folder)
    try:
        docs = list(read(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not valid data of task {task}: {reason}") from error
    if not docs:
        raise DataError(f"{path}: contains no documents")
    return docs


def _find_file(task: str, folder: Path) -> tuple[Path, Callable[[Path], Iterator[Doc]]]:
    """Return the file of a task and its reader."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such directory")
    published = _PUBLISHED.get(task)
    if published is not None and (folder / published[0]).is_file():
        return folder / published[0], published[1]
    for ending, read in ((".jsonl", _jsonl), (".parquet", _parquet)):
        for path in sorted((folder / task).glob(f"*{ending}")):
            return path, read
    alternative = f"{published[0]}, " if published is not None else ""
    raise DataError(
        f"{folder}: no data of task {task}; expected {alternative}{task}/*.jsonl or .parquet"
    )


def _jsonl(path: Path) -> Iterator[Doc]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            doc = parse_json(line.encode())
            if not isinstance(doc, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield doc


def _parquet(path: Path) -> Iterator[Doc]:
    import pyarrow.parquet

    size = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS):
            size += batch.nbytes
            if size > FILE_BYTES:
                raise ValueError(f"more than {FILE_BYTES} bytes of data")
            yield from batch.to_pylist()


def _text(path: Path) -> str:
    return read_limited(path, FILE_BYTES, DataError).decode("utf-8-sig").replace("\r\n", "\n")


def _logiqa(path: Path) -> Iterator[Doc]:
    lines = _text(path).rstrip("\n").split("\n")
    for first in range(0, len(lines), _LOGIQA_LINES):
        part = lines[first : first + _LOGIQA_LINES]
        if len(part) < _LOGIQA_LINES or part[0].strip() or part[1].strip() not in tuple("abcd"):
            raise ValueError(f"line {first + 1} does not start a question of {_LOGIQA_LINES} lines")
        passage, question, *options = map(_spaced, [*part[2:4], *(line[2:] for line in part[4:])])
        yield {
            "label": part[1].strip(),
            "context": passage,
            "question": question,
            "options": options,
        }


def _spaced(text: str) -> str:
    """Add a space after every full stop, and strip both ends.

    As in the conversion script's `normalize`, a space is also added within numbers and before other
    spaces.
    """
    return text.replace(".", ". ").strip()


def _wikitext(path: Path) -> Iterator[Doc]:
    """Yield the articles.

    The line break before a title and blank lines before the first title belong to no article.
    """
    lines: list[str] = []
    for line in _text(path).split("\n"):
        if _TITLE.fullmatch(line.strip()):
            yield from _page(lines)
            lines = []
        lines.append(line)
    yield from _page(lines)


def _page(lines: list[str]) -> Iterator[Doc]:
    page = "\n".join(lines)
    if page.strip():
        yield {"page": page}


_PUBLISHED: dict[str, tuple[str, Callable[[Path], Iterator[Doc]]]] = {
    "lambada_openai": ("lambada/lambada_test.jsonl", _jsonl),
    "logiqa": ("logiqa/Test.txt", _logiqa),
    "wikitext": ("wikitext-2/test.txt", _wikitext),
}
"""Path and reader of a task's data in its published format."""
