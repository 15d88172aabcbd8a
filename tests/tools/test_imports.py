"""All tools can be imported: names that they use exist."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("tools/**/*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_a_tool_can_be_imported(module: str) -> None:
    importlib.import_module(module)
