"""Universal Checkpoints go to DeepSpeed's own engines and come from them, bit for bit."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.offline.convert import export_universal, import_universal
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Block
from tests.helpers.checkpoint.written import RUN, write_checkpoint
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import State, random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks
from tests.helpers.train.deepspeed_alone import Whole, load, to_universal, train_and_save

MODEL = tiny(num_key_value_heads=2, tie_word_embeddings=True)
PLAN = parameter_plan(MODEL, 1)


def take_in(tmp_path: Path, source: Path, out: Path, **changes: Any) -> Source:
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump(MODEL.model_dump()))
    options = {"zero_stage": 3, "dp": 3, "tp": 2, "weight_decay_on": "matrices", "memory": "64MiB"}
    request = Request(form="checkpoint", source=source, out=out, to=str(model), **options | changes)
    import_universal(request, Console(file=io.StringIO()))
    return open_checkpoint(out)


def give_out(source: Path, out: Path) -> None:
    export_universal(source, out, Console(file=io.StringIO()))


def assert_same(source: Source, theirs: Whole | State) -> None:
    assert theirs.keys() == source.layout.plan.keys()
    for name, spec in source.layout.plan.items():
        for kind, values in theirs[name].items():
            block = Block(range(spec.rows), range(spec.cols))
            ours = source.read(name, kind, block)
            assert torch.equal(ours, values.view(spec.rows, spec.cols)), (name, kind)


def positive(state: State) -> State:
    """Second moments that Adam can take the root of."""
    for kinds in state.values():
        kinds["exp_avg_sq"] = kinds["exp_avg_sq"].abs()
    return state


@pytest.mark.dist
@pytest.mark.parametrize(("ours", "theirs", "world"), [(3, 1, 2), (1, 3, 2), (3, 2, 1)])
def test_deepspeed_loads_what_is_written_for_it(tmp_path, ours, theirs, world):
    layout = layout_of(MODEL, ours, 3, 1)
    state = positive(random_state(PLAN))
    source = write_checkpoint(tmp_path / "in", MODEL, layout, state)
    give_out(source, tmp_path / "out")
    for found, steps, count in run_ranks(world, load, tmp_path / "out", MODEL, theirs):
        assert_same(open_checkpoint(source), found)
        assert steps == {11.0} and count == RUN["counters"]["step"]


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (3, 2)])
def test_what_deepspeed_converts_becomes_a_checkpoint(tmp_path, stage, world):
    (theirs, steps), *_ = run_ranks(world, train_and_save, tmp_path / "in", MODEL, stage, 3)
    to_universal(tmp_path / "in" / "theirs", tmp_path / "universal" / "step")
    source = take_in(tmp_path, tmp_path / "universal", tmp_path / "out")
    assert_same(source, theirs)
    assert steps == {3.0} and source.adam_step == 3
    assert (source.layout.zero_stage, source.layout.dp, source.layout.tp) == (3, 3, 2)
    # And on into the stage that DeepSpeed's converter can not reach from there.
    give_out(tmp_path / "out", tmp_path / "again")
    other = {1: 3, 3: 1}[stage]
    for found, steps, _ in run_ranks(world, load, tmp_path / "again", MODEL, other):
        assert_same(source, found)
        assert steps == {3.0}
