"""Errors that are told in one line: what the user can mend, and what ends a run from outside."""

from pathlib import Path


class InputError(Exception):
    """Something given to megagrow is wrong: a config key, a file, a checkpoint, a full disk.

    The message is one line that names the culprit and says what to do. The command line prints it
    without a traceback and exits with code 2, on all ranks together. Names out of files that
    somebody else has written may stand in it: what a terminal would obey is shown as an escape.
    """

    def __init__(self, message: str) -> None:
        shown = (char if char.isprintable() else repr(char)[1:-1] for char in message)
        super().__init__("".join(shown))


class RunError(Exception):
    """A run cannot go on, through no mistake in what it was given (docs/guides/fault-tolerance.md).

    The message is one line, as that of an InputError; the exit code is that of the class.
    """

    code = 1


class Diverged(RunError):
    """All rewinds that a run may make are used up."""

    code = 3


HANG_CODE = 4
"""Exit code of ranks that a watchdog has ended, since one of them did not get on."""


class PeerLost(RunError):
    """Another rank has died, so that what all ranks do together cannot be done.

    `is_reporter`: whether this rank is the one that says so.
    """

    code = 5

    def __init__(self, message: str, is_reporter: bool) -> None:
        super().__init__(message)
        self.is_reporter = is_reporter


def unwritable(path: Path, error: OSError) -> InputError:
    """What is said of a file that cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror}); free the disk or the path")
