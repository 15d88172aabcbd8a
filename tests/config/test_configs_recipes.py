"""docs/guides/recipes.md names existing files and has the planner's figures."""

import re
from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.config.stage_length import stage_steps
from megagrow.planning.memory_fit import on_gpu
from megagrow.planning.request import PlanRequest, plan_request

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TEXT = (ROOT / "docs/guides/recipes.md").read_text(encoding="utf-8")
LARGE = re.findall(
    r"^\| `(gstack-70b|context-8b)` \| (\d+) layers, (\d+)k tokens"
    r" \| (\d+) \| (.*?) \| (.*?) \| (.*?) \| (.*?)% \|$",
    TEXT,
    re.M,
)
"""Rows of the table of large runs, one per stage."""
ROWS = re.findall(
    r"^\| `([\w.-]+)` \| ([^|]*) \| `?([\w.-]+)`? \| ([^|]*) \| ([^|]*) \|$", TEXT, re.M
)


def test_files_and_profiles_that_it_names_are_there() -> None:
    files = set(re.findall(r"configs/[\w./-]+\.yaml", TEXT))
    assert len(files) > 6
    assert [name for name in files if not (ROOT / name).is_file()] == []
    there = {path.stem for path in (CONFIGS / "hardware").glob("*.yaml")}
    profiles = set(re.findall(r"\b(?:\d+x)+h[12]00-[\d.]+[bm]\b", TEXT))
    assert {name for name in there if "h100" in name} == profiles
    assert {name.replace("h100", "h200") for name in profiles} | profiles == there


def test_every_paper_run_is_in_the_table() -> None:
    others = {"midtraining-1.1b", "sft-3b"}
    assert {row[0] for row in ROWS} == {path.stem for path in CONFIGS.glob("*.yaml")} - others


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_days_and_gpu_hours_are_those_of_the_planner(row: tuple[str, ...]) -> None:
    name, tokens, profile, days, hours = row
    overrides = [] if profile == "-" else [f"hardware={profile}"]
    run = load_run(CONFIGS / f"{name}.yaml", overrides)
    costs = plan_request(run, PlanRequest(world=64, gpu="h100", mfu=0.4)).costs
    assert costs is not None
    assert tokens == " + ".join(f"{stage.tokens / 1e9:.4g}B" for stage in run.stages)
    assert (days, hours) == (f"{costs.total.seconds / 86400:.1f}", f"{costs.total.gpu_hours:,.0f}")


def test_layout_memory_and_mfu_of_the_large_runs_are_those_of_the_planner() -> None:
    found, worlds = [], {name: int(world) for name, _, _, world, *_ in LARGE}
    for name, world in worlds.items():
        run = load_run(CONFIGS / "large" / f"{name}.yaml")
        result = plan_request(run, PlanRequest(cluster=f"h100:{world // 8}x8"))
        assert result.capacity is not None and result.prediction is not None
        for stage, predicted in zip(result.plan.stages, result.prediction.stages, strict=True):
            parallel, size = stage.config.parallel, on_gpu(stage.memory)
            assert size <= 0.85 * result.capacity
            length = stage.config.data.sequence_length
            assert length * stage.config.batch.global_batch_size == 2**22
            found.append(
                (
                    name,
                    f"{stage.config.model.num_hidden_layers}",
                    f"{length // 1024}",
                    f"{world}",
                    parallel.layout_text(world),
                    parallel.activation_checkpointing,
                    f"{size / 2**30:.1f}",
                    f"{predicted.step.mfu:.1%}"[:-1],
                )
            )
            if stage.growth is not None:
                assert stage.growth.volume is not None
                assert stage.growth.volume.between_pipeline_ranks == 0
    assert found == LARGE


def test_steps_that_it_names_are_those_of_the_run() -> None:
    run = load_run(CONFIGS / "gstack-1.1b.yaml")
    base, target = (stage_steps(stage) for stage in run.stages)
    assert f"step-{base:09}" in TEXT
    assert f"the run makes {target:,}" in " ".join(TEXT.split())


def test_its_run_file_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(example, encoding="utf-8")
    run, base = load_run(path), load_run(CONFIGS / "gstack-1.1b.yaml")
    assert {stage.optimizer.weight_decay_on for stage in run.stages} == {"matrices"}
    assert [stage.optimizer.lr for stage in run.stages] == [1e-3, 3e-4]
    assert [stage.tokens for stage in run.stages] == [stage.tokens for stage in base.stages]
