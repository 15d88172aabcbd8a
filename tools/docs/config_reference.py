"""Generate the tables of all run file keys in docs/reference/configuration.md.

python tools/docs/config_reference.py          writes the tables
python tools/docs/config_reference.py --check  exits with 1 if they are not current

The meaning of a key is the docstring below it in megagrow/config/, read from the source. The
classes do not contain it: pydantic would parse it again in every process of a run.
"""

import argparse
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
from megagrow.config.deprecated import RENAMED_KEYS, RENAMED_VALUES  # noqa: E402
from megagrow.config.overrides import BUILT_ON, DEFAULTS, HARDWARE, PARTS, section_in  # noqa: E402
from megagrow.config.schema import RunConfig, StageConfig  # noqa: E402
from megagrow.config.sections import Section  # noqa: E402

PAGE = ROOT / "docs/reference/configuration.md"
BEGIN, END = "<!-- keys: tools/docs/config_reference.py -->", "<!-- end of the keys -->"

MADE = {"stages": "one stage, from the keys above", "tokens": "from other keys"}
MADE |= dict.fromkeys(("model", "batch", "optimizer"), "required, here or in each stage")
"""Defaults of required keys that loading a file fills in."""

PLAIN = {str: "text", Path: "path", bool: "true or false", int: "integer", float: "number"}
"""Names of Python types on the page."""


@dataclass(frozen=True)
class Key:
    """One row: the path in the format of `--set`, with N for a list index."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Part:
    """One section: its path (empty for the top of the file), its docstring and its keys."""

    path: str
    text: str
    keys: list[Key]


def parts() -> Iterator[Part]:
    """Yield all sections, in the order of a run file."""
    built_on = [Key(key, "text", "`null`", meaning) for key, meaning in BUILT_ON.items()]
    top, *others = _parts("", RunConfig)
    for_stages = {part.path: part for part in _parts("", StageConfig)}
    keys = {key.path: key for key in for_stages.pop("").keys}
    at = [key.path for key in top.keys].index("stages")
    above = [keys[name] for name in DEFAULTS]
    yield Part("", top.text, [*built_on, *top.keys[:at], *above, *top.keys[at:]])
    yield from (part for part in others if _first(part) == "data")
    for name in DEFAULTS:
        yield from (part for part in for_stages.values() if _first(part) == name)
    yield from _of_stages(part for part in others if _first(part) == "stages")
    yield from (part for part in others if _first(part) not in ("data", "stages"))


def _of_stages(stage_parts: Iterable[Part]) -> Iterator[Part]:
    """Yield the sections that only a stage has; refer to the top for the others."""
    for part in stage_parts:
        path = part.path.removeprefix("stages.N").removeprefix(".")
        if path.split(".")[0] not in DEFAULTS:
            yield Part(part.path, part.text, [_also_at_the_top(key) for key in part.keys])


def _also_at_the_top(key: Key) -> Key:
    name = key.path.removeprefix("stages.N.")
    if name not in DEFAULTS:
        return key
    return Key(key.path, key.type.replace("(#stagesn", "(#"), "as at the top", key.meaning)


def _first(part: Part) -> str:
    return part.path.split(".")[0]


def _parts(path: str, section: type[Section]) -> Iterator[Part]:
    """Yield a section, then its subsections."""
    inner = {}
    keys = []
    texts = docstrings(section)
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        place = f"{path}.{name}" if path else name
        below = section_in(field.annotation)
        if below is not None:
            inner[f"{place}.N" if _is_list(field.annotation) else place] = below
        meaning = texts.get(name) or (_first_sentence(below) if below else "")
        keys.append(Key(place, _type(field, place), MADE.get(place) or default(field), meaning))
    yield Part(path, docstring(section), keys)
    for place, below in inner.items():
        yield from _parts(place, below)


def docstring(section: type[Section]) -> str:
    """Return the docstring of a section, one line per paragraph."""
    paragraphs = inspect.cleandoc(section.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _first_sentence(section: type[Section]) -> str:
    sentence, stop, _ = docstring(section).partition("\n")[0].partition(". ")
    return sentence + stop.strip()


def docstrings(section: type[Section]) -> dict[str, str]:
    """Return the docstrings of the fields of a section, each on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                texts[field.target.id] = " ".join(text.value.split())
    return texts


