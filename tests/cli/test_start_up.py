"""Commands that end with an error before they need torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.source_tree import ROOT

SLOW = ("torch", "scipy", "matplotlib", "transformers")
"""Packages whose import takes longer than the rest of such a command."""

COMMANDS = {
    "": "Usage: megagrow",
    "checkpoint": "Usage: megagrow checkpoint",
    "tran": "error: No such command 'tran'. Did you mean 'train'?; see megagrow --help\n",
    "plan": "error: Missing argument 'run_file'; see megagrow plan --help\n",
    "plan --wrld 3 x": "error: No such option: --wrld (Possible options: --world); see megagrow",
    "prepare x --output y --tokenizer train --vocab-size ten": (
        "error: Invalid value for '--vocab-size': should be a whole number"
    ),
    "prepare x --output y --tokenizer train --vocab-size 32k": "error: x: no such file or folder",
    "config show none.yaml": "none.yaml: no such file",
    "plan none.yaml": "none.yaml: no such file",
    "train none.yaml": "none.yaml: no such file",
    "train none.yaml --dry-run": "none.yaml: no such file",
    "doctor --run none.yaml": "none.yaml: no such file",
    "checkpoint ls none": "none: no such directory",
    "checkpoint show none": "none: no such directory",
    "checkpoint verify none": "none: no such file or directory",
    "checkpoint prune none --keep-last 1": "none: no such directory",
    "report none --output out": "none: no such file or directory",
    "fit scaling none --output out": "none: no such file or directory",
    "eval none": "none: no such directory",
    "grow none out --to llama-1.1b": "none: no such directory",
    "convert hf-export none out": "none: no such directory",
    "convert reshard none out": "none: no such directory",
}
"""Arguments and the error."""


PROBE = f"""
import contextlib, io, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from megagrow.cli.app import main
for arguments in {[*COMMANDS]}:
    sys.argv[1:] = arguments.split()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            main()
    except SystemExit as end:
        imported = [name for name in {SLOW} if name in sys.modules]
        print(json.dumps([arguments, end.code, errors.getvalue(), imported]))
"""


def test_errors_do_not_wait_for_imports(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    ends = {arguments: rest for arguments, *rest in map(json.loads, done.stdout.splitlines())}
    assert ends.keys() == COMMANDS.keys()
    for arguments, (code, message, imported) in ends.items():
        assert code == 2, arguments
        assert COMMANDS[arguments] in message
        assert not imported, arguments


def test_characters_that_the_output_cannot_encode_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("# \xe9\u65e5\nstages: []\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", "config", "ls"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert "\xe9\\u65e5" in done.stdout.decode("latin-1")
