"""Instruction data: records of Alpaca's format as token ids that say which of them are answer.

A file holds a JSON list of {"instruction", "input", "output"}, or (NAME.jsonl) one such object per
line; "input" may be empty or left out, other keys are not looked at. The template is that of
Stanford Alpaca (Taori et al. 2023, train.py), and so is the rule by which tokens are told apart:
prompt and answer are tokenised as one text, and as many tokens as the prompt alone has are prompt.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.common.json_text import parse_json
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


@dataclass(frozen=True)
class Example:
    """What is asked, by the template, and what shall be answered."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class TokenisedExample:
    """The ids of prompt, answer and end of document, of which the first `prompt` are prompt."""

    ids: list[int]
    prompt: int


def prompt_of(instruction: str, given: str) -> str:
    """Alpaca's prompt for an instruction and its input, "" for one without."""
    template = WITH_INPUT if given else WITHOUT_INPUT
    return template.format(instruction=instruction, input=given)


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a file, in its order.

    Errors: InputError naming the file, and the record (from 1) or line that is at fault.
    """
    for where, record in _records(path):
        yield _example(record, where)


def tokenise(tokenizer: Tokenizer, example: Example) -> TokenisedExample:
    """An example in token ids, the answer ended by EOS: at least this one is not prompt.

    Where a token reaches from the prompt into the answer it counts as Alpaca's rule has it, by its
    place; there both texts together may even be shorter than the prompt.
    """
    prompt, whole = tokenizer.encode_batch([example.prompt, example.prompt + example.answer])
    return TokenisedExample([*whole, tokenizer.eos_id], min(len(prompt), len(whole)))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record with what to call it in an error."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a file of instructions") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                yield f"{path}: line {number}", _parsed(line, f"{path}: line {number}")
        return
    found = _parsed(raw, str(path))
    if not isinstance(found, list):
        raise DataError(
            f"{path}: no JSON list of records; a file with one record per line is named .jsonl"
        )
    yield from ((f"{path}: record {number}", item) for number, item in enumerate(found, start=1))


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return parse_json(raw)
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
    """The prefix of the mask that stands beside a corpus."""
    return with_suffix(prefix, ".mask")


def open_mask(
    stream: TokenStream, corpora: Sequence[CorpusConfig], seed: int, length: int, shuffle: bool
) -> TokenStream:
    """The stream of the masks of `stream`, which was opened with the same arguments: its label at
    a position is 1 where the stream's label is answer.

    Errors: InputError if a mask is missing, damaged or of another length than its corpus, or if
    the examples were packed into rows that are not `length` long.
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
            f"{missing}: no such file; stage: sft needs a mask beside its corpus: prepare it with "
            "megagrow prepare-sft"
        )
    mask = IndexedCorpus(prefix)
    if mask.num_tokens != corpus.num_tokens:
        raise DataError(
            f"{prefix}.bin: {mask.num_tokens} tokens are masked, the corpus has "
            f"{corpus.num_tokens}; prepare it again"
        )
    manifest = CorpusManifest.beside(corpus.prefix)
    packed = manifest.sequence_length if manifest else None
    if packed not in (None, length):
        raise ConfigError(
            f"{corpus.prefix}: its examples stand in rows of {packed} tokens, "
            f"data.sequence_length is {length}; make them equal"
        )
    return mask


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Which items stand in which row, in the order of their numbers: best fit, the fullest row
    that still has room. No length is above `row`."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is free in a row, its number), ascending
    for item, length in enumerate(lengths):
        place = bisect_left(rooms, (length, 0))
        free, number = rooms.pop(place) if place < len(rooms) else (row, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(item)
        if free > length:
            insort(rooms, (free - length, number))
    return rows
