"""`megagrow plan --cluster` and `--layouts`: predicted runs, growths, and layouts that fit."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import megagrow.cli.app
from megagrow.config.load import load_run
from megagrow.config.model_file import load_model
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.planning.cluster import find_cluster
from megagrow.planning.layouts import USABLE, fitting_layouts
from megagrow.planning.memory import stage_memory
from megagrow.planning.memory_fit import on_gpu
from megagrow.planning.prediction import growth_seconds, predict_run, stage_work
from megagrow.planning.request import PlanRequest, PlanResult, plan_request
from megagrow.planning.step.rates import GROWTH_SECONDS, NIC_SHARE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUN = CONFIGS / "gstack-1.1b.yaml"


def paper_run(*overrides: str) -> RunConfig:
    return load_run(RUN, overrides)


def asked(*overrides: str, **request: object) -> PlanResult:
    return plan_request(paper_run(*overrides), PlanRequest(**request))  # type: ignore[arg-type]


def test_the_cluster_says_how_many_ranks_and_how_fast() -> None:
    found = asked(cluster="h100:8x8")
    assert found.plan.world_size == 64 and found.prediction is not None
    base, target = found.prediction.stages
    assert (base.steps, target.steps) == (4_769, 46_492)
    assert target.step.work.accumulation == 2 and target.step.work.dp == 64
    assert target.tokens_per_second == pytest.approx(2**21 / target.step.seconds)
    assert base.growth_seconds is None and target.growth_seconds is not None
    expected = 46_492 * target.step.seconds + target.growth_seconds
    assert target.seconds == pytest.approx(expected)
    assert found.costs is not None
    assert found.costs.total.seconds == pytest.approx(found.prediction.seconds)
    # 3.3 times the layers; the head stays: a step is 3 to 4 times as long.
    assert 3 < target.step.seconds / base.step.seconds < 4


def test_more_gpus_train_faster_and_less_well_used() -> None:
    """One batch of 1,024 sequences on 8 to 1,024 GPUs."""
    small = ("batch.micro_batch_size=1",)
    found = [asked(*small, cluster=f"h100:8x{nodes}").prediction for nodes in (1, 8, 64, 128)]
    steps = [prediction.stages[1].step for prediction in found if prediction]
    assert len(steps) == 4
    for fewer, more in pairwise(steps):
        assert more.seconds < fewer.seconds and more.mfu < fewer.mfu


def test_a_growth_by_hand() -> None:
    """An eighth of a 64th of ... : each GPU gets 12 bytes of its share over its network card."""
    run, cluster = paper_run("parallel.zero_stage=3"), find_cluster("h100:8x8")
    work = stage_work(run.stages[1], cluster)
    moved = 12 * work.shape.parameters / 64 / (50e9 * NIC_SHARE)
    assert growth_seconds(work, cluster) == pytest.approx(GROWTH_SECONDS + moved)
    one = find_cluster("h100:1x1")
    alone = stage_work(paper_run().stages[1], one)
    assert GROWTH_SECONDS < growth_seconds(alone, one) < GROWTH_SECONDS + 0.1


def test_layouts_fit_and_come_fastest_first() -> None:
    run, cluster = paper_run(), find_cluster("a100:8x1")
    found = fitting_layouts(run, 1, cluster, 40 * 10**9)
    seconds = [each.step.seconds for each in found]
    assert len(found) == 12 and seconds == sorted(seconds)
    for each in found:
        again = stage_memory(each.stage, 8, bf16=True)
        assert each.bytes_per_gpu == on_gpu(again) <= USABLE * 40e9
        assert each.stage.batch.global_batch_size == 1024
    # What the list says is what the plan predicts for a run with that layout.
    best = found[0].stage
    same = asked(
        f"parallel.zero_stage={best.parallel.zero_stage}",
        f"parallel.activation_checkpointing={best.parallel.activation_checkpointing}",
        f"batch.micro_batch_size={best.batch.micro_batch_size}",
        cluster="a100:8x1",
    )
    assert same.prediction is not None
    assert same.prediction.stages[1].step.seconds == pytest.approx(seconds[0])


def test_the_fastest_is_the_fastest_of_all_that_fit() -> None:
    """Nothing that fits is faster, however much memory there is."""
    run, cluster = paper_run(), find_cluster("h100:8x1")
    small, large = (fitting_layouts(run, 1, cluster, gb * 10**9, most=1)[0] for gb in (12, 80))
    assert large.step.seconds <= small.step.seconds
    assert small.bytes_per_gpu <= USABLE * 12e9
    with pytest.raises(InputError, match=r"no layout of stages\.1 fits 8 GPUs of 1 GB"):
        fitting_layouts(run, 1, cluster, 10**9)


@pytest.mark.parametrize(
    ("model", "sequence", "batch", "size"),
    [
        ("llama-2-70b", 4096, 1024, "pipeline_model_parallel_size"),
        ("llama-3-8b", 131072, 16, "context_parallel_size"),
    ],
)
def test_large_models_get_pipelines_and_long_sequences_context_parallelism(
    model: str, sequence: int, batch: int, size: str
) -> None:
    found = load_model(str(CONFIGS / "model" / f"{model}.yaml"))
    run = paper_run(f"batch.global_batch_size={batch}")
    stage = run.stages[1]
    changes = {
        "model": found.model_copy(update={"max_position_embeddings": sequence}),
        "data": stage.data.model_copy(update={"sequence_length": sequence}),
    }
    run = run.model_copy(update={"stages": [run.stages[0], stage.model_copy(update=changes)]})
    (fastest,) = fitting_layouts(run, 1, find_cluster("h100:8x8"), 80 * 10**9, most=1)
    assert getattr(fastest.stage.parallel, size) > 1


@pytest.mark.parametrize(
    ("overrides", "request_", "said"),
    [
        ((), {"cluster": "h100:8x8", "gpu": "h100"}, "leave --gpu out"),
        ((), {"cluster": "h100:8x8", "world": 8}, "leave --world 8 out"),
        ((), {"layouts": True}, "--layouts requires --cluster"),
        ((), {"world": 0}, "--world 0"),
        ((), {"cluster": "h100:8x100"}, "global_batch_size = 1024 is not divisible"),
        (("precision=fp32",), {"cluster": "h100:8x1"}, "precision: fp32"),
        (("parallel.offload_optimizer=true",), {"cluster": "h100:8x1"}, "offload_optimizer"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    overrides: tuple[str, ...], request_: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        asked(*overrides, **request_)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys, "argv", ["megagrow", "plan", str(RUN), "--cluster", "h200:8x2", "--layouts"]
    )
    with pytest.raises(SystemExit) as ended:
        megagrow.cli.app.main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "gstack-1.1b on 16 ranks" in printed
    prediction = predict_run(asked(cluster="h200:8x2").plan, find_cluster("h200:8x2"))
    for stage in prediction.stages:
        assert f"{stage.step.tokens_per_gpu:,.0f}" in printed
    parts = re.findall(r"^\| \.\.\. .*\| ([\d.]+) \(", printed, re.MULTILINE)
    total = prediction.stages[1].step.seconds * 1000
    assert sum(map(float, parts)) == pytest.approx(total, rel=1e-3)
    assert printed.count("Layouts of stage") == 2
    assert "TP 1, none, micro-batch" in printed
