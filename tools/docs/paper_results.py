"""Write docs/results/paper-results.md from megagrow/analysis/paper_results.json.

python tools/docs/paper_results.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.analysis.paper import paper_markdown, read_paper  # noqa: E402

if __name__ == "__main__":
    (ROOT / "docs/results/paper-results.md").write_text(
        paper_markdown(read_paper()), encoding="utf-8"
    )
