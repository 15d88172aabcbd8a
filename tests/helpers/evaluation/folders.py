"""Location of the optional data sets."""

from pathlib import Path

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
"""LAMBADA, LogiQA and WikiText in their published formats."""
