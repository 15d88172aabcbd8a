"""The model of a step against throughputs that others published: as docs/results/scaling.md states
them."""

import json
from statistics import median

import pytest

from megagrow.planning.published import ROWS, Published, published_rows
from tools.docs.scaling_table import PAGE, one_mfu_within, with_tables, within

PUBLISHED_PARAMETERS = {
    "mpt-125m": 125_311_488,
    "mpt-350m": 355_985_408,
    "mpt-760m": 760_470_528,
    "mpt-1b": 1_315_950_592,
    "mpt-3b": 2_651_837_440,
    "mpt-7b": 6_658_859_008,
    "mpt-13b": 12_853_954_560,
    "mpt-30b": 29_975_214_080,
    "mpt-70b": 64_862_437_376,
}
"""llm-foundry's own table, at 2,048 tokens."""


PIPELINES = 11
"""Rows with pipelines that are predicted within 15%; there are 12."""


def rows_of(role: str) -> list[Published]:
    return [row for row in published_rows() if row.role == role]


def test_the_page_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python tools/docs/scaling_table.py"


@pytest.mark.parametrize(
    ("role", "rows", "within_15", "within_10", "median_error"),
    [("set", 7, 7, 7, 0.034), ("held out", 149, 139, 116, 0.048), ("fresh", 117, 102, 86, 0.06)],
)
def test_the_errors_are_as_stated(
    role: str, rows: int, within_15: int, within_10: int, median_error: float
) -> None:
    found = rows_of(role)
    assert (len(found), within(found, 0.15), within(found, 0.10)) == (rows, within_15, within_10)
    assert median(abs(row.error) for row in found) <= median_error


def test_rows_of_no_constant_are_met_on_all_sizes_and_counts() -> None:
    """Minimum count: of each of these groups alone at least six, and on each card."""
    held = [row for row in published_rows() if row.role != "set" and abs(row.error) <= 0.15]
    billions = [row.work.shape.parameters / 1e9 for row in held]
    for least, most in ((0.1, 1), (1, 3), (6, 10), (10, 40), (60, 80)):
        assert sum(least <= size <= most for size in billions) >= 6, (least, most)
    for gpus in (8, 16, 32, 64, 128, 512):
        assert sum(row.work.gpus == gpus for row in held) >= 6, gpus
    assert {row.cluster.gpu.name for row in held} == {"A100", "H100", "H200"}
    assert {row.work.zero_stage for row in held} == {0, 2, 3}
    assert {row.work.tp for row in held} == {1, 2, 4, 8}
    assert sum(row.work.pp > 1 for row in held) == PIPELINES


def test_it_tells_more_than_one_utilization_per_card() -> None:
    for role in ("held out", "fresh"):
        assert within(rows_of(role), 0.15) > 1.25 * one_mfu_within(rows_of(role), 0.15)


def test_models_have_as_many_parameters_as_published() -> None:
    """Matrices, learned positions, and 13 vectors of the hidden size in a layer: biases, norms."""
    models = json.loads(ROWS.read_text(encoding="utf-8"))["models"]
    for name, published in PUBLISHED_PARAMETERS.items():
        row = next(row for row in published_rows() if row.model == name)
        hidden, layers = models[name]["hidden_size"], models[name]["num_hidden_layers"]
        vectors = (2048 + 13 * layers + 2) * hidden
        assert row.work.shape.parameters + vectors == published


def test_every_row_names_where_it_is_from() -> None:
    for row in published_rows():
        assert row.address.startswith("https://") and row.tokens_per_gpu > 0
        assert row.work.gpus <= row.cluster.gpus
        assert row.role in ("set", "held out", "fresh")
