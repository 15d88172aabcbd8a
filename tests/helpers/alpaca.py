"""Instructions for tests: records of Alpaca's format, a tokenizer for them, a prepared corpus."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from megagrow.data.manifest import CorpusManifest
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.sft import WITH_INPUT, WITHOUT_INPUT
from megagrow.data.sft_prepare import prepare_sft

VOCAB = 420
"""Most of the template's words are one token each."""

VERBS = ("Double", "Spell", "Repeat", "Reverse")


def records(count: int) -> list[dict[str, str]]:
    """Tasks with an input, and every third one without; answers are of different lengths."""
    made = []
    for number in range(count):
        verb, given = VERBS[number % 4], f"{number} {'ab' * (number % 5)}"
        answer = f"{2 * number}" + " x" * (number % 7)
        if number % 3:
            made.append({"instruction": f"{verb} it.", "input": given, "output": answer})
        else:
            made.append({"instruction": f"{verb} {given}", "input": "", "output": answer})
    return made


def write_alpaca(path: Path, made: list[Any]) -> Path:
    """The records as one JSON list, or one per line of a file that is not .json."""
    lines = [json.dumps(record) for record in made]
    text = "\n".join(lines) if path.suffix != ".json" else f"[{', '.join(lines)}]"
    path.write_text(text, encoding="utf-8")
    return path


def tokenizer(folder: Path) -> Path:
    """A SentencePiece model that knows the template."""
    path = folder / "alpaca.model"
    if not path.exists():
        texts = [WITH_INPUT, WITHOUT_INPUT, *(f"{r['input']} {r['output']}" for r in records(99))]
        train_sentencepiece(texts, VOCAB, path)
    return path


def prepare(folder: Path, count: int, length: int, **options: Any) -> tuple[CorpusManifest, str]:
    """`count` records prepared into folder/corpus; the manifest, and what was said."""
    source, said = write_alpaca(folder / "alpaca.json", records(count)), io.StringIO()
    manifest = prepare_sft(
        [source],
        folder / "corpus",
        str(tokenizer(folder)),
        length,
        console=Console(file=said, width=300),
        **options,
    )
    return manifest, said.getvalue()
