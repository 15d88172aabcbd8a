"""Writes the tables of docs/reference/configuration.md: every key of a run file, out of its models.

python tools/docs/config_reference.py          writes them
python tools/docs/config_reference.py --check  ends with 1 if they are not current

A key's meaning is the docstring below it in megagrow/config/, read from the source: the models
themselves need no such text, and pydantic would parse it again in every process of a run.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pydantic.fields import FieldInfo  # noqa: E402

from megagrow.common.sizes import format_count, parse_count  # noqa: E402
from megagrow.config.overrides import BUILT_ON, DEFAULTS, HARDWARE, PARTS, section_in  # noqa: E402
from megagrow.config.schema import RunConfig, StageConfig  # noqa: E402
from megagrow.config.sections import Section  # noqa: E402
from tools.docs.generated_page import write_or_check  # noqa: E402

PAGE = ROOT / "docs/reference/configuration.md"
BEGIN, END = "<!-- keys: tools/docs/config_reference.py -->", "<!-- end of the keys -->"

MADE = {"stages": "one, of the keys above", "tokens": "from other keys"}
MADE |= dict.fromkeys(("model", "batch", "optimizer"), "required, here or in each stage")
"""What loading a file makes of keys that the models need."""

PLAIN = {str: "text", Path: "path", bool: "true or false", int: "whole number", float: "number"}
"""What a type of Python is called for people."""


@dataclass(frozen=True)
class Key:
    """One row: the path as `--set` takes it, N for a place in a list."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Part:
    """One section: its path, empty for the top of the file, its docstring, and its keys."""

    path: str
    told: str
    keys: list[Key]


def parts() -> Iterator[Part]:
    """All sections, in the order of a run file."""
    built_on = [Key(key, "text", "`null`", meaning) for key, meaning in BUILT_ON.items()]
    top, *others = _parts("", RunConfig)
    for_stages = {part.path: part for part in _parts("", StageConfig)}
    keys = {key.path: key for key in for_stages.pop("").keys}
    at = [key.path for key in top.keys].index("stages")
    above = [keys[name] for name in DEFAULTS]
    yield Part("", top.told, [*built_on, *top.keys[:at], *above, *top.keys[at:]])
    yield from (part for part in others if _first(part) == "data")
    for name in DEFAULTS:
        yield from (part for part in for_stages.values() if _first(part) == name)
    yield from _of_stages(part for part in others if _first(part) == "stages")
    yield from (part for part in others if _first(part) not in ("data", "stages"))


def _of_stages(found: Iterable[Part]) -> Iterator[Part]:
    """What only a stage has; of the rest, where the top has it."""
    for part in found:
        path = part.path.removeprefix("stages.N").removeprefix(".")
        if path.split(".")[0] not in DEFAULTS:
            yield Part(part.path, part.told, [_also_at_the_top(key) for key in part.keys])


def _also_at_the_top(key: Key) -> Key:
    name = key.path.removeprefix("stages.N.")
    if name not in DEFAULTS:
        return key
    return Key(key.path, key.type.replace("(#stagesn", "(#"), "as at the top", key.meaning)


def _first(part: Part) -> str:
    return part.path.split(".")[0]


def _parts(path: str, section: type[Section]) -> Iterator[Part]:
    """A section, then those within it."""
    inner = {}
    keys = []
    told = docstrings(section)
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        place = f"{path}.{name}" if path else name
        below = section_in(field.annotation)
        if below is not None:
            inner[f"{place}.N" if _is_list(field.annotation) else place] = below
        meaning = told.get(name) or (_first_sentence(below) if below else "")
        keys.append(Key(place, _type(field, place), MADE.get(place) or default(field), meaning))
    yield Part(path, docstring(section), keys)
    for place, below in inner.items():
        yield from _parts(place, below)


