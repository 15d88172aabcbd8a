"""Instruction data: Alpaca records as token ids with a mask of the answer tokens.

A file contains a JSON list of {"instruction", "input", "output"}, or (NAME.jsonl, NAME.ndjson) one
such object per line; "input" may be empty or absent, other keys are ignored. Template and masking
rule are those of Stanford Alpaca (Taori et al. 2023, train.py): prompt and answer are tokenized as
one text, and its first n tokens are prompt, where n is the token count of the prompt alone.

A mask is a corpus of 0 and 1 in the files PREFIX.mask.bin and PREFIX.mask.idx, with the same
documents as the corpus; 1 marks answer tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.common.json_text import limited_lines, parse_json, read_limited
from megagrow.config.schema import CorpusConfig
from megagrow.data.indexed import IndexedCorpus, with_suffix
from megagrow.data.manifest import CorpusManifest
from megagrow.data.stream import TokenStream
from megagrow.data.tokenizers import Tokenizer
from megagrow.errors import ConfigError, DataError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

LIST_BYTES = 1_000_000_000
"""Maximum size of a JSON list, or of a line of a .jsonl file."""


@dataclass(frozen=True)
class Example:
    """Prompt, formatted by the template, and the expected answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of prompt, answer and EOS; the first `prompt` ids are the prompt."""

    ids: list[int]
    prompt: int


def prompt_of(instruction: str, input_text: str) -> str:
    """Return Alpaca's prompt for an instruction and its input, "" if it has none."""
    template = WITH_INPUT if input_text else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input_text)


def read_examples(path: Path) -> Iterator[Example]:
    """Yield the examples of a file in order.

    Raises DataError naming the file and the invalid record (from 1) or line.
    """
    for where, record in _records(path):
        yield _example(record, where)


def tokenize(tokenizer: Tokenizer, example: Example) -> TokenizedExample:
    """Tokenize an example; the answer ends with EOS, so at least one token is not prompt.

    A token that spans prompt and answer is classified by its position, as in Alpaca; the combined
    text may then have fewer tokens than the prompt alone.
    """
    prompt, full = tokenizer.encode_batch([example.prompt, example.prompt + example.answer])
    return TokenizedExample([*full, tokenizer.eos_id], min(len(prompt), len(full)))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield every record with its location for error messages."""
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            yield from _lines(path)
            return
        raw = read_limited(path, LIST_BYTES, DataError)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a file of instructions") from error
    records = _parsed(raw, str(path))
    if not isinstance(records, list):
        raise DataError(
            f"{path}: not a JSON list of records; use the suffix .jsonl for one record per line"
        )
    yield from ((f"{path}: record {number}", item) for number, item in enumerate(records, start=1))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        try:
            for number, line in enumerate(limited_lines(file, LIST_BYTES), start=1):
                if line.strip():
                    yield f"{path}: line {number}", _parsed(line, f"{path}: line {number}")
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return parse_json(raw, most_values=len(raw))
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _example(record: Any, where: str) -> Example:
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an object with the keys instruction, input and output")
    values = {"input": "", **record}
    for key in ("instruction", "input", "output"):
        if not isinstance(values.get(key), str):
            raise DataError(f"{where}: no text under the key {key!r}")
    if not values["instruction"].strip():
        raise DataError(f"{where}: the instruction is empty")
    return Example(prompt_of(values["instruction"], values["input"]), values["output"])


def mask_prefix(prefix: Path) -> Path:
    """Return the prefix of the mask of a corpus."""
    return with_suffix(prefix, ".mask")


def open_mask(
    stream: TokenStream, corpora: Sequence[CorpusConfig], seed: int, length: int, shuffle: bool
) -> TokenStream:
    """Open the mask stream of `stream`, which was opened with the same arguments.

    Its label at a position is 1 where the stream's label is an answer token. Raises DataError if a
    mask is missing, damaged or differs in length from its corpus, or if the examples were packed
    into rows of another length than `length`.
    """
    masks = [_opened(corpus, length) for corpus in stream.corpora]
    return TokenStream(masks, [corpus.weight for corpus in corpora], seed, length, shuffle)


def _opened(corpus: IndexedCorpus, length: int) -> IndexedCorpus:
    prefix = mask_prefix(corpus.prefix)
    missing = next(
        (p for s in (".bin", ".idx") if not (p := with_suffix(prefix, s)).is_file()), None
    )
    if missing is not None:
        raise DataError(
            f"{missing}: no such file; objective: sft requires a mask for its corpus; prepare "
            "it with megagrow prepare-sft"
        )
    mask = IndexedCorpus(prefix)
    if mask.num_tokens != corpus.num_tokens:
        raise DataError(
            f"{prefix}.bin: the mask has {mask.num_tokens} tokens, the corpus has "
            f"{corpus.num_tokens}; prepare it again"
        )
    manifest = CorpusManifest.read(corpus.prefix.parent)
    packed = manifest.sequence_length if manifest else None
    if packed not in (None, length):
        raise ConfigError(
            f"{corpus.prefix}: its examples are packed into rows of {packed} tokens, but "
            f"data.sequence_length is {length}; make them equal"
        )
    return mask


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Assign items, in order, to rows of length `row`: best fit, the fullest row with room.

    No item is longer than `row`. Returns the item indices of each row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free length, row index), ascending
    for item, length in enumerate(lengths):
        candidate = bisect_left(rooms, (length, 0))
        free, number = rooms.pop(candidate) if candidate < len(rooms) else (row, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(item)
        if free > length:
            insort(rooms, (free - length, number))
    return rows
