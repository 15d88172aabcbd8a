"""Write the tables of docs/reference/configuration.md: all keys, and their effect on a resume.

    python tools/docs/config_reference.py          update the page
    python tools/docs/config_reference.py --check  exit with code 1 if the page is out of date

The meaning of a key is the docstring below its field in megagrow/config/.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pydantic.fields import FieldInfo  # noqa: E402

from megagrow.common.sizes import format_count, parse_count  # noqa: E402
from megagrow.common.tables import markdown_table  # noqa: E402
from megagrow.config.data import RunFileData  # noqa: E402
from megagrow.config.json_schema import docstrings  # noqa: E402
from megagrow.config.overrides import (  # noqa: E402
    BUILT_ON,
    DEFAULTS,
    HARDWARE,
    PARTS,
    item_path,
    section_in,
)
from megagrow.config.resume_rules import EFFECTS  # noqa: E402
from megagrow.config.schema import RunConfig, StageConfig  # noqa: E402
from megagrow.config.sections import Section  # noqa: E402
from tools.docs.generated_page import write_or_check  # noqa: E402

PAGE = ROOT / "docs/reference/configuration.md"
BEGIN, END = "<!-- keys: tools/docs/config_reference.py -->", "<!-- end of the keys -->"
CHANGES = "<!-- changes on resume: tools/docs/config_reference.py -->"
END_CHANGES = "<!-- end of the changes on resume -->"

DERIVED = {"stages": "one stage with the keys above", "tokens": "from other keys"}
DERIVED |= dict.fromkeys(
    ("model", "batch", "optimizer", "data.train", "data.sequence_length"),
    "required, here or in each stage",
)
"""Defaults of required fields that loading a run file fills."""

TYPE_NAMES = {
    str: "text",
    Path: "path",
    bool: "true or false",
    int: "integer",
    float: "number",
}
"""Python type -> name in the tables."""


@dataclass(frozen=True)
class KeyRow:
    """One table row; the path has the format of `--set`, with N for an index in a list."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class SectionTable:
    """One section: path (empty for the top of the file), docstring and keys."""

    path: str
    text: str
    keys: list[KeyRow]


def sections() -> Iterator[SectionTable]:
    """Yield all sections in the order of a run file."""
    built_on = [KeyRow(key, "text", "`null`", meaning) for key, meaning in BUILT_ON.items()]
    top, *others = _tables("", RunConfig)
    of_stages = {table.path: table for table in _tables("", StageConfig)}
    keys = {key.path: key for key in of_stages.pop("").keys}
    at = [key.path for key in top.keys].index("stages")
    above = [keys[name] for name in DEFAULTS if name not in RunConfig.model_fields]
    yield SectionTable("", top.text, [*built_on, *top.keys[:at], *above, *top.keys[at:]])
    yield from _tables("data", RunFileData)
    for name in (each for each in DEFAULTS if each not in RunConfig.model_fields):
        yield from (table for table in of_stages.values() if _first(table) == name)
    yield from _stage_tables(table for table in others if _first(table) == "stages")
    yield from (table for table in others if _first(table) not in ("data", "stages"))


def _stage_tables(tables: Iterable[SectionTable]) -> Iterator[SectionTable]:
    """Yield the sections that exist only in a stage; other keys link to the top of the file."""
    for table in tables:
        path = table.path.removeprefix("stages.N").removeprefix(".")
        if path.split(".")[0] not in DEFAULTS:
            yield SectionTable(
                table.path, table.text, [_also_at_the_top(key) for key in table.keys]
            )


def _also_at_the_top(key: KeyRow) -> KeyRow:
    name = key.path.removeprefix("stages.N.")
    if name not in DEFAULTS:
        return key
    return KeyRow(key.path, key.type.replace("(#stagesn", "(#"), "as at the top", key.meaning)


def _first(table: SectionTable) -> str:
    return table.path.split(".")[0]


def _tables(path: str, section: type[Section]) -> Iterator[SectionTable]:
    """Yield the table of a section, then those of its subsections."""
    inner = {}
    keys = []
    texts = {key: text for each in section.__mro__ for key, text in _own_texts(each).items()}
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        place = f"{path}.{name}" if path else name
        below = section_in(field.annotation)
        if below is not None:
            inner[place + item_path(field.annotation)] = below
        meaning = texts.get(name) or (_first_sentence(below) if below else "")
        keys.append(
            KeyRow(place, _type(field, place), DERIVED.get(place) or default(field), meaning)
        )
    yield SectionTable(path, docstring(section), keys)
    for place, below in inner.items():
        yield from _tables(place, below)


def _own_texts(section: type) -> dict[str, str]:
    return docstrings(section) if issubclass(section, Section) else {}


