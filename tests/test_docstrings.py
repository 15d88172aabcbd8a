"""Docstrings and annotations of the repository's Python files, read as syntax trees."""

import ast
import re

from tests.helpers.source_tree import Function, docstrings, files, name_of, public, unannotated

PRODUCT = files("megagrow", "kernels", "tools", "examples")
TESTS = files("tests")

FIRST_WORD = re.compile(r"(?:What|Whether|Who|How|Of|Where)\b")


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{name_of(path)}:{line}: {text.splitlines()[0]}"
        for path in PRODUCT + TESTS
        for line, text in docstrings(path)
        if FIRST_WORD.match(text.strip())
    ]
    assert not found, "\n" + "\n".join(found)


def test_public_names_have_docstrings_and_annotations() -> None:
    found = []
    for path in PRODUCT:
        for node, is_method in public(path):
            name = f"{name_of(path)}: {node.name}"
            if not is_method and not ast.get_docstring(node):
                found.append(f"{name} has no docstring")
            if isinstance(node, Function) and (missing := unannotated(node)):
                found.append(f"{name} has no annotation for {', '.join(missing)}")
    assert not found, "\n" + "\n".join(found)
