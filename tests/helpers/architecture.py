"""Syntax trees of the repository, the import order of megagrow/, budgets and their exceptions."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ORDER = (
    *("errors", "common", "config", "model", "parallel", "data", "growth", "reshard"),
    *("checkpoint", "formats", "train", "offline", "evaluation", "analysis", "fits"),
    *("planning", "doctor", "run", "api", "cli"),
)
"""The folders and files of megagrow/: each may import those before it, never those after it."""

FILE_LINES, KERNEL_FILE_LINES = 300, 400
FUNCTION_LINES, KERNEL_FUNCTION_LINES = 60, 120

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("code", "megagrow/formats/torch_file.py: imports pickle.UnpicklingError"): (
        "what torch.load(weights_only=True) raises of a file that would run code"
    ),
    ("code", "megagrow/formats/torch_file.py: imports pickle"): (
        "it writes files that other programs' torch.load reads, and reads none"
    ),
    ("environment", "tools/benchmarks/training/turns.py: os.environ"): (
        "it is the launcher: it tells the ranks that it starts who they are"
    ),
    ("environment", "tools/faults/run.py: os.environ"): (
        "it is the launcher: it tells the ranks that it forks who they are"
    ),
}
"""(test, what it found) -> why that is right."""


def files(*folders: str) -> list[Path]:
    """The Python files in these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PRODUCT = files("megagrow", "kernels", "tools", "examples")


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """How a file is named in findings and in EXCEPTIONS."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever the statement stands; `from a import b` is a.b."""
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression, else nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def hold(test: str, found: list[str]) -> None:
    """Fails with all findings that EXCEPTIONS does not excuse."""
    left = [item for item in found if (test, item) not in EXCEPTIONS]
    assert not left, "\n" + "\n".join(left)
