"""The one error that is the user's to mend: bad input, reported in one line, exit code 2."""

from pathlib import Path


class InputError(Exception):
    """Something given to megagrow is wrong: a config key, a file, a checkpoint, a full disk.

    The message is one line that names the culprit and says what to do. The command line prints it
    without a traceback and exits with code 2, on all ranks together.
    """


def unwritable(path: Path, error: OSError) -> InputError:
    """What is said of a file that cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror}); free the disk or the path")
