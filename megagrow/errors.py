"""User-facing errors, printed on one line, and errors that end a run; with their exit codes."""

import errno
from pathlib import Path

MESSAGE_LENGTH = 4000
"""Maximum characters of a message; the middle of a longer one is omitted."""


def printable(text: str) -> str:
    """Return text with the characters that a terminal or a log would interpret escaped.

    These are control characters, line breaks, bidirectional overrides and lone surrogates: `\\x1b`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class InputError(Exception):
    """Base of all errors that the user can fix.

    `code` is the exit code of all ranks. A subclass takes the message as its only argument, so that
    `parallel.agreement` can raise it on the other ranks. The subclass states which input must
    change. The message is one line that names the key, file or rank and the fix; the command line
    prints it without a traceback. It may contain names from untrusted files: characters that a
    terminal would interpret are escaped.
    """

    code = 2

    def __init__(self, message: str) -> None:
        shown = printable(message)
        if len(shown) > MESSAGE_LENGTH:
            half = MESSAGE_LENGTH // 2 - 5
            shown = f"{shown[:half]} [...] {shown[-half:]}"
        super().__init__(shown)


class ConfigError(InputError):
    """Invalid run file, override, command-line option or launcher setting."""


class DataError(InputError):
    """Invalid corpus, tokenizer, text, benchmark data or recorded metrics."""


class CheckpointError(InputError):
    """Missing, damaged or incompatible checkpoint, in the native or another format."""


class ResourceError(InputError):
    """Missing disk space, memory, permission, device or package."""


class RunError(Exception):
    """A run that cannot continue although its input is valid (docs/guides/fault-tolerance.md).

    The message is one line, escaped as for `InputError`; `code` is the exit code.
    """

    code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Diverged(RunError):
    """All rewinds allowed by `guards` are used up."""

    code = 3


HANG_CODE = 4
"""Exit code of ranks ended by the watchdog because a rank is unresponsive."""


class PeerLost(RunError):
    """Another rank has died, so collective operations cannot complete.

    Args:
        message: one line.
        is_reporter: True on the one rank that prints the message.
    """

    code = 5

    def __init__(self, message: str, is_reporter: bool) -> None:
        super().__init__(message)
        self.is_reporter = is_reporter


_FIXES = (
    ((errno.ENOSPC, errno.EDQUOT), "free disk space"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "fix the permissions"),
    ((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
)


def unwritable(path: Path, error: OSError) -> ResourceError:
    """Return the error for a file that cannot be written, with the fix for its cause if known."""
    fixes = [fix for codes, fix in _FIXES if error.errno in codes]
    return ResourceError("; ".join([f"{path}: cannot be written ({error.strerror})", *fixes]))
