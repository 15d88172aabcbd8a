"""A bad corpus or tokenizer: one line that names the file, whichever rank finds it and when."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megagrow.config.schema import RunConfig
from megagrow.data.batches import Batch, BatchReader, open_stream
from tests.helpers.jobs import Finished, Job, records, write_run
from tests.helpers.run.refusals import SECONDS, WORLD, assert_refused, refused_run, tiny_run
from tests.helpers.runs import STEP_TOKENS
from tests.helpers.spawn import free_port

pytestmark = pytest.mark.dist

VOCAB = 400
"""Tokens of the tokenizer; the models here have 101."""


@pytest.fixture
def path(tmp_path) -> Path:
    """The file of a tiny run that would come to its end."""
    return write_run(tmp_path / "run.yaml", tiny_run(tmp_path))


def cut(suffix: str, size: Callable[[int], int]) -> Callable[[Path], None]:
    """Cuts a file of the corpus to a size that is a function of its own."""

    def damage(prefix: Path) -> None:
        file = prefix.with_suffix(suffix)
        os.truncate(file, size(file.stat().st_size))

    return damage


def scribble(offset: int) -> Callable[[Path], None]:
    """Overwrites eight bytes of the index."""

    def damage(prefix: Path) -> None:
        with prefix.with_suffix(".idx").open("r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * 8)

    return damage


CORPORA: dict[str, tuple[Callable[[Path], object], str]] = {
    "bin empty": (cut(".bin", lambda size: 0), ".bin: the file is empty"),
    "bin half": (cut(".bin", lambda size: size // 2), ".bin: truncated: "),
    "bin one byte less": (cut(".bin", lambda size: size - 1), ".bin: truncated: "),
    "bin missing": (lambda prefix: prefix.with_suffix(".bin").unlink(), ".bin: No such file"),
    "idx empty": (cut(".idx", lambda size: 0), ".idx: the file is empty"),
    "idx half a header": (cut(".idx", lambda size: 17), ".idx: broken index: 17 bytes, smaller"),
    "idx header only": (cut(".idx", lambda size: 34), ".idx: broken index: it has 34 bytes"),
    "idx half": (cut(".idx", lambda size: size // 2), ".idx: broken index: it has "),
    "idx one byte less": (cut(".idx", lambda size: size - 1), ".idx: broken index: it has "),
    "idx missing": (lambda prefix: prefix.with_suffix(".idx").unlink(), ".idx: No such file"),
    "idx magic": (scribble(0), ".idx: broken index: it is not a Megatron-LM index"),
    "idx counts": (scribble(18), ".idx: broken index: it has "),
    "idx lengths": (scribble(34), ".idx: broken index: a sequence does not end where"),
}
"""Damage to a corpus, with the expected message."""


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("corpus", ["train", "validation"])
def test_a_damaged_corpus(tmp_path, path, name, corpus):
    damage, said = CORPORA[name]
    damage(tmp_path / corpus)
    assert f"{tmp_path / corpus}{said}" in refused_run(path)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A corpus and its tokenizer, made by the command."""
    tmp = tmp_path_factory.mktemp("prepared")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / f"{name}.py").read_text() for name in ("abc", "bisect", "heapq")]
    lines = [json.dumps({"text": part}) for text in texts for part in text.split("\n\n")]
    (tmp / "source.jsonl").write_text("\n".join(lines))
    source, size = str(tmp / "source.jsonl"), str(VOCAB)
    words = ["prepare", source, "--output", str(tmp / "corpus"), "--tokenizer", "train"]
    done = Job(tmp / "output", 1, [*words, "--vocab-size", size, "--workers", "1"]).finish(SECONDS)
    assert done.codes == [0] and done.err == [""], done
    return tmp / "corpus"


def test_a_tokenizer_larger_than_the_model(path, prepared):
    (tokenizer,) = prepared.glob("*.model")
    said = refused_run(path, f"data.tokenizer={tokenizer}")
    assert said.startswith(f"{tokenizer}: the tokenizer has {VOCAB} tokens, more than ")


def test_a_corpus_that_says_it_is_of_a_larger_vocabulary(path, prepared):
    said = refused_run(path, f"data.train.0.path={prepared / 'train'}")
    assert str(prepared / "train") in said and "101" in said


def spoil(run: RunConfig, corpus: Path, position: int, shuffle: bool) -> None:
    """Writes a token id that no model here knows at a position of the stream."""
    of = (
        run.stages[0].data.train
        if corpus.name == "train"
        else next(iter(run.data.validation.values()))
    )
    place = open_stream(of, run.seed, run.stages[0].data.sequence_length, shuffle).locate(position)
    tokens = np.memmap(corpus.with_suffix(".bin"), dtype="<u2", mode="r+")
    tokens[place.offset] = 999
    tokens.flush()


LATE = 4 * STEP_TOKENS + 3 * 16 + 7
"""In the middle of the last sequence of the fifth step, which rank 1 reads."""


def said_of_999(corpus: Path) -> str:
    """Start of the message about such a token."""
    return f"rank 1: {corpus}.bin: token id 999 at token "


def test_a_wrong_token_that_one_rank_reads_late(tmp_path):
    run = tiny_run(tmp_path)
    spoil(run, tmp_path / "train", LATE, shuffle=True)
    said = refused_run(write_run(tmp_path / "run.yaml", run))
    assert said.startswith(said_of_999(tmp_path / "train"))
    assert records(run, "train", ["step"]) == [(1,), (2,), (3,), (4,)]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_corpus_truncated_while_it_is_read(tmp_path, suffix):
    """A memory map would end the ranks with SIGBUS, without a message."""
    run, file = tiny_run(tmp_path), (tmp_path / "train").with_suffix(suffix)

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        read = BatchReader.read

        def reading(self: BatchReader, position: int, indices: Sequence[int]) -> Batch:
            if position == 3 * STEP_TOKENS and rank == 1:
                os.truncate(file, 0)
            return read(self, position, indices)

        patch.setattr(BatchReader, "read", reading)

    said = refused_run(write_run(tmp_path / "run.yaml", run), hook=hook)
    assert f"{file}: truncated while in use, it had " in said
    assert records(run, "train", ["step"]) == [(1,), (2,), (3,)]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_wrong_token_that_one_rank_validates_on(tmp_path, zero_stage):
    run = tiny_run(tmp_path)
    spoil(run, tmp_path / "validation", 3 * 16 + 7, shuffle=False)
    path = write_run(tmp_path / "run.yaml", run)
    said = refused_run(path, f"stages.0.parallel.zero_stage={zero_stage}")
    assert said.startswith(said_of_999(tmp_path / "validation"))
    assert records(run, "train", ["step"]) == [(1,), (2,)]


def test_processes_of_their_own_end_as_well(tmp_path):
    """The ranks of the other tests are forks, which skip what an interpreter does at its end."""
    run = tiny_run(tmp_path)
    spoil(run, tmp_path / "train", LATE, shuffle=True)
    command = [sys.executable, "-m", "megagrow", "train", write_run(tmp_path / "run.yaml", run)]
    world = {"WORLD_SIZE": f"{WORLD}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    done = Finished([process.returncode for process in ranks], *map(list, zip(*said, strict=True)))
    assert assert_refused(done).startswith(said_of_999(tmp_path / "train"))
