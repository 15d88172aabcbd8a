"""`megagrow generate`: equal to transformers, the same under tensor parallelism, as it is typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.errors import DataError
from megagrow.evaluation.completion import Completer, CompletionOptions, visible
from megagrow.evaluation.generation import GenerationDefaults, Sampling
from megagrow.evaluation.tokenizer import EvalTokenizer, open_tokenizer
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.evaluation.small import sentences
from tests.helpers.hugging_face import hugging_face, state_of, tiny
from tests.helpers.jobs import Job
from tests.helpers.reshard.models import layout_of
from tests.helpers.run.refusals import refused

MODEL = tiny(vocab_size=301, num_key_value_heads=2, max_position_embeddings=64)
PROMPTS = ["ab de", "", "lno rst ik"]
TOKENS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoint of four ranks, and a tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    train_sentencepiece(sentences(60), 300, folder / "tokenizer.model")
    state = state_of(hugging_face(MODEL), parameter_plan(MODEL, 1))
    checkpoint = write_checkpoint(folder / "step-5", MODEL, layout_of(MODEL, 3, 2, 2), state)
    return checkpoint, folder / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(source: tuple[Path, Path]) -> EvalTokenizer:
    return open_tokenizer(str(source[1]), MODEL.vocab_size)


def words(source: tuple[Path, Path], *options: str) -> list[str]:
    checkpoint, tokenizer = source
    given = [word for text in PROMPTS for word in ("--prompt", text)]
    common = ["--tokenizer", str(tokenizer), "--max-tokens", str(TOKENS), *options]
    return ["generate", str(checkpoint), *given, *common]


def printed(folder: Path, arguments: list[str], tp: int) -> str:
    done = Job(folder, tp, [*arguments, "--tp", str(tp)]).finish()
    assert (done.codes, done.err) == ([0] * tp, [""] * tp)
    first, *others = done.out
    assert not any(others)
    return first


@pytest.mark.dist
def test_the_most_likely_tokens_are_those_of_transformers(
    source: tuple[Path, Path], tokenizer: EvalTokenizer, tmp_path: Path
) -> None:
    model: Any = hugging_face(MODEL).eval()
    expected = ""
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt) or [tokenizer.prefix_id]
        tokens = model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False,
            eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
        )[0, len(ids):].tolist()  # fmt: skip
        expected += f"{prompt}{visible(tokenizer.decode(tokens))}\n\n"
    for tp in (1, 2):
        assert printed(tmp_path / str(tp), words(source, "--temperature", "0"), tp) == expected


@pytest.mark.dist
def test_samples_do_not_depend_on_the_layout_but_on_the_seed(
    source: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two, other = (
        printed(tmp_path / f"{tp}-{seed}", words(source, "--seed", str(seed)), tp)
        for tp, seed in ((1, 1), (2, 1), (1, 2))
    )
    assert one == two != other


@pytest.mark.dist
def test_prompts_are_read_from_the_terminal_until_its_end(source: tuple[Path, Path]) -> None:
    checkpoint, tokenizer = source
    common = ["generate", str(checkpoint), "--tokenizer", str(tokenizer), "--max-tokens", "5"]
    asked = CliRunner().invoke(app, [*common, "--interactive"], input="ab\nde\n")
    given = CliRunner().invoke(app, [*common, "--prompt", "ab", "--prompt", "de"])
    assert asked.exit_code == given.exit_code == 0
    assert given.output == "".join(
        f"{prompt}{text}\n\n"
        for prompt, text in zip(("ab", "de"), asked.output.split("> ")[1:], strict=False)
    ).replace("\n\n\n\n", "\n\n")


@pytest.mark.dist
def test_a_prompt_that_fills_the_context_does_not_end_the_session(
    source: tuple[Path, Path],
) -> None:
    checkpoint, tokenizer = source
    arguments = ["generate", str(checkpoint), "--tokenizer", str(tokenizer), "--interactive"]
    both = CliRunner().invoke(app, arguments, input=f"{'kino ' * 200}\nab\n")
    one = CliRunner().invoke(app, arguments, input="ab\n")
    assert both.exit_code == 0
    refused, answer = both.output.split("> ")[1:3]
    assert refused.startswith("error: the prompt 'kino ") and "shorten the prompt" in refused
    assert answer == one.output.split("> ")[1]


class Script:
    """`TokenScorer` and `TokenDecoder` that generates given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = iter(tokens)

    def decode(self, prompts: list[list[int]]) -> "Script":
        return self

    def next_tokens(self, choices: Any) -> list[int]:
        return [next(self._tokens)]


class Letters(EvalTokenizer):
    """Tokenizer of bytes; 0 ends a text."""

    def __init__(self) -> None:
        self.eos_id = self.prefix_id = 0

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], special: bool = False) -> str:
        return bytes(token for token in ids if token).decode(errors="replace")


def scripted(text: str, *stops: str) -> Callable[[], Completer]:
    options = CompletionOptions(100, Sampling(), stops)
    tokens = [*text.encode(), 0]
    return lambda: Completer(Script(tokens), Letters(), GenerationDefaults(), 200, options)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", (), ["o", "n", "e", " ", "t", "w", "o"]),
        ("a \N{GREEK SMALL LETTER PI}.", (), ["a", " ", "\N{GREEK SMALL LETTER PI}", "."]),
        ("one enough two", ("end",), [*"one enough two"]),
        ("one end two", ("end",), [*"one "]),
        ("a\x1b[31mb\n", (), ["a", "\\x1b", "[", "3", "1", "m", "b", "\n"]),
    ],
)  # fmt: skip
def test_parts_appear_when_they_are_certain(
    text: str, stops: tuple[str, ...], expected: list[str]
) -> None:
    parts: list[str] = []
    scripted(text, *stops)().stream("x", parts.append)
    assert "".join(parts) == "".join(expected)
    assert [part for part in parts if part][: len(expected) - 3] == expected[:-3]
    assert scripted(text, *stops)().complete(["x"]) == ["".join(expected)]


def test_a_completion_ends_with_the_context(tokenizer: EvalTokenizer) -> None:
    options = CompletionOptions(100, Sampling())
    completer = Completer(Script([65] * 100), Letters(), GenerationDefaults(), 12, options)
    assert completer.complete(["x" * 10]) == ["AA"]
    with pytest.raises(DataError, match=r"the prompt 'x+' has 12 tokens; .* is 12; shorten"):
        completer.complete(["x" * 12])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("options", "world", "message"),
    {
        "no prompt": ("", 1, "give either prompts (--prompt TEXT, --prompts FILE) or --inter"),
        "both": ("--prompt x --interactive", 1, "give either prompts"),
        "two replicas": ("--prompt x", 2, "generation is tensor parallel: use --tp 2 on 2 ranks"),
        "no prompts file": ("--prompts none.txt", 1, "file 'none.txt' does not exist"),
        "too long": (f"--prompt {'x' * 400}", 2, "the context length of the model is 64; shorten"),
    }.values(),
)
def test_refusals(
    options: str, world: int, message: str, source: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint, tokenizer = source
    tp = 2 if "xxx" in options else 1
    common = ["--tokenizer", str(tokenizer), "--tp", str(tp)]
    line = refused(tmp_path, ["generate", str(checkpoint), *options.split(), *common], world)
    assert message in line
