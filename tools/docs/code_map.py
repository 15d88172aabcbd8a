"""Write the file tree of docs/reference/code-map.md from the first sentence of each file.

The description of a file is the first sentence of its docstring or of its leading comment.

    python tools/docs/code_map.py           update the page
    python tools/docs/code_map.py --check   exit with code 1 if the page is out of date
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
PAGE = ROOT / "docs" / "reference" / "code-map.md"
COMMAND = f"python {Path(__file__).resolve().relative_to(ROOT).as_posix()}"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->\n"

FOLDERS = ("megagrow", "kernels", "configs", "launchers", "examples", "tools", "tests")
"""Folders that are listed file by file, except tests/, of which only the subfolders are listed."""

HIDDEN = (".ci/", ".github/")
"""Hidden folders that are listed with the files of the root."""

WITHOUT_COMMENT = {
    ".github/PULL_REQUEST_TEMPLATE.md": "Checklist of a pull request.",
    "CHANGELOG.md": "Notable changes of each version.",
    "CONTRIBUTING.md": "Layout rules, glossary, extension guides, tests and commit style.",
    "LICENSE": "Apache-2.0.",
    "README.md": "Overview, quick start and the most important commands.",
    "SECURITY.md": "Handling of untrusted files, and how to report a vulnerability.",
    "megagrow/analysis/report/templates/content.html": "Template of the content of a report.",
    "megagrow/analysis/report/templates/page.html": "Template of the page around the content.",
    "megagrow/analysis/report/templates/problem.html": "Template of a page without a report.",
    "megagrow/py.typed": "Marker of PEP 561: the package has type annotations.",
    "configs/hardware": "Profiles by GPU and size: layout, activation checkpointing, micro-batch.",
    "kernels/megagrow_kernels/tiles": "One table of tile sizes per kernel, as JSON.",
}
"""Descriptions of files and folders that cannot hold a comment."""

ALIKE = ("configs/hardware",)
"""Folders whose file names describe the files; only the folder is listed."""

ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|cf|eq|et al)\.$")
"""A text that ends in one of these has not reached the end of a sentence."""


def main() -> int:
    """Write the tree, or check it, and return the exit code."""
    written = PAGE.read_text(encoding="utf-8")
    current = with_tree(written, render(lines()))
    if "--check" in sys.argv[1:]:
        if written != current:
            print(f"{PAGE.relative_to(ROOT)} is out of date; run: {COMMAND}")
        return int(written != current)
    PAGE.write_text(current, encoding="utf-8")
    return 0


def with_tree(page: str, tree: str) -> str:
    """Return the text of the page with the tree between its two markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} needs the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}```\n{tree}```\n{END}{after}"


def render(entries: list[tuple[str, str]]) -> str:
    """Format one line per entry, with the descriptions aligned in a column."""
    width = max(len(name) for name, _ in entries) + 2
    return "".join(f"{name:<{width}}{text}".rstrip() + "\n" for name, text in entries)


def lines() -> list[tuple[str, str]]:
    """Return each listed name with its description, folders before their files."""
    names = files()
    top = [name for name in names if "/" not in name or name.startswith(HIDDEN)]
    entries = [(name, description(name)) for name in top]
    for folder in FOLDERS:
        inside = [name for name in names if name.startswith(f"{folder}/")]
        entries += tests(inside) if folder == "tests" else list(nested(inside))
    return entries


def files() -> list[str]:
    """Return the files that git tracks or would add; without git, all files of the folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        names = done.stdout.split("\n")
    else:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
    known = (name for name in set(names) if "__pycache__" not in name and (ROOT / name).is_file())
    return sorted(known)


def nested(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield files indented below their folders.

    The docstring of a package describes its folder. JSON files cannot hold a comment and are not
    listed.
    """
    opened: set[str] = set()
    for name in sorted(names, key=lambda name: (Path(name).parent.parts, name)):
        *folders, file = name.split("/")
        for depth in range(len(folders)):
            folder = "/".join(folders[: depth + 1])
            if folder not in opened:
                opened.add(folder)
                text = WITHOUT_COMMENT.get(folder) or description(f"{folder}/__init__.py")
                yield f"{'  ' * depth}{folders[depth]}/", text
        if file != "__init__.py" and not file.endswith(".json") and folder not in ALIKE:
            yield f"{'  ' * len(folders)}{file}", description(name)


def tests(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield one line per folder of tests/, then the files directly in it."""
    yield "tests/", "One folder for each folder of megagrow/, and tests of the repository itself."
    for folder in sorted({name.split("/")[1] for name in names if name.count("/") > 1}):
        yield f"  {folder}/", description(f"tests/{folder}/__init__.py")
    for name in names:
        if name.count("/") == 1:
            yield f"  {name.split('/')[1]}", description(name)


def description(name: str) -> str:
    """Return the first sentence of a file, or an empty text if it has none."""
    path = ROOT / name
    if name in WITHOUT_COMMENT or not path.is_file():
        return WITHOUT_COMMENT.get(name, "")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    body = (line for line in text.splitlines() if not line.startswith(("#!", "#SBATCH")))
    comment = takewhile(lambda line: line.startswith(("#", "//")), body)
    return first_sentence("\n".join(line.lstrip("#/").strip() for line in comment))


def first_sentence(text: str) -> str:
    """Return the first sentence of the first paragraph of a text, on one line.

    A full stop inside an abbreviation does not end the sentence, except for "et al." before a
    capital letter.
    """
    paragraph = " ".join(text.split("\n\n")[0].split())
    for stop in re.finditer(r"[.?!](?= |$)", paragraph):
        sentence, rest = paragraph[: stop.end()], paragraph[stop.end() :]
        ends = sentence.endswith("et al.") and re.match(r" [A-Z]", rest)
        if ends or not ABBREVIATION.search(sentence):
            return sentence
    return paragraph


if __name__ == "__main__":
    sys.exit(main())
