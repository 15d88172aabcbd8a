"""Keys of a run file, read from the schema."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from megagrow.config.sections import Section


def sections_in(annotation: Any, path: str = "") -> Iterator[tuple[type[Section], str]]:
    """Yield the section classes in the type of a key, each with its path below the key."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, path
    elif get_origin(annotation) in (list, dict, Annotated, Union, UnionType):
        step = {list: ".N", dict: ".NAME"}.get(get_origin(annotation), "")
        for part in get_args(annotation):
            yield from sections_in(part, f"{path}{step}")
