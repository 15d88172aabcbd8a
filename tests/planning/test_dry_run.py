"""One rank of a cluster built without it: against the ranks of a real run, and the command."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import megagrow.train.growth_event.event
from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import MANIFEST_FILE
from megagrow.cli.app import app
from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.parallel.sharding import parameter_plan
from megagrow.planning.dry_run import dry_run as run_dry
from megagrow.planning.planner import plan_run
from megagrow.reshard.exchange import TransferStats
from megagrow.reshard.fill import fill_initial
from megagrow.reshard.traffic import TotalVolume
from megagrow.train.stage import Stage, build_stage
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.hugging_face import hugging_face, state_of
from tests.helpers.jobs import write_run
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import MODEL, STEP_TOKENS, grow_live, make_run, parallel_of
from tests.helpers.spawn import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEEP = {"num_hidden_layers": 4}
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
HEAD = {"head_dim": 8}
ROTATED = {"hidden_size": 40, "rms_norm_eps": 8e-6}
PIPELINE = parallel_of(1, 2) | {"pipeline_model_parallel_size": 2}
INTERLEAVED = parallel_of(2, 1) | {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
}
GROWTHS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[Any, Any]]] = {
    "stack": ({}, DEEP, {"operator": "direct_depth"}, (PIPELINE, INTERLEAVED)),
    "wide": ({}, WIDE, {"operator": "net2net_width"}, (parallel_of(3, 2), parallel_of(1, 2))),
    "rotated": (
        HEAD | {"rms_norm_eps": 1e-5},
        HEAD | ROTATED,
        {"operator": "isometric"},
        (parallel_of(0, 2), parallel_of(2, 1)),
    ),
}
"""Changes to the base, to the target, the growth, and the parallel section of both."""


def grown_run(tmp: Path, name: str) -> RunConfig:
    before, after, growth, parallel = GROWTHS[name]
    stages = [
        {"model": MODEL | before, "tokens": STEP_TOKENS, "parallel": parallel[0]},
        {
            "model": MODEL | before | after,
            "tokens": STEP_TOKENS,
            "parallel": parallel[1],
            "growth": {"lr_schedule": "rewarm", "optimizer_state": "transport"} | growth,
        },
    ]
    return make_run(tmp, stages, precision="fp32")


def seen(stage: Stage) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Return, of a real engine, shapes, elements of the state, elements of the forward weights."""
    named = dict(stage.engine._engine.module.named_parameters())
    shapes = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in named.items()}
    state = sum(tensors["exp_avg"].numel() for tensors in stage.engine.storage().values())
    return shapes, state, sum(each.numel() for each in named.values())