def _type(field: FieldInfo, place: str) -> str:
    text = words(field.annotation, field.metadata)
    inside = f"{place}.N" if _is_list(field.annotation) else place
    return text.replace("section", f"[section](#{anchor(inside)})")


def words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type in words, with the bounds in its metadata."""
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
            entry = words(inner[0])
            article = "" if entry.startswith("`") else "an " if entry.startswith("i") else "a "
            return f"list, each {article}{entry}"
    return f"list of {len(inner)}, each a {words(inner[0])}"


def _kind(annotation: type, metadata: Iterable[Any]) -> str:
    is_count = any(getattr(each, "func", None) is parse_count for each in metadata)
    return "count" if is_count else PLAIN[annotation]


def _bounds(metadata: Iterable[Any]) -> str:
    forms = {"gt": "above {:g}", "ge": "{:g} or more", "le": "at most {:g}"}
    texts = [
        text.format(limit)
        for each in metadata
        for name, text in forms.items()
        if (limit := getattr(each, name, None)) is not None
    ]
    # A count is above 0 by definition.
    is_count = any(getattr(each, "func", None) is parse_count for each in metadata)
    return "".join(f", {text}" for text in texts if not (is_count and text == "above 0"))


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list and section_in(annotation) is not None


def default(field: FieldInfo) -> str:
    """Return the default of a key."""
    if field.default_factory is not None:
        return "from other keys"
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "see section"
    return f"`{_value(field.default, 'count' in words(field.annotation, field.metadata))}`"


def _value(value: Any, count: bool = False) -> str:
    """Format a default as in a run file."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return format_count(value) if count else str(value)


def anchor(path: str) -> str:
    """Return the link target of a section's heading."""
    return "".join(letter for letter in path.lower() if letter.isalnum() or letter in "_-")


def keys_text() -> str:
    """Return all tables, as Markdown."""
    sections = ["\n".join(_lines(part)) for part in parts()]
    return "\n\n".join([*sections, "\n".join(_deprecated())])


def _lines(part: Part) -> Iterator[str]:
    level = "##" if part.path.count(".") == 0 or part.path == "stages.N" else "###"
    yield f"{level} `{part.path}`" if part.path else "## The top of the file"
    yield ""
    for text in filter(None, (*part.text.split("\n\n"), " ".join(_placed(part.path)))):
        yield from (*textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False), "")
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in part.keys:
        cells = (f"`{key.path}`", key.type, key.default, key.meaning.replace("|", "\\|"))
        yield f"| {' | '.join(cells)} |"


def _placed(path: str) -> Iterator[str]:
    """Yield the other places that may set a section."""
    if path in DEFAULTS:
        yield f"Set at the top for all stages, or in one stage as `stages.N.{path}`."
    if path in PARTS:
        yield f"The value may be the name of a file, `{path}/NAME.yaml`."
    if path in HARDWARE:
        yield "A hardware profile may set this section."


def _deprecated() -> Iterator[str]:
    """Yield the table of deprecated keys and values."""
    yield from ("## Deprecated names", "")
    yield "Old names are accepted, with a warning. Setting a key under both names is an error."
    yield from ("", "| old | current |", "|---|---|")
    for section, keys in RENAMED_KEYS.items():
        for old, new in keys.items():
            yield f"| `{'.'.join((*section, old))}` | `{'.'.join((*section, new))}` |"
    for section, values in RENAMED_VALUES.items():
        for old, new in values.items():
            yield f"| `{'.'.join(section)}: {old}` | `{'.'.join(section)}: {new}` |"


def with_keys(page: str) -> str:
    """Return the page with regenerated tables."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{keys_text()}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    current = with_keys(page)
    if parser.parse_args().check:
        if page == current:
            return 0
        print(
            "docs/reference/configuration.md is not current: python tools/docs/config_reference.py"
        )
        return 1
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
