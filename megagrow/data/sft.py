"""Instruction data: records of Alpaca's format as token ids that say which of them are answer.

A file holds a JSON list of {"instruction", "input", "output"}, or (NAME.jsonl) one such object per
line; "input" may be empty or left out, other keys are not looked at. The template is that of
Stanford Alpaca (Taori et al. 2023, train.py), and so is the rule by which tokens are told apart:
prompt and answer are tokenised as one text, and as many tokens as the prompt alone has are prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.common.json_text import parse_json
from megagrow.data.tokenizers import Tokenizer
from megagrow.errors import InputError

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
        raise InputError(f"{path}: {error.strerror}; name a file of instructions") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                yield f"{path}: line {number}", _parsed(line, f"{path}: line {number}")
        return
    found = _parsed(raw, str(path))
    if not isinstance(found, list):
        raise InputError(
            f"{path}: no JSON list of records; a file with one record per line is named .jsonl"
        )
    yield from ((f"{path}: record {number}", item) for number, item in enumerate(found, start=1))


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return parse_json(raw)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _example(record: Any, where: str) -> Example:
    if not isinstance(record, dict):
        raise InputError(f"{where}: not an object with the keys instruction, input and output")
    values = {"input": "", **record}
    for key in ("instruction", "input", "output"):
        if not isinstance(values.get(key), str):
            raise InputError(f"{where}: no text under the key {key!r}")
    if not values["instruction"].strip():
        raise InputError(f"{where}: the instruction is empty")
    return Example(prompt_of(values["instruction"], values["input"]), values["output"])
