"""Keys of a run file, read from the schema."""

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from megagrow.config.sections import Section


def sections_in(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """Yield the section classes in the type of a key, each with True if it is in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, is_list
    elif get_origin(annotation) in (list, Union, UnionType):
        for part in get_args(annotation):
            yield from sections_in(part, is_list or get_origin(annotation) is list)
