"""`samples.prompts` is a list of texts or the path of a file."""

from pathlib import Path

import pytest

from megagrow.config.load import load_run, to_yaml
from megagrow.errors import ConfigError

TOKENIZER = "data.tokenizer=tok.model"
EITHER = "should be a list of texts, or the path of a file with one per line"


@pytest.mark.parametrize(
    ("written", "prompts"),
    [("prompts.txt", Path("prompts.txt")), ("[prompts.txt, '']", ["prompts.txt", ""])],
)
def test_a_path_and_texts(load, tmp_path: Path, written: str, prompts: object) -> None:
    run = load(TOKENIZER, f"samples.prompts={written}")
    assert run.samples.prompts == prompts
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(run))
    assert load_run(again) == run


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[]", f"[]: {EITHER}"),
        ("''", f"'': {EITHER}"),
        ("[a, 1]", f"['a', 1]: {EITHER}"),
        ("{a: b}", f"{{'a': 'b'}}: {EITHER}"),
        ("x" * 300, "is longer than the file system allows"),
    ],
)
def test_other_values_are_one_error(load, written: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(TOKENIZER, f"samples.prompts={written}")
    assert message in str(error.value) and str(error.value).count("samples.prompts") == 1
