"""tools/docs/code_map.py: sentence splitting, and that docs/reference/code-map.md is current."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs import code_map

PAGE = code_map.PAGE.read_text(encoding="utf-8")


def test_the_code_map_is_current() -> None:
    command = [sys.executable, code_map.__file__, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert PAGE.endswith(f"```\n{code_map.END}")


def test_every_file_in_the_tree_has_a_description() -> None:
    tree = PAGE.rpartition(code_map.BEGIN)[2].partition("```\n")[2].partition("```\n")[0]
    files = [line for line in tree.splitlines() if not line.split()[0].endswith("/")]
    assert len(files) > 200
    assert [line for line in files if len(line.split()) < 2] == []


def test_check_detects_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stale = code_map.ROOT / "docs" / "reference" / "code-map.md"
    monkeypatch.setattr(code_map, "lines", lambda: [("a.py", "A new file.")])
    monkeypatch.setattr(sys, "argv", ["code_map.py", "--check"])
    assert code_map.main() == 1
    assert f"{stale.relative_to(code_map.ROOT)} is out of date" in capsys.readouterr().out
    assert stale.read_text(encoding="utf-8") == PAGE


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Adam. More of it.", "Adam."),
        ("One line\nand another. More.", "One line and another."),
        ("A title\n\nA paragraph. More.", "A title"),
        ("LiGO (Wang et al. 2023), learned. More.", "LiGO (Wang et al. 2023), learned."),
        ("Equation 2 of Du et al. (2024). More.", "Equation 2 of Du et al. (2024)."),
        ("Equation 2 of Du et al. More.", "Equation 2 of Du et al."),
        ("Equation 2 of Du et al.", "Equation 2 of Du et al."),
        ("A list, e.g. Llama models. More.", "A list, e.g. Llama models."),
        ("Adam's v, i.e. the second moment. More.", "Adam's v, i.e. the second moment."),
        ("Triton vs. Gluon. More.", "Triton vs. Gluon."),
        ("Scaling of eq. 17. More.", "Scaling of eq. 17."),
        ("Version 1.5 of config.json. More.", "Version 1.5 of config.json."),
        ("Compare the revs. More.", "Compare the revs."),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert code_map.first_sentence(text) == sentence


def test_directives_of_a_scheduler_are_no_description() -> None:
    assert code_map.description("launchers/slurm.sh").startswith("Train under SLURM")


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="end of tree"):
        code_map.with_tree("# Code map\n", "a.py\n")