def docstring(section: type[Section]) -> str:
    """What a section says of itself, paragraphs apart."""
    paragraphs = inspect.cleandoc(section.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _first_sentence(section: type[Section]) -> str:
    sentence, stop, _ = docstring(section).partition("\n")[0].partition(". ")
    return sentence + stop.strip()


def docstrings(section: type[Section]) -> dict[str, str]:
    """The texts below the fields of a section, each in one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[field.target.id] = " ".join(text.value.split())
    return found


def _type(field: FieldInfo, place: str) -> str:
    text = words(field.annotation, field.metadata)
    inside = f"{place}.N" if _is_list(field.annotation) else place
    return text.replace("section", f"[section](#{anchor(inside)})")


def words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in plain words, with the bounds that its metadata gives."""
    inner, about = get_args(annotation), [*_flat(metadata)]
    match get_origin(annotation):
        case None if section_in(annotation) is not None:
            return "section"
        case None:
            return f"{_kind(annotation, about)}{_bounds(about)}"
        case origin if origin is Annotated:
            return words(inner[0], [*about, *inner[1:]])
        case origin if origin in (Union, UnionType):
            return ", or ".join("null" if x is NoneType else words(x, about) for x in inner)
        case origin if origin is Literal:
            *first, last = (f"`{value}`" for value in inner)
            return f"{', '.join(first)} or {last}" if first else last
        case origin if origin is list:
            return f"list, each {'' if get_origin(inner[0]) is Literal else 'a '}{words(inner[0])}"
    return f"list of {len(inner)}, each a {words(inner[0])}"


def _kind(annotation: type, metadata: Iterable[Any]) -> str:
    is_count = any(getattr(each, "func", None) is parse_count for each in metadata)
    return "count" if is_count else PLAIN[annotation]


def _bounds(metadata: Iterable[Any]) -> str:
    told = {"gt": "above {:g}", "ge": "{:g} or more", "le": "at most {:g}"}
    found = [
        text.format(limit)
        for each in metadata
        for name, text in told.items()
        if (limit := getattr(each, name, None)) is not None
    ]
    # A count is above 0 by its meaning.
    is_count = any(getattr(each, "func", None) is parse_count for each in metadata)
    return "".join(f", {text}" for text in found if not (is_count and text == "above 0"))


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list and section_in(annotation) is not None


def default(field: FieldInfo) -> str:
    """What a key has that nobody gives."""
    if field.default_factory is not None:
        return "from other keys"
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "its own"
    return f"`{_value(field.default, 'count' in words(field.annotation, field.metadata))}`"


def _value(value: Any, count: bool = False) -> str:
    """A default as a run file writes it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return format_count(value) if count else str(value)


def anchor(path: str) -> str:
    """How a link in the page names the heading of a section."""
    return "".join(letter for letter in path.lower() if letter.isalnum() or letter in "_-")


def keys_text() -> str:
    """All tables, as Markdown."""
    return "\n\n".join("\n".join(_lines(part)) for part in parts())


def _lines(part: Part) -> Iterator[str]:
    level = "##" if part.path.count(".") == 0 or part.path == "stages.N" else "###"
    yield f"{level} `{part.path}`" if part.path else "## The top of the file"
    yield ""
    for told in filter(None, (*part.told.split("\n\n"), " ".join(_placed(part.path)))):
        yield from (*textwrap.wrap(told, 100, break_on_hyphens=False, break_long_words=False), "")
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in part.keys:
        cells = (f"`{key.path}`", key.type, key.default, key.meaning.replace("|", "\\|"))
        yield f"| {' | '.join(cells)} |"


def _placed(path: str) -> Iterator[str]:
    """Where else a section may stand, or come from."""
    if path in DEFAULTS:
        yield f"At the top for every stage, or in one stage as `stages.N.{path}`."
    if path in PARTS:
        yield f"May be the name of a file, `{path}/NAME.yaml`."
    if path in HARDWARE:
        yield "A profile of the hardware may set it."


def with_keys(page: str) -> str:
    """The page with its tables written anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{keys_text()}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write or check the page and return the exit code."""
    return write_or_check(PAGE, with_keys, "tools/docs/config_reference.py")


if __name__ == "__main__":
    sys.exit(main())
