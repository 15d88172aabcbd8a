"""Command line of the generators that keep a documentation page up to date."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_or_check(page: Path, render: Callable[[str], str], tool: str) -> int:
    """Update a page, or with --check compare it with its up-to-date text.

    Args:
        page: file to update.
        render: maps the text of the page to its up-to-date text.
        tool: path of the generator in the repository, for the message.

    Returns:
        Exit code: 1 if --check finds an outdated page.
    """
    parser = argparse.ArgumentParser(description=f"Update {page.relative_to(ROOT)}.")
    parser.add_argument("--check", action="store_true", help="Only compare the page.")
    check = parser.parse_args().check
    text = page.read_text(encoding="utf-8")
    current = render(text)
    if not check:
        page.write_text(current, encoding="utf-8")
        return 0
    if text != current:
        print(f"{page.relative_to(ROOT)} is out of date; run: python {tool}", file=sys.stderr)
    return int(text != current)
