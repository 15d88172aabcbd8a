"""A run by Triton's kernels, in the interpreter, has the losses of a run by the references."""

from pathlib import Path

import numpy as np
import pytest

from megagrow.config.schema import RunConfig
from megagrow.data.indexed import IndexedWriter
from tests.helpers.jobs import records, train, write_run
from tests.helpers.runs import MODEL, make_run, parallel_of

STEPS, LENGTH = 25, 4
SMALL = MODEL | {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
"""The interpreter takes some milliseconds for each tile of each head."""

REFERENCE = {"attention": "reference", "norm": "torch", "pointwise": "torch", "loss": "torch"}
TRITON = dict.fromkeys(REFERENCE, "triton")


def write_short_documents(prefix: Path) -> None:
    """A corpus of documents of 3 to 10 tokens, each token mostly a function of the one before."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(400):
            tokens = [int(generator.integers(101))]
            for _ in range(int(generator.integers(2, 10))):
                tokens.append((tokens[-1] * 7 + 3) % 101)
            writer.add_document(np.array(tokens, dtype=np.uint16))
        writer.finalize()


def run_by(folder: Path, kernels: dict, parallel: dict, name: str, micro: int = 1) -> RunConfig:
    stage = {
        "model": SMALL,
        "tokens": STEPS * 2 * LENGTH,
        "batch": {"global_batch_size": 2, "micro_batch_size": micro},
        "kernels": kernels,
        "parallel": parallel,
    }
    data = {
        "train": [{"path": folder / "short"}],
        "sequence_length": LENGTH,
        "reset_attention_mask": True,
        "reset_position_ids": True,
    }
    return make_run(folder, [stage], data=data, output_dir=folder / name)


def losses(run: RunConfig, world: int) -> list[float]:
    done = train(write_run(run.output_dir.with_suffix(".yaml"), run), world).finish(280)
    assert done.codes == [0] * world, done
    return [loss for (loss,) in records(run, "train", ["loss"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kernels")
    write_short_documents(made / "short")
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[float]:
    return losses(run_by(folder, REFERENCE, parallel_of(0, 1), "reference"), 1)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "tp", "sequence_parallel", "recompute"),
    [(3, 1, False, "selective"), (1, 2, True, "full")],
    ids=["zero3", "tp2"],
)
def test_losses_are_those_of_the_references(
    folder: Path,
    reference: list[float],
    zero: int,
    tp: int,
    sequence_parallel: bool,
    recompute: str,
) -> None:
    parallel = parallel_of(zero, tp, sequence_parallel, recompute)
    found = losses(run_by(folder, TRITON, parallel, f"zero{zero}", tp), 2)
    assert len(found) == STEPS and reference[-1] < reference[0] - 0.1
    assert found == pytest.approx(reference, rel=0, abs=1e-4)
    assert found != reference, "the same bits: was anything else computed?"
