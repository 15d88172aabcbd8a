"""Extract the commands that README.md and docs/ print, and run one of them as printed."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from deepspeed.launcher.runner import parse_args as parse_deepspeed
from torch.distributed.run import get_args_parser as torchrun_parser
from typer.testing import CliRunner

from megagrow.cli.app import app
from tests.helpers.jobs import Job

ROOT = Path(__file__).resolve().parents[2]


def commands(page: str) -> Iterator[str]:
    """Yield each command of the bash blocks of a page, on one line and without its comment."""
    for block in re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        open_lines = ""
        for line in block.replace("\\\n", " ").splitlines():
            open_lines += f"{line}\n"
            try:
                words = shlex.split(open_lines, comments=True)
            except ValueError:  # a quotation continues on the next line
                continue
            if words:
                yield open_lines.strip() if "\n" in open_lines.strip() else without_comment(line)
            open_lines = ""


def without_comment(line: str) -> str:
    """Return a line without its comment, with each run of spaces replaced by one space."""
    return re.sub(r"\s+", " ", re.sub(r"\s#.*", "", line)).strip()


def of_megagrow(command: str) -> Iterator[list[str]]:
    """Yield the arguments that megagrow receives, for each part of a shell command."""
    for part in re.split(r"&&|\|", command):
        words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
        if "megagrow" in words:
            at = words.index("megagrow")
            if at == 0 or words[at - 1] in ("-m", "--module"):
                yield words[at + 1 :]


def execute(command: str, folder: Path) -> str:
    """Run a command in the current directory and return its output.

    A training command runs on as many forked ranks as its launcher would start, with the arguments
    that the launcher would pass on.
    """
    name, *words = shlex.split(command)
    if name == "megagrow" and words[0] != "train":
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"
        return result.output
    world, passed = launched(name, words)
    job = Job(folder / f"output-{len(list(folder.iterdir()))}", world, passed).finish()
    assert job.codes == [0] * world, f"{command}\n{os.linesep.join(job.err)}"
    assert job.err == [""] * world, f"{command}\n{os.linesep.join(job.err)}"
    return job.out[0]


def launched(name: str, words: list[str]) -> tuple[int, list[str]]:
    """Return the number of ranks that a launcher starts here, and the arguments of each."""
    if name == "torchrun":
        options = torchrun_parser().parse_args(words)
        assert options.module and options.training_script == "megagrow"
        return int(options.nproc_per_node), options.training_script_args
    if name == "deepspeed":
        options = parse_deepspeed(words)
        assert options.module and options.user_script == "megagrow"
        return options.num_gpus, options.user_args
    assert name == "megagrow"
    return 1, words
