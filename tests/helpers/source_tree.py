"""Syntax trees of the repository's Python files, and queries on them."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Function = ast.FunctionDef | ast.AsyncFunctionDef

TYPE_NAME = re.compile(r"_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*")


def files(*folders: str) -> list[Path]:
    """Return the Python files in folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """Return the name of a file in findings and in EXCEPTIONS."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """Return the dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports at any level; `from a import b` yields a.b."""
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for such an expression, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names(path: Path) -> set[str]:
    """Return all dotted names that a file imports or uses."""
    used = {dotted(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    return used | set(imports(path))


def within(name: str, package: str) -> bool:
    """Return True if a dotted name is the package or inside it."""
    return name == package or name.startswith(f"{package}.")


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function with its number of lines, without decorators and docstring."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function):
            first = node.body[0]
            doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            yield f"{name_of(path)}: {node.name}", node.end_lineno - node.lineno + 1 - doc


def public(path: Path) -> Iterator[tuple[Function | ast.ClassDef, bool]]:
    """Yield public classes and functions with False, their public methods with True."""
    for node in tree_of(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node, False
            if isinstance(node, ast.ClassDef):
                methods = (item for item in node.body if isinstance(item, Function))
                yield from ((item, True) for item in methods if not item.name.startswith("_"))


def unannotated(function: Function) -> list[str]:
    """Return parameters without an annotation, and `return`; Triton and autograd are exempt."""
    if any("jit" in dotted(getattr(d, "func", d)) for d in function.decorator_list):
        return []
    args = function.args
    parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    parameters += [extra for extra in (args.vararg, args.kwarg) if extra]
    free = {"self", "cls", "ctx"}
    missing = [p.arg for p in parameters if p.annotation is None and p.arg not in free]
    return missing + ([] if function.returns else ["return"])


def types_of(path: Path) -> Iterator[str]:
    """Names of the classes and type aliases that a module defines."""
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for n in targets if isinstance(n, ast.Name) and TYPE_NAME.match(n.id))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of a file: modules, classes, functions, attributes."""
    for node in ast.walk(tree_of(path)):
        body = getattr(node, "body", None)
        for item in body if isinstance(body, list) else []:
            value = item.value if isinstance(item, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield item.lineno, value.value
