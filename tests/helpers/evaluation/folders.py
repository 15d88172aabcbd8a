"""Where the data sets lie that some tests read."""

from pathlib import Path

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
"""LAMBADA, LogiQA and WikiText in the forms in which they were published."""
