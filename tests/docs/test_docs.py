"""Documentation pages: all are reachable from docs/index.md, and all links and anchors resolve."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def without_code(text: str) -> str:
    """Return a page without its fenced blocks and inline code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`", text)


def links(text: str) -> list[str]:
    """Return the targets of the links and images of a page that are not URLs."""
    targets = re.findall(r"\]\(<?([^)\s>]+)", without_code(text))
    targets += re.findall(r"^\[[^\]]+\]:\s+(\S+)", without_code(text), flags=re.MULTILINE)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> Iterator[str]:
    """Yield the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)\s*#*$", text, flags=re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = seen.get(anchor, 0)
        seen[anchor] = count + 1
        yield f"{anchor}-{count}" if count else anchor


def broken(page: Path) -> list[str]:
    """Return the links of a page whose file or anchor does not exist."""
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_resolve(page: Path) -> None:
    assert broken(page) == []


def test_every_page_is_linked_from_the_index() -> None:
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(INDEX.read_text())}
    pages = {page.resolve() for page in DOCS.rglob("*.md")} - {INDEX}
    assert len(pages) > 15
    missing = sorted(page.relative_to(DOCS).as_posix() for page in pages - linked)
    assert missing == [], "add a line for each of these pages to docs/index.md"


def test_every_line_of_the_index_describes_its_page() -> None:
    rows = re.findall(r"^\| \[[^\]]+\]\(([^)]+)\) \| (.+) \|$", INDEX.read_text(), re.MULTILINE)
    assert len(rows) == len({page for page, _ in rows}) > 15
    assert [page for page, text in rows if len(text.split()) < 3] == []


def test_the_readme_links_to_the_index() -> None:
    assert "docs/index.md" in links((ROOT / "README.md").read_text(encoding="utf-8"))


def test_broken_links_are_detected(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# `model.rope`: RoPE, 2nd part\n## A [link](page.md)\n## A link\n")
    good = ("other.md#modelrope-rope-2nd-part", "other.md#a-link", "other.md#a-link-1", "#top")
    bad = ("missing.md", "other.md#a-link-2", "#bottom")
    page.write_text("# Top\n" + "".join(f"[x]({link})\n" for link in (*good, *bad)))
    assert [wrong.partition(":")[0] for wrong in broken(page)] == list(bad)
