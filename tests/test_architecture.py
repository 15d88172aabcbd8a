"""The design, held by machine: who may import whom, and how large things may get.

Nothing is imported here: every file is read as a syntax tree. A reasoned exception is an entry of
`EXCEPTIONS`, never a looser rule.
"""

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.architecture import (
    FILE_LINES,
    FUNCTION_LINES,
    KERNEL_FILE_LINES,
    KERNEL_FUNCTION_LINES,
    ORDER,
    PRODUCT,
    ROOT,
    dotted,
    files,
    hold,
    imports,
    module_of,
    name_of,
    tree_of,
)

MEDIAN_FUNCTION, MOST_FUNCTIONS, MOST_SHARE = 12, 40, 0.9
LINE_WIDTH = 100


Function = ast.FunctionDef | ast.AsyncFunctionDef


TESTS = files("tests")


def names(path: Path) -> set[str]:
    """All dotted names that a file imports or uses."""
    used = {dotted(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    return used | set(imports(path))


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or something in it."""
    return name == package or name.startswith(f"{package}.")


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function with its lines, without decorators and docstring."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function):
            first = node.body[0]
            told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            yield f"{name_of(path)}: {node.name}", node.end_lineno - node.lineno + 1 - told


def is_kernel(path: Path) -> bool:
    """Whether the wider budget of Triton kernels applies."""
    return path.is_relative_to(ROOT / "kernels")


def layer(module: str) -> str:
    """The folder or file of megagrow/ that a module belongs to; the package itself is the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "cli"


def test_imports_go_down_only() -> None:
    found = []
    for path in files("megagrow"):
        here = layer(module_of(path))
        if path == ROOT / "megagrow" / "__init__.py":
            continue
        if here not in ORDER:
            found.append(f"{name_of(path)}: '{here}' has no place in ORDER")
            continue
        for name in imports(path):
            if within(name, "megagrow") and name != "megagrow.__version__":
                there = layer(name)
                if there not in ORDER or ORDER.index(there) > ORDER.index(here):
                    found.append(f"{name_of(path)}: imports {name}")
    hold("down", found)


def test_test_modules_are_never_imported() -> None:
    found = [
        f"{name_of(path)}: imports {name}"
        for path in PRODUCT + TESTS
        for name in imports(path)
        if name.startswith("tests.") and any(p.startswith("test_") for p in name.split(".")[:-1])
    ]
    hold("tests", found)


def test_helpers_are_in_one_folder() -> None:
    helpers = ROOT / "tests" / "helpers"
    others = [path for path in TESTS if not path.is_relative_to(helpers)]
    names = [name_of(path) for path in others if not path.name.startswith("test_")]
    hold("helpers", [name for name in names if not name.endswith("/conftest.py")])
    in_helpers = [path for path in TESTS if path.is_relative_to(helpers)]
    hold("helpers", [name_of(p) for p in in_helpers if p.name.startswith(("test_", "conftest"))])


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports(ROOT / "megagrow" / "__init__.py")) == []


def test_modules_of_a_folder_do_not_import_in_circles() -> None:
    paths = {module_of(path): path for path in files("megagrow", "kernels")}
    graph = {}
    for module, path in paths.items():
        reached = {name if name in paths else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = (reached & paths.keys()) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("package", "doors"),
    [
        ("megagrow_kernels", ("megagrow/model/ops.py",)),
        ("deepspeed", ("megagrow/parallel/deepspeed_import.py",)),
    ],
)
def test_one_door(package: str, doors: tuple[str, ...]) -> None:
    outside = [path for path in files("megagrow") if name_of(path) not in doors]
    used = [name_of(path) for path in outside if any(within(n, package) for n in imports(path))]
    hold("door", [f"{path}: imports {package}" for path in used])


def test_kernels_stand_on_torch_and_triton_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "megagrow_kernels"}
    found = [
        f"{name_of(path)}: imports {name}"
        for path in files("kernels")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    hold("kernels", found)


def test_the_model_knows_one_device() -> None:
    found = [
        f"{name_of(path)}: {name}"
        for path in files("megagrow/model")
        for name in sorted(names(path))
        if within(name, "torch.distributed")
    ]
    hold("one device", found)


def test_the_environment_is_read_in_one_place() -> None:
    door = "megagrow/parallel/launch.py"
    environment = ("os.environ", "os.getenv", "os.putenv")
    found = [
        f"{name_of(path)}: {name}"
        for path in PRODUCT
        for name in sorted(names(path))
        if name_of(path) != door and any(within(name, access) for access in environment)
    ]
    hold("environment", found)


def test_no_global_statement() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}: global {', '.join(node.names)}"
        for path in PRODUCT
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Global)
    ]
    hold("global", found)


