"""Commands that have to be refused: two ranks of `megagrow` and the one line they leave."""

from collections.abc import Iterable
from pathlib import Path

from megagrow.config.schema import RunConfig
from tests.helpers.jobs import Finished, Hook, Job
from tests.helpers.runs import STEP_TOKENS, make_run

WORLD = 2
SECONDS = 30
"""A job that is not over by then hangs."""


def assert_refused(done: Finished) -> str:
    """The line that all ranks together leave on stderr, without its `error: `."""
    assert done.codes == [2] * len(done.codes), done
    text = "".join(done.err)
    assert text.startswith("error: ") and text.endswith("\n") and text.count("\n") == 1, text
    assert "Traceback" not in "".join(done.out) + text
    return text.removeprefix("error: ").rstrip("\n")


def refused(
    folder: Path, words: Iterable[str], world: int = WORLD, hook: Hook | None = None
) -> str:
    """Return the output of `megagrow WORDS`; its output goes to `folder`."""
    return assert_refused(Job(folder, world, words, hook).finish(SECONDS))


def refused_run(path: Path, *overrides: str, world: int = WORLD, hook: Hook | None = None) -> str:
    """Return the output of `megagrow train` on a run file, with overrides given by --set."""
    return refused(path.with_suffix(".output"), _words(path, overrides), world, hook)


def completed_run(path: Path, *overrides: str) -> Finished:
    """`megagrow train` on a run that has to come to its end without a complaint."""
    done = Job(path.with_suffix(".output"), WORLD, _words(path, overrides)).finish(SECONDS)
    assert done.codes == [0] * WORLD and done.err == [""] * WORLD, done
    return done


def _words(path: Path, overrides: Iterable[str]) -> list[str]:
    return ["train", str(path), *(word for text in overrides for word in ("--set", text))]


def tiny_run(tmp: Path, steps: int = 6) -> RunConfig:
    """Validated and saved after every second step."""
    return make_run(
        tmp,
        [{"tokens": steps * STEP_TOKENS}],
        checkpoint={"interval": 2, "keep_last": 3},
        validation={"interval": 2, "tokens": 256},
    )