def docstring(section: type[Section]) -> str:
    """Return the docstring of a section, one line per paragraph."""
    paragraphs = inspect.cleandoc(section.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _first_sentence(section: type[Section]) -> str:
    sentence, stop, _ = docstring(section).partition("\n")[0].partition(". ")
    return sentence + stop.strip()


def _type(field: FieldInfo, place: str) -> str:
    text = words(field.annotation, field.metadata)
    inside = place + item_path(field.annotation)
    return text.replace("section", f"[section](#{anchor(inside)})")


def words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describe a type in words, with the bounds in its metadata."""
    inner, constraints = get_args(annotation), [*_flat(metadata)]
    match get_origin(annotation):
        case None if section_in(annotation) is not None:
            return "section"
        case None:
            return f"{_kind(annotation, constraints)}{_bounds(constraints)}"
        case origin if origin is Annotated:
            return words(inner[0], [*constraints, *inner[1:]])
        case origin if origin in (Union, UnionType):
            return ", or ".join("null" if x is NoneType else words(x, constraints) for x in inner)
        case origin if origin is Literal:
            *first, last = (f"`{value}`" for value in inner)
            return f"{', '.join(first)} or {last}" if first else last
        case origin if origin is dict:
            return f"mapping of names, each to a {words(inner[1])}"
        case origin if origin is list:
            return f"list, each {_article(inner[0])}{words(inner[0])}"
    return f"list of {len(inner)}, each {_article(inner[0])}{words(inner[0])}"


def _article(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ""
    return "an " if words(annotation)[0] in "aeiou" else "a "


def _kind(annotation: type, metadata: Iterable[Any]) -> str:
    is_count = any(getattr(each, "func", None) is parse_count for each in metadata)
    return "count" if is_count else TYPE_NAMES[annotation]


def _bounds(metadata: Iterable[Any]) -> str:
    formats = {"gt": "above {:g}", "ge": "{:g} or more", "le": "at most {:g}"}
    bounds = [
        text.format(limit)
        for each in metadata
        for name, text in formats.items()
        if (limit := getattr(each, name, None)) is not None
    ]
    # A count is always above 0.
    is_count = any(getattr(each, "func", None) is parse_count for each in metadata)
    return "".join(f", {text}" for text in bounds if not (is_count and text == "above 0"))


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def default(field: FieldInfo) -> str:
    """Describe the default of a key."""
    if field.default_factory is not None:
        return "from other keys"
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "defaults of the section"
    return f"`{_value(field.default, 'count' in words(field.annotation, field.metadata))}`"


def _value(value: Any, count: bool = False) -> str:
    """Format a default in the notation of a run file."""
    if isinstance(value, list | tuple | dict):
        return f"[{', '.join(_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return format_count(value) if count else str(value)


def anchor(path: str) -> str:
    """Return the link anchor of a section heading."""
    return "".join(letter for letter in path.lower() if letter.isalnum() or letter in "_-")


def keys_text() -> str:
    """Return all tables as Markdown."""
    return "\n\n".join("\n".join(_lines(table)) for table in sections())


def _lines(table: SectionTable) -> Iterator[str]:
    level = "##" if table.path.count(".") == 0 or table.path == "stages.N" else "###"
    yield f"{level} `{table.path}`" if table.path else "## The top of the file"
    yield ""
    for text in filter(None, (*table.text.split("\n\n"), " ".join(_other_places(table.path)))):
        yield from (*textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False), "")
    rows = [
        (f"`{key.path}`", key.type, key.default, key.meaning.replace("|", "\\|"))
        for key in table.keys
    ]
    yield markdown_table(("key", "type", "default", "meaning"), rows)


def _other_places(path: str) -> Iterator[str]:
    """Yield the other places in which a section can be set."""
    if path in DEFAULTS:
        yield f"At the top for every stage, or in one stage as `stages.N.{path}`."
    if path in PARTS:
        yield f"May be the name of a file, `{path}/NAME.yaml`."
    if path in HARDWARE:
        yield "A profile of the hardware may set it."


def changes_text() -> str:
    """Return the table of the effects of changed keys as Markdown."""
    rows = [(f"`{key}`", str(effect)) for effect, keys in EFFECTS.items() for key in keys]
    return markdown_table(("key", "effect"), rows)


def with_tables(page: str) -> str:
    """Return the page with up-to-date tables."""
    blocks = (BEGIN, keys_text(), END), (CHANGES, changes_text(), END_CHANGES)
    for begin, text, end in blocks:
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> int:
    """Write or check the page and return the exit code."""
    return write_or_check(PAGE, with_tables, "tools/docs/config_reference.py")


if __name__ == "__main__":
    sys.exit(main())
