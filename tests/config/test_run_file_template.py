"""`megagrow init` writes run files of any size that load, and refuses what cannot be."""

import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megagrow.cli.app import app
from megagrow.config.load import load_run
from megagrow.config.stage_length import run_tokens
from megagrow.data.prepare import prepare
from megagrow.errors import InputError
from megagrow.model.layers.flops import parameters

TEXT = "A word follows the other, and each is a token of the corpus.\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        (folder / f"{number}.txt").write_text(TEXT * (number + 20))
    out = tmp_path_factory.mktemp("prepared") / "own"
    prepare([str(folder)], out, "train", 300, validation_fraction=0.2, workers=1)
    return out


def init(corpus: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["init", str(corpus), "--output", str(output), *options])


@pytest.mark.parametrize("size", ["600K", "3M", "10M", "40M", "124M", "410M", "1.1B", "3e9", "7B"])
def test_the_model_has_the_size_and_grows_by_four(corpus: Path, tmp_path: Path, size: str) -> None:
    done = init(corpus, tmp_path / "mine.yaml", "--size", size)
    assert done.exit_code == 0, done.exception
    run = load_run(tmp_path / "mine.yaml")
    base, grown = (stage.model for stage in run.stages)
    asked = float(size.translate({ord("K"): "e3", ord("M"): "e6", ord("B"): "e9"}))
    assert parameters(grown) == pytest.approx(asked, rel=0.25)
    assert grown == base.model_copy(update={"num_hidden_layers": 4 * base.num_hidden_layers})
    assert base.num_hidden_layers >= 2
    assert run.stages[0].data.sequence_length == grown.max_position_embeddings
    assert run.name == "mine" and "megagrow train" in done.output


def test_the_run_has_the_tokens(corpus: Path, tmp_path: Path) -> None:
    init(corpus, tmp_path / "run.yaml", "--size", "1M", "--tokens", "2M")
    run = load_run(tmp_path / "run.yaml")
    assert run_tokens(run) == pytest.approx(2e6, rel=0.01)
    assert run.stages[0].tokens == pytest.approx(0.2 * 2e6, rel=0.05)


@pytest.mark.parametrize("name", ["a b", "7", "null", "x: y", "a #b", "it's", "[b]", "&a", "x, }"])
def test_names_that_yaml_would_interpret(
    corpus: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, output = Path(name), Path(f"{name}.yaml")
    shutil.copytree(corpus, folder)
    done = init(folder, output, "--size", "1M")
    run = load_run(output)
    assert (run.name, run.output_dir) == (name, Path("runs", name))
    validation = run.data.validation["validation"]
    assert (run.stages[0].data.train[0].path, validation[0].path) == (
        folder / "train",
        folder / "validation",
    )
    assert shlex.split(done.output.splitlines()[-1]) == ["megagrow", "train", str(output)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "10K"), "--size 10K: no model of this size"),
        (("--size", "80B"), "--size 80B: no model of this size"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, corpus: Path, tmp_path: Path) -> None:
    error = init(corpus, tmp_path / "run.yaml", *options).exception
    assert isinstance(error, InputError) and str(error).startswith(message)
    assert not (tmp_path / "run.yaml").exists()


def test_only_a_corpus_is_accepted_and_no_file_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    for folder, output in ((corpus, "run.yaml"), (tmp_path, "new.yaml")):
        error = init(folder, tmp_path / output, "--size", "1M").exception
        assert isinstance(error, InputError)
        assert ("exists; remove it" if output == "run.yaml" else "no corpus") in str(error)
    assert (tmp_path / "run.yaml").read_text() == "mine"
