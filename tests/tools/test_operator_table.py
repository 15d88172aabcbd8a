"""docs/reference/operators.md: the static columns of the table are current."""

import subprocess
import sys

import pytest

from tools.docs import operator_table
from tools.docs.operator_table import BEGIN, END, MEASURED, PAGE, kept_cells, with_table
from tools.docs.operators.catalogue import CATALOGUE

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_static_columns_are_current() -> None:
    command = [sys.executable, operator_table.__file__, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_growth_is_measured() -> None:
    cells = kept_cells(TEXT)
    assert cells.keys() >= CATALOGUE.keys()
    for label in CATALOGUE:
        logits, later, kl, live = cells[label]
        assert all(float(cell) >= 0 for cell in (logits, kl, live)), label
        assert not later or float(later) < 1e-12, label


def test_a_new_table_keeps_the_rest_of_the_page() -> None:
    measured = {label: ("1e+00",) * len(MEASURED) for label in CATALOGUE}
    page = with_table(TEXT, measured)
    assert kept_cells(page)["lemon"] == measured["lemon"]
    assert page.partition(BEGIN)[0] == TEXT.partition(BEGIN)[0]
    assert page.partition(END)[2] == TEXT.partition(END)[2]


def test_a_stale_static_column_is_detected() -> None:
    stale = TEXT.replace("more layers | reset |", "more layers | asymmetric |")
    assert stale != TEXT
    assert with_table(stale, kept_cells(stale)) == TEXT


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="end of table"):
        with_table("# Operators\n", {})
