"""Architecture rules: import order, sizes, names and docstrings.

Nothing is imported here: every file is parsed into a syntax tree. An exception is an entry of
`EXCEPTIONS` with a reason, never a looser rule.
"""

import ast
import re
import statistics
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.source_tree import (
    ROOT,
    dotted,
    files,
    functions,
    imports,
    module_of,
    name_of,
    names,
    tree_of,
    types_of,
    within,
)

ORDER = (
    *("errors", "common", "config", "model", "parallel", "data", "growth", "reshard"),
    *("checkpoint", "formats", "train", "offline", "evaluation", "analysis", "fits"),
    *("simulation", "planning", "doctor", "run", "api", "cli"),
)
"""Folders and files of megagrow/; each may import only the ones before it."""

DECLARATIONS = ("megagrow.model.layers.table", "megagrow.model.layers.flops")
"""Modules that config may import: the layer types declare the sizes, parameters and FLOPs of a
model, and import config.schema only."""

FILE_LINES, KERNEL_FILE_LINES = 300, 400
FUNCTION_LINES, KERNEL_FUNCTION_LINES = 60, 120
MEDIAN_FUNCTION, MOST_FUNCTIONS, MOST_SHARE = 12, 40, 0.9
LINE_WIDTH = 100
SMALL_MODULE, MOST_MODULES, MOST_MODULES_OF_A_FOLDER = 60, 309, 20

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("code", "megagrow/formats/torch_file.py: imports pickle"): (
        "it writes files for torch.load in other programs and reads none"
    ),
    ("environment", "megagrow/cli/app.py: os.environ"): (
        "torch reads its log level on import, and parallel/launch.py imports torch"
    ),
    ("environment", "megagrow/cli/app.py: os.environ.setdefault"): (
        "torch reads its log level on import, and parallel/launch.py imports torch"
    ),
    ("environment", "tools/benchmarks/training/turns.py: os.environ"): (
        "it is the launcher: it sets the environment of the ranks it starts"
    ),
    ("environment", "tools/faults/run.py: os.environ"): (
        "it is the launcher: it sets the environment of the ranks it forks"
    ),
    ("small", "megagrow/simulation/isolated.py: imported by megagrow.planning.simulated only"): (
        "it runs any function in a new process; tests of the recorder use it without a rank"
    ),
    ("small", "megagrow/train/reporting/run_logger.py: imported by megagrow.run only"): (
        "the provenance record of a run does not depend on the logger that writes it"
    ),
}
"""(test, finding) -> reason."""


PRODUCT = files("megagrow", "kernels", "tools", "examples")
TESTS = files("tests")


def is_kernel(path: Path) -> bool:
    """Return True if the larger limits of Triton kernels apply."""
    return path.is_relative_to(ROOT / "kernels")


def hold(test: str, found: list[str]) -> None:
    """Fail with all findings that are not in EXCEPTIONS."""
    left = [item for item in found if (test, item) not in EXCEPTIONS]
    assert not left, "\n" + "\n".join(left)


def layer(module: str) -> str:
    """Return the folder or file of megagrow/ that contains a module; the package itself is cli."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "cli"


def test_import_order() -> None:
    found = []
    for path in files("megagrow"):
        here = layer(module_of(path))
        if path == ROOT / "megagrow" / "__init__.py":
            continue
        if here not in ORDER:
            found.append(f"{name_of(path)}: '{here}' is missing in ORDER")
            continue
        for name in imports(path):
            if within(name, "megagrow") and name != "megagrow.__version__":
                there = layer(name)
                if here == "config" and any(within(name, each) for each in DECLARATIONS):
                    continue
                if there not in ORDER or ORDER.index(there) > ORDER.index(here):
                    found.append(f"{name_of(path)}: imports {name}")
    hold("down", found)


def test_package_imports_nothing() -> None:
    assert list(imports(ROOT / "megagrow" / "__init__.py")) == []


def test_no_import_cycles() -> None:
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
        ("megagrow_kernels", ("megagrow/model/attention_ops.py", "megagrow/model/ops.py")),
        ("deepspeed", ("megagrow/parallel/deepspeed_import.py",)),
        ("tools", ()),
        ("tests", ()),
    ],
)
def test_packages_imported_in_one_module(package: str, doors: tuple[str, ...]) -> None:
    searched = PRODUCT if package == "tests" else files("megagrow")
    outside = [path for path in searched if name_of(path) not in doors]
    used = [name_of(path) for path in outside if any(within(n, package) for n in imports(path))]
    hold("door", [f"{path}: imports {package}" for path in used])


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "megagrow_kernels"}
    found = [
        f"{name_of(path)}: imports {name}"
        for path in files("kernels")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    hold("kernels", found)


def test_model_is_single_device() -> None:
    found = [
        f"{name_of(path)}: {name}"
        for path in files("megagrow/model")
        for name in sorted(names(path))
        if within(name, "torch.distributed")
    ]
    hold("one device", found)


def test_environment_is_read_in_one_module() -> None:
    door = "megagrow/parallel/launch.py"
    environment = ("os.environ", "os.getenv", "os.putenv")
    found = [
        f"{name_of(path)}: {name}"
        for path in PRODUCT
        for name in sorted(names(path))
        if name_of(path) != door and any(within(name, access) for access in environment)
    ]
    hold("environment", found)


def test_errors_name_who_must_act() -> None:
    """A plain InputError does not state which input to change; its subclasses do."""
    found = [
        f"{name_of(path)}:{node.lineno}: InputError(...)"
        for path in files("megagrow")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "InputError"
    ]
    hold("input error", found)


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


def test_file_text() -> None:
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


MODULES = [path for path in files("megagrow") if path.name != "__init__.py"]


def test_type_names_are_defined_once() -> None:
    homes: dict[str, list[str]] = {}
    for path in files("megagrow"):
        for name in types_of(path):
            homes.setdefault(name, []).append(name_of(path))
    found = [
        f"{name}: {', '.join(paths)}" for name, paths in sorted(homes.items()) if len(paths) > 1
    ]
    hold("type name", found)


def test_small_modules_have_several_importers() -> None:
    importers: dict[str, set[str]] = {module_of(path): set() for path in files("megagrow")}
    for path in files("megagrow"):
        for name in imports(path):
            for module in {name, name.rpartition(".")[0]} & importers.keys() - {module_of(path)}:
                importers[module].add(module_of(path))
    found = [
        f"{name_of(path)}: imported by {'; '.join(importers[module_of(path)])} only"
        for path in MODULES
        if path.name != "__main__.py"
        and len(path.read_text(encoding="utf-8").splitlines()) < SMALL_MODULE
        and len(importers[module_of(path)]) == 1
    ]
    hold("small", found)


def test_number_of_modules() -> None:
    assert len(MODULES) <= MOST_MODULES
    by_folder = Counter(path.parent for path in MODULES)
    found = [
        f"{name_of(folder)}: {count} modules, at most {MOST_MODULES_OF_A_FOLDER}"
        for folder, count in by_folder.items()
        if count > MOST_MODULES_OF_A_FOLDER
    ]
    hold("folder", found)


def test_tools_contains_folders_only() -> None:
    hold("tools", [name_of(path) for path in (ROOT / "tools").glob("*.py")])
