"""Documents of the tasks of `gstack` from local files, in the columns that lm-eval's tasks read.

Files of other forms than .jsonl and .parquet are those in which the data sets were published:
LogiQA's text of eight lines for each question, and WikiText's articles one after another. They
become the documents of the hub by the rules of the scripts that made those: lm_eval/datasets/
{logiqa/logiqa,wikitext/wikitext}.py of https://github.com/EleutherAI/lm-evaluation-harness at
1241d1c7 and 24444126. The hub's EleutherAI/wikitext_document_level began as the second of them.

LAMBADA needs no rule: its file has the column `text` that the task reads. The one that OpenAI
published (https://huggingface.co/datasets/craffel/openai_lambada at 98dc6136) has 1819752 bytes and
SHA-256 4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226. That of the hub's
EleutherAI/lambada_openai is said to have 1.82 MB, too; its hash was not to be found.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megagrow.errors import DataError

Doc = dict[str, Any]

_TITLE = re.compile(r"= (?!=).*(?<!=) =")
"""The line that begins an article of WikiText, blanks around it taken off; those of its sections
have more signs. Two formulas of the test set look the same, and begin an article on the hub too: it
has 62 there."""

_LOGIQA_LINES = 8
"""An empty line, the answer's letter, the passage, the question, four options."""


def read_documents(task: str, folder: Path) -> list[Doc]:
    """The documents of a task. InputError where its file is missing or not of its form."""
    path, read = _found(task, folder)
    try:
        docs = list(read(path))
    except (UnicodeDecodeError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not the data of {task}: {reason}") from error
    if not docs:
        raise DataError(f"{path}: holds no documents")
    return docs


def _found(task: str, folder: Path) -> tuple[Path, Callable[[Path], Iterator[Doc]]]:
    """The file of a task and what reads it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such directory")
    known = _PUBLISHED.get(task)
    if known is not None and (folder / known[0]).is_file():
        return folder / known[0], known[1]
    for ending, read in ((".jsonl", _jsonl), (".parquet", _parquet)):
        for path in sorted((folder / task).glob(f"*{ending}")):
            return path, read
    own = f"{known[0]}, " if known is not None else ""
    raise DataError(f"{folder}: no data of {task}; should hold {own}{task}/*.jsonl or .parquet")


def _jsonl(path: Path) -> Iterator[Doc]:
    import json

    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            doc = json.loads(line)
            if not isinstance(doc, dict):
                raise ValueError(f"line {number} is no object")
            yield doc


def _parquet(path: Path) -> Iterator[Doc]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


def _logiqa(path: Path) -> Iterator[Doc]:
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for first in range(0, len(lines), _LOGIQA_LINES):
        part = lines[first : first + _LOGIQA_LINES]
        if len(part) < _LOGIQA_LINES or part[0].strip() or part[1].strip() not in tuple("abcd"):
            raise ValueError(f"line {first + 1} begins no question of {_LOGIQA_LINES} lines")
        passage, question, *options = map(_spaced, [*part[2:4], *(line[2:] for line in part[4:])])
        yield {
            "label": part[1].strip(),
            "context": passage,
            "question": question,
            "options": options,
        }


def _spaced(text: str) -> str:
    """A space after every full stop, also within a number or before another space, and none at the
    ends; nothing else is changed (`normalize` of the script)."""
    return text.replace(".", ". ").strip()


def _wikitext(path: Path) -> Iterator[Doc]:
    """The line end before a title belongs to no article, and neither do blank lines before the
    first title."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
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
"""Where a task's data lies in the form in which it was published."""
