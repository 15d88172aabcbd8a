"""A run begins with the weights of a model that exists, in every layout, and only where it may."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megagrow.checkpoint.discovery import checkpoint_name, shard_name
from megagrow.checkpoint.manifest import read_manifest
from megagrow.common import checksums
from megagrow.common.checksums import FileRecord, problem_of
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.formats.hugging_face_origin import HuggingFaceOrigin
from megagrow.offline.convert import import_hugging_face
from megagrow.parallel.sharding import ADAMW_KINDS, parameter_plan
from megagrow.train.init_from import fill_beginning, open_beginning
from tests.helpers.checkpoint.damage import flip
from tests.helpers.checkpoint.written import differences, shards, write_checkpoint
from tests.helpers.hugging_face import hugging_face, state_of
from tests.helpers.jobs import Job, records, train, write_run
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.definition import State, empty_storage, random_state, same, storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks
from tests.helpers.train.file_growths import convert, grow, model_file

pytestmark = pytest.mark.dist

LAYOUTS = [(0, 2, 2, "all"), (1, 4, 1, "matrices"), (2, 2, 2, "all"), (3, 2, 2, "matrices")]


def run_from(folder: Path, init_from: Path | None, name: str = "run", **changes: Any) -> RunConfig:
    stage = {"tokens": 2 * STEP_TOKENS, **changes}
    return make_run(folder, [stage], init_from=init_from, output_dir=folder / name)


def begins(folder: Path, state: State, kinds: tuple[str, ...]) -> None:
    """Every layout's storage holds the state's part, and zeros where a kind is not read."""
    rank = dist.get_rank()
    kept = {
        name: {kind: held[kind] if kind in kinds else held[kind] * 0 for kind in ADAMW_KINDS}
        for name, held in state.items()
    }
    run = run_from(folder.parent, folder)
    read: list[str] = []

    def noted(path: Path, record: FileRecord) -> str | None:
        read.append(path.name)
        return problem_of(path, record)

    with pytest.MonkeyPatch.context() as patch, captured_logs() as messages:
        patch.setattr(checksums, "problem_of", noted)
        source = open_beginning(run)
    saved = source is not None and len(source.files) == 3
    assert read == ([shard_name(rank)] if saved and rank < 3 else []), (
        "each rank verifies its share"
    )
    assert source is not None and messages == [f"weights initialized from {source.path}"]
    for spread in LAYOUTS:
        layout = layout_of(run.stages[0].model, *spread)
        storage = empty_storage(layout, rank, 0.0)
        step = fill_beginning(source, layout, rank, storage, seed=1)
        assert same(storage, storage_of(layout, kept, rank)), spread
        assert step == (11 if "exp_avg" in kinds else 0)


def refusals(folder: Path) -> list[str]:
    """Messages about impossible values of init_from."""
    said = []
    for path, changes in (
        (folder / "none", {}),
        (folder / "hf", {"model": MODEL | {"num_hidden_layers": 3}}),
        (folder / "masked", {"model": MODEL | {"num_hidden_layers": 4}}),
        (folder / "damaged", {}),
    ):
        with pytest.raises(InputError) as error:
            open_beginning(run_from(folder, path, **changes))
        said.append(str(error.value))
    assert open_beginning(run_from(folder, None)) is None
    return said


@pytest.fixture
def folder(tmp_path) -> Path:
    make_run(tmp_path, [{"tokens": STEP_TOKENS}])
    theirs = hugging_face(run_from(tmp_path, None).stages[0].model)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf" / "README.md").write_text("# Card")
    return tmp_path


def test_every_rank_gets_its_part(folder):
    model = run_from(folder, None).stages[0].model
    state = state_of(hugging_face(model), parameter_plan(model, 1))
    write_checkpoint(folder / "saved", model, layout_of(model, 1, 3, 1), state)
    run_ranks(4, begins, folder / "hf", state, ("fp32",))
    run_ranks(4, begins, folder / "saved", state, ADAMW_KINDS)


def test_what_can_not_be_a_beginning_is_named(folder):
    deeper = MODEL | {"num_hidden_layers": 4, "rms_norm_eps": 1e-5}
    grow(
        source=folder / "hf",
        out=folder / "masked",
        to=model_file(folder / "m.yaml", deeper),
        form="checkpoint",
        operators=("random_depth",),
        overrides=("growth.ramp_tokens=100",),
    )
    model = run_from(folder, None).stages[0].model
    layout = layout_of(model, 1, 2, 1)
    flip(write_checkpoint(folder / "damaged", model, layout, random_state(layout.plan)))
    for said in run_ranks(2, refusals, folder):
        assert said[0] == f"{folder / 'none'}: no such directory"
        assert "num_hidden_layers is 2, but 3 in stages.0.model; make them equal" in said[1]
        assert "growth masks are still ramping" in said[2]
        assert "damaged/rank-00001.safetensors: damaged, its checksum is" in said[3]


def losses(run: RunConfig) -> list[tuple[Any, ...]]:
    return records(run, "train", ("step", "tokens", "loss", "lr"))


def test_a_run_begins_where_it_is_told(folder):
    runs = {"named": run_from(folder, folder / "hf", "named")}
    runs["placed"] = run_from(folder, None, "placed")
    first = runs["placed"].output_dir / "checkpoints" / checkpoint_name(0)
    convert(import_hugging_face, folder / "hf", first, zero_stage=3, dp=3, tp=1)
    for name, run in runs.items():
        ended = train(write_run(folder / f"{name}.yaml", run), 2).finish()
        assert ended.codes == [0, 0], ended.err
    assert losses(runs["named"]) == losses(runs["placed"])
    assert [record[:2] for record in losses(runs["named"])] == [(1, 64), (2, 128)]
    ends = [run.output_dir / "checkpoints" / checkpoint_name(2) for run in runs.values()]
    assert differences(*map(shards, ends)) == []
    assert read_manifest(ends[0]).adam_step == 2
    gone = run_from(folder, folder / "gone", "named")
    arguments = ["train", str(write_run(folder / "gone.yaml", gone)), "--allow-change", "init_from"]
    # With a checkpoint of its own a run does not read init_from again.
    assert Job(folder / "gone", 2, arguments).finish().codes == [0, 0]
    (change,) = records(gone, "config_change", ("step", "changes"))
    assert (change[0], [each["key"] for each in change[1]]) == (2, ["init_from"])
    other = run_from(folder, ends[0], "other")
    ended = train(write_run(folder / "other.yaml", other), 2).finish()
    assert ended.codes == [0, 0]
    assert f"weights initialized from {ends[0]}" in ended.out[0]
    assert "config | " not in ended.out[0], "only names differ from the run of the source"
    assert losses(other)[0][2] < losses(runs["named"])[0][2]
    for at in (*ends, other.output_dir / "checkpoints" / checkpoint_name(2)):
        origin = HuggingFaceOrigin.recorded(read_manifest(at).environment)
        assert (origin.folder, origin.texts) == (str(folder / "hf"), {"README.md": "# Card"})
