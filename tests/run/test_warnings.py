"""Warnings of a run before it trains."""

from pathlib import Path

import pytest

from tests.helpers.jobs import Job
from tests.helpers.runs import MODEL, write_corpus

pytestmark = pytest.mark.dist

RUN = """
name: far
output_dir: {folder}/run
data: {{train: [{{path: {folder}/train}}], sequence_length: 16}}
batch: {{global_batch_size: 4, micro_batch_size: 1}}
optimizer: {{lr: 1e-2}}
model: {model}
logging: {{tensorboard: false}}
stages:
  - tokens: auto
  - tokens: 1e17
    model: {deep}
    growth: {{}}
"""


def test_rank_0_warns_once_that_equation_2_is_used_beyond_its_fit(tmp_path: Path) -> None:
    write_corpus(tmp_path / "train")
    path = tmp_path / "run.yaml"
    deep = MODEL | {"num_hidden_layers": 4}
    path.write_text(RUN.format(folder=tmp_path, model=MODEL, deep=deep), encoding="utf-8")
    job = Job(tmp_path / "output", 2, ["train", str(path)])
    metrics = tmp_path / "run" / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text())
    job.kill()
    said, other = ((tmp_path / "output" / f"{rank}.out").read_text() for rank in range(2))
    assert said.count("warning: stages.0.tokens = auto: equation 2 gives ") == 1
    assert "outside the range of its fit: N = 3.1" in said
    assert "warning" not in other
