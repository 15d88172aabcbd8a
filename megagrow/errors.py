"""The one error that is the user's to mend: bad input, reported in one line, exit code 2."""

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


def unwritable(path: Path, error: OSError) -> InputError:
    """What is said of a file that cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror}); free the disk or the path")
