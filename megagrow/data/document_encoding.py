"""Encode documents of any length in bounded memory.

A long document is encoded in overlapping windows. The overlap is also encoded by itself, and the
tokens on which all three encodings agree locate a seam: the tokens before it are taken from the
left window, those after it from the right one. At both ends of the overlap some tokens differ,
because a window cuts a word or starts with the space that a tokenizer adds; the seam keeps a
distance from them.

The result is exact for byte-pair encoding: a sequence of tokens is the encoding of its text if each
pair of adjacent tokens is that of its own, and every pair occurs in one of the windows. A window
starts at the start of a line, a word or a number, so a pre-tokenizer splits the rest of the text as
in the complete document. Where the encodings do not agree, the window is enlarged, if necessary to
the complete document.
"""

import re

import numpy as np

from megagrow.data.tokenizers import Tokenizer

WINDOW = 1 << 16
"""Characters encoded at a time; the fastest size for tokenizers without a pre-tokenizer."""

OVERLAP = 1 << 12
"""Characters that consecutive windows share, at least half of them."""

MARGIN = 8
"""Tokens before and after a seam on which the encodings must agree."""

LONG = 1 << 18
"""Length in characters from which a document is encoded in windows."""

_LINE = re.compile(r"(?<=\n)(?=\S)")
_WORD = re.compile(
    r"(?<=\s)(?=\S)|(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)"
)


def is_long(text: str) -> bool:
    """Return True if a document is encoded by itself, in windows where the tokenizer allows it."""
    return len(text) >= LONG


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the tokens of a document, int32 [length], equal to those of `encode_batch`.

    A document shorter than LONG, or any with a tokenizer that does not support windows, is encoded
    at once.
    """
    if not is_long(text) or not tokenizer.supports_windows:
        return _encode(tokenizer, text)
    return _encode_in_windows(tokenizer, text)


def _encode_in_windows(tokenizer: Tokenizer, text: str) -> np.ndarray:
    parts: list[np.ndarray] = []
    # `tokens` are those of the window [start, stop); the first `done` of them are in `parts`.
    start, stop = 0, min(WINDOW, len(text))
    tokens, done = _encode(tokenizer, text[:stop]), 0
    while stop < len(text):
        left = _window_start(text, start, stop)
        if left is not None:
            right = min(left + WINDOW, len(text))
            following = _encode(tokenizer, text[left:right])
            shared = _encode(tokenizer, text[left:stop])
            seam = _seam(tokens, shared, following)
            kept = 0 if seam is None else len(tokens) - len(shared) + seam
            if seam is not None and kept >= done:
                parts.append(tokens[done:kept])
                start, stop, tokens, done = left, right, following, seam
                continue
        stop = min(start + 2 * (stop - start), len(text))
        larger = _encode(tokenizer, text[start:stop])
        if not np.array_equal(larger[: done + MARGIN], tokens[: done + MARGIN]):
            return _encode(tokenizer, text)
        tokens = larger
    return np.concatenate([*parts, tokens[done:]])


def _window_start(text: str, start: int, stop: int) -> int | None:
    """Return the start of the window after [start, stop), or None if there is no suitable one."""
    first = max(stop - OVERLAP, start + 1)
    last = stop - OVERLAP // 2
    found = _LINE.search(text, first, last) or _WORD.search(text, first, last)
    return found.start() if found else None


def _seam(tokens: np.ndarray, shared: np.ndarray, following: np.ndarray) -> int | None:
    """Return the index in `shared` at which to change from `tokens` to `following`, or None.

    `shared` is the encoding of the end of the one's text and of the start of the other's.
    """
    common = min(len(tokens), len(shared))
    first = len(shared) - _common(tokens[::-1][:common], shared[::-1][:common]) + MARGIN
    common = min(len(following), len(shared))
    last = _common(following[:common], shared[:common]) - MARGIN
    return (first + last) // 2 if first <= last else None


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Return the length of the common prefix of two arrays of equal length."""
    different = np.flatnonzero(left != right)
    return int(different[0]) if len(different) else len(left)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode_batch([text])[0], dtype=np.int32)