@pytest.mark.parametrize("paths", [PRODUCT, TESTS], ids=["product", "tests"])
def test_sizes(paths: list[Path]) -> None:
    found = []
    for path in paths:
        file_limit = KERNEL_FILE_LINES if is_kernel(path) else FILE_LINES
        function_limit = KERNEL_FUNCTION_LINES if is_kernel(path) else FUNCTION_LINES
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > file_limit:
            found.append(f"{name_of(path)}: {len(lines)} lines, at most {file_limit}")
        for number, line in enumerate(lines, 1):
            if len(line) > LINE_WIDTH:
                found.append(f"{name_of(path)}:{number}: {len(line)} wide, at most {LINE_WIDTH}")
        for name, length in functions(path):
            if length > function_limit:
                found.append(f"{name}: {length} lines, at most {function_limit}")
    hold("size", found)


@pytest.mark.parametrize("paths", [PRODUCT, TESTS], ids=["product", "tests"])
def test_most_functions_are_short(paths: list[Path]) -> None:
    lengths = [length for path in paths for _, length in functions(path)]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION
    short = sum(length < MOST_FUNCTIONS for length in lengths)
    assert short >= MOST_SHARE * len(lengths)


def test_text_of_the_files() -> None:
    later = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = []
    for path in PRODUCT + TESTS:
        text = path.read_text(encoding="utf-8")
        if not text.isascii():
            found.append(f"{name_of(path)}: not ASCII")
        if later.search(text):
            found.append(f"{name_of(path)}: work left for later")
        if path.stem == "utils":
            found.append(f"{name_of(path)}: a file needs a purpose for its name")
        if path in PRODUCT and not ast.get_docstring(tree_of(path)):
            found.append(f"{name_of(path)}: no docstring")
    hold("text", found)


def public(path: Path) -> Iterator[tuple[Function | ast.ClassDef, bool]]:
    """Public classes and functions, and the methods of those classes (then with True)."""
    for node in tree_of(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node, False
            if isinstance(node, ast.ClassDef):
                methods = (item for item in node.body if isinstance(item, Function))
                yield from ((item, True) for item in methods if not item.name.startswith("_"))


def unannotated(function: Function) -> list[str]:
    """The parameters without an annotation, and `return`; Triton's and autograd's are free."""
    if any("jit" in dotted(getattr(d, "func", d)) for d in function.decorator_list):
        return []
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    parameters += [extra for extra in (given.vararg, given.kwarg) if extra]
    free = {"self", "cls", "ctx"}
    missing = [p.arg for p in parameters if p.annotation is None and p.arg not in free]
    return missing + ([] if function.returns else ["return"])


def test_public_things_are_explained_and_annotated() -> None:
    found = []
    for path in PRODUCT:
        for node, is_method in public(path):
            what = f"{name_of(path)}: {node.name}"
            if not is_method and not ast.get_docstring(node):
                found.append(f"{what} has no docstring")
            if isinstance(node, Function) and (missing := unannotated(node)):
                found.append(f"{what} has no annotation for {', '.join(missing)}")
    hold("public", found)
