"""Writes the file tree at the end of README.md from what each file says of itself.

A file's purpose is the first sentence of its docstring, or its first comment.

    python tools/docs/code_map.py           writes the tree
    python tools/docs/code_map.py --check   exits with 1 if the tree is not what would be written
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- tree: written by tools/docs/code_map.py -->\n", "<!-- end of tree -->\n"

FOLDERS = ("megagrow", "kernels", "configs", "launchers", "tools", "tests")
"""Shown file by file; of tests/ the folders are named instead, for they mirror megagrow/."""

WITHOUT_COMMENT = {
    "LICENSE": "Apache-2.0.",
    "README.md": "This file.",
    "megagrow/analysis/templates/report.html": "The page of `megagrow report`, as a template.",
    "configs/hardware": "Profiles, GPUS-MODEL: ZeRO stage, TP, recomputation, micro batch.",
    "kernels/megagrow_kernels/tiles": "A table of tile sizes for each kernel, as JSON.",
}

ALIKE = ("configs/hardware",)
"""Folders whose files differ as their names say: the folder alone is shown."""


def main() -> int:
    """Writes the tree, or checks it; the exit code."""
    readme = ROOT / "README.md"
    written = readme.read_text(encoding="utf-8")
    wanted = with_tree(written, render(lines()))
    if "--check" in sys.argv[1:]:
        if written != wanted:
            print("README.md: its file tree is out of date; run: python tools/docs/code_map.py")
        return int(written != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


def with_tree(readme: str, tree: str) -> str:
    """The README's text with what stands between the two markers replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}```\n{tree}```\n{END}{after}"


def render(entries: list[tuple[str, str]]) -> str:
    """One line per entry, the purposes in a column."""
    width = max(len(name) for name, _ in entries) + 2
    return "".join(f"{name:<{width}}{purpose}".rstrip() + "\n" for name, purpose in entries)


def lines() -> list[tuple[str, str]]:
    """Each name that the tree shows, with its purpose; folders stand before what is in them."""
    found = files()
    entries = [
        (name, purpose(name)) for name in found if "/" not in name or name.startswith(".ci/")
    ]
    for folder in FOLDERS:
        inside = [name for name in found if name.startswith(f"{folder}/")]
        entries += tests(inside) if folder == "tests" else list(nested(inside))
    return entries


def files() -> list[str]:
    """The repository's files: those that git knows or would add, without git all that are there."""
    ask = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        names = done.stdout.split("\n")
    else:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
    known = (name for name in set(names) if "__pycache__" not in name and (ROOT / name).is_file())
    return sorted(known)


def nested(names: list[str]) -> Iterator[tuple[str, str]]:
    """Files indented below their folders; a package's docstring is the purpose of its folder. Data
    in JSON, which has no comments, stands behind the name of its folder."""
    opened: set[str] = set()
    for name in sorted(names, key=lambda name: (Path(name).parent.parts, name)):
        *folders, file = name.split("/")
        for depth in range(len(folders)):
            folder = "/".join(folders[: depth + 1])
            if folder not in opened:
                opened.add(folder)
                package = f"{folder}/__init__.py"
                told = WITHOUT_COMMENT.get(folder) or purpose(package)
                yield f"{'  ' * depth}{folders[depth]}/", told
        if file != "__init__.py" and not file.endswith(".json") and folder not in ALIKE:
            yield f"{'  ' * len(folders)}{file}", purpose(name)


def tests(names: list[str]) -> Iterator[tuple[str, str]]:
    """The files of tests/ itself, and one line for each folder in it."""
    yield "tests/", "One folder for each folder of megagrow/."
    for folder in sorted({name.split("/")[1] for name in names if name.count("/") > 1}):
        yield f"  {folder}/", ""
    yield from (
        ("  " + name.split("/")[1], purpose(name)) for name in names if name.count("/") == 1
    )


def purpose(name: str) -> str:
    """What a file says it is for; nothing if there is no such file or it does not say."""
    path = ROOT / name
    if name in WITHOUT_COMMENT or not path.is_file():
        return WITHOUT_COMMENT.get(name, "")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        told = ast.get_docstring(ast.parse(text)) or ""
    else:
        body = (line for line in text.splitlines() if not line.startswith("#!"))
        told = "\n".join(line[1:].strip() for line in takewhile(lambda x: x[:1] == "#", body))
    paragraph = " ".join(told.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + ("." if stop else "")


if __name__ == "__main__":
    sys.exit(main())
