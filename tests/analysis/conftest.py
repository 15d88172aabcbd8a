"""Fixtures that write runs."""

from tests.helpers.written_runs import grown_run, make_run  # noqa: F401  (fixtures)