def one_layer(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {re.sub(r"layers\.\d+", "layers.*", name): shape for name, shape in shapes.items()}


def grow_and_tell(run: RunConfig) -> tuple[Any, Any, TransferStats, int, int]:
    moved: list[TransferStats] = []
    original = megagrow.train.growth_event.event._moved

    def recorded(*sides: Any) -> TransferStats:
        moved.append(original(*sides))
        return moved[-1]

    megagrow.train.growth_event.event._moved = recorded
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    first = seen(stage)
    target, report = grow_live(run, stage)
    (own,) = moved
    return first, seen(target), own, report.bytes_between_ranks, report.bytes_within_ranks


@pytest.mark.dist
@pytest.mark.parametrize("name", GROWTHS)
def test_what_is_built_and_moved_is_what_real_ranks_build_and_move(
    tmp_path: Path, name: str
) -> None:
    run = grown_run(tmp_path, name)
    real = run_ranks(4, grow_and_tell, run)
    told = [run_dry(run, 4, rank) for rank in range(4)]
    for result, (*stages, moved, _, _) in zip(told, real, strict=True):
        assert result.problems == ()
        for stage, (shapes, state, weights) in zip(result.stages, stages, strict=True):
            assert {each.name: each.shape for each in stage.parameters} == one_layer(shapes)
            assert sum(each.count for each in stage.parameters) == len(shapes)
            assert (stage.held, stage.state_bytes) == (state, 12 * state)
            if stage.memory.layout.zero_stage < 3:
                assert stage.weights_bytes == 4 * weights
        (growth,) = result.growths
        assert growth.volume is not None
        volume = growth.volume
        assert (volume.bytes_sent, volume.kept, volume.between_pipeline_ranks) == (
            moved.bytes_sent,
            moved.bytes_local,
            moved.bytes_between_pipeline_ranks,
        )
    volumes = [result.growths[0].volume for result in told]
    assert sum(volume.bytes_sent for volume in volumes) == real[0][3] > 0
    assert sum(volume.kept for volume in volumes) == real[0][4]
    planned = plan_run(run, 4).stages[1].growth
    assert planned is not None and planned.volume == TotalVolume(real[0][3], 0, is_exact=True)
    for rank, volume in enumerate(volumes):
        for peer, size in volume.sent.items():
            assert volumes[peer].received[rank] == size
        assert volume.between_pipeline_ranks == 0  # twice the chunks for a stack of two
    assert bool(volumes[0].reduced) == (name == "rotated")


def dry_run(path: Path, *words: object) -> tuple[int, str]:
    """The exit code, and what the command says, error included."""
    result = CliRunner().invoke(app, ["train", "--dry-run", str(path), *map(str, words)])
    error = result.exception
    if isinstance(error, InputError):
        return 2, f"{result.output}\nerror: {error}"
    assert error is None or isinstance(error, SystemExit), result.output
    return result.exit_code, result.output


LARGE = """
name: large
output_dir: {folder}/run
data: {{train: [{{path: {folder}/train}}], sequence_length: 2048}}
precision: bf16
batch: {{global_batch_size: 1024, micro_batch_size: 1}}
parallel: {{zero_stage: 3, tensor_model_parallel_size: 8}}
optimizer: {{lr: 3.0e-4}}
schedule: {{type: cosine, warmup_steps: 3000}}
stages:
  - {{model: llama-7b-8l, tokens: 10B}}
  - model: llama-7b
    tokens: 97B
    growth: {{operator: direct_depth, optimizer_state: reset, lr_schedule: rewarm}}
"""


def test_a_rank_of_512_on_a_7b_model_takes_seconds(tmp_path: Path) -> None:
    make_run(tmp_path, [{"tokens": STEP_TOKENS}])  # writes the corpora
    begin = time.monotonic()
    text = LARGE.format(folder=tmp_path).replace("llama-7b", f"{CONFIGS}/model/llama-7b")
    path = tmp_path / "large.yaml"
    path.write_text(text)
    code, said = dry_run(path, "--world", 512, "--rank", 511)
    assert time.monotonic() - begin < 10
    assert code == 0, said
    assert "rank 511 of 512" in said and "DP rank 63 of 64, TP rank 7 of 8" in said
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    # 11008 / 8 rows of each of 32 layers, a 64th of their elements.
    held = 32 * (11008 // 8) * 4096 // 64
    assert ["model.layers.*.mlp.gate_proj.weight", "1376 x 4096", "32", f"{held:,}"] in cells
    # The moments are reset: a rank's own part of the weights is all that it needs.
    (growth,) = [row for row in cells if row[:2] == ["0 -> 1", "direct_depth"]]
    result = run_dry(load_run(path), 512, 511)
    volume = result.growths[0].volume
    assert volume is not None and growth[-1] == f"{volume.kept / 1e6:,.3f}"
    assert volume.kept == 4 * sum(each.held for each in result.stages[1].parameters)


def test_problems_are_told_together(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}], init_from=tmp_path / "nowhere")
    (tmp_path / "validation.idx").unlink()
    (tmp_path / "run").write_text("a file where the run's folder should be")
    corpora = [{"path": tmp_path / "train"}, {"path": tmp_path / "a"}, {"path": tmp_path / "b"}]
    values = run.model_dump()
    values["stages"][0]["data"]["train"] = corpora
    path = write_run(tmp_path / "run.yaml", RunConfig.model_validate(values))
    code, said = dry_run(path, "--world", 3)
    problems = [line for line in said.splitlines() if line.startswith("Problem: ")]
    assert code == 2 and "error: the run would not start: 6 problems" in said
    for part, problem in zip(
        ("x data parallel = 1 x 3", "a.idx", "b.idx", "validation.idx", "nowhere", "output_dir"),
        problems,
        strict=True,
    ):
        assert part in problem
    assert "elements held" not in said, "the run does not fit three ranks"
    code, said = dry_run(path, "--world", 2)
    assert code == 2 and "5 problems" in said and "elements held" in said


def test_missing_tasks_and_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    tasks = {"data_dir": tmp_path / "tasks"}
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}], evaluation=tasks)
    told = run_dry(run, 4, 3)
    assert told.problems == (f"evaluation.data_dir = {tmp_path}/tasks: no such directory",)
    assert any("loaded and checked when the run starts" in note for note in told.notes)
    good, damaged = (run.output_dir / "checkpoints" / checkpoint_name(step) for step in (3, 7))
    damaged.mkdir(parents=True)
    (damaged / MANIFEST_FILE).write_text("{}")
    assert "no valid checkpoint under" in run_dry(run, 4, 3).problems[-1]
    model = run.stages[0].model
    state = state_of(hugging_face(model), parameter_plan(model, 1))
    write_checkpoint(good, model, layout_of(model, 1, 1, 1), state)
    told = run_dry(run, 4, 3)
    assert f"the run would resume from its checkpoint {good}" in told.notes
    assert len(told.problems) == 1


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.yaml", make_run(tmp_path, [{"tokens": STEP_TOKENS}]))
    assert dry_run(path, "--world", 2, "--rank", 2) == (
        2,
        "\nerror: --rank 2: a world size of 2 has ranks 0 to 1",
    )
    result = CliRunner().invoke(app, ["train", str(path), "--world", "2"])
    assert isinstance(result.exception, InputError) and "need --dry-run" in str(result.exception)
    assert not (tmp_path / "run").exists()
