"""Predicted time of a run's stages and growths on a cluster, by the step model."""

from dataclasses import dataclass

from megagrow.config.schema import StageConfig
from megagrow.errors import ConfigError
from megagrow.parallel.sharding import ADAMW_KINDS
from megagrow.planning.cluster import Cluster
from megagrow.planning.costs import Pace
from megagrow.planning.planner import RunPlan, StagePlan
from megagrow.planning.step.groups import strided_group
from megagrow.planning.step.rates import GROWTH_SECONDS, HBM_SHARE, NIC_SHARE, NVLINK_SHARE
from megagrow.planning.step.timing import StepTime, step_time
from megagrow.planning.step.workload import WIDTH, StepWorkload, step_workload


@dataclass(frozen=True)
class StagePrediction:
    """Predicted times of one stage."""

    step: StepTime
    steps: int
    growth_seconds: float | None
    """Seconds of the growth at its start."""

    @property
    def seconds(self) -> float:
        """Seconds of all steps and of the growth before them."""
        return self.steps * self.step.seconds + (self.growth_seconds or 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs during training."""
        return self.step.work.step_tokens / self.step.seconds


@dataclass(frozen=True)
class RunPrediction:
    """Predicted times of a run on all GPUs of a cluster."""

    cluster: Cluster
    stages: tuple[StagePrediction, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def predict_run(plan: RunPlan, cluster: Cluster) -> RunPrediction:
    """Return the prediction for a plan on as many ranks as the cluster has GPUs.

    Raises ConfigError for settings outside the step model: fp32 and an offloaded optimizer.
    """
    if not plan.bf16:
        raise ConfigError("--cluster: predicts bf16 only, this run has precision: fp32")
    return RunPrediction(
        cluster, tuple(_stage(stage, cluster, index) for index, stage in enumerate(plan.stages))
    )


def predicted_pace(plan: RunPlan, prediction: RunPrediction) -> Pace:
    """Return the mean throughput of the run: its true FLOPs over the predicted time."""
    flops = sum(stage.flops_true for stage in plan.stages)
    return Pace(flops / prediction.seconds, "predicted for the cluster, mean over all stages")


def stage_work(stage: StageConfig, cluster: Cluster) -> StepWorkload:
    """Return the workload of one GPU of the cluster in a step of this stage."""
    return step_workload(stage, cluster.gpus, cluster.card.family == "hopper")


def _stage(stage: StagePlan, cluster: Cluster, index: int) -> StagePrediction:
    if stage.config.parallel.offload_optimizer:
        raise ConfigError(
            f"--cluster: stages.{index}.parallel.offload_optimizer: PCIe traffic is not predicted; "
            "leave it out, or leave --cluster out"
        )
    work = stage_work(stage.config, cluster)
    growth = None if stage.growth is None else growth_seconds(work, cluster)
    return StagePrediction(step_time(work, cluster), stage.steps, growth)


def growth_seconds(work: StepWorkload, cluster: Cluster) -> float:
    """Return the seconds of a live growth into the model of `work`.

    Every GPU receives its shard of the state, counted as AdamW's, at worst entirely from other
    nodes; then the forward weights are gathered if each rank holds all of them. The checkpoint
    before the growth is not included.
    """
    held = work.rank_parameters / (work.partition if work.zero_stage else 1)
    card = cluster.card
    rate = card.hbm * HBM_SHARE / 2  # one GPU reads and writes
    if cluster.nodes > 1:
        rate = card.nic * NIC_SHARE
    elif work.gpus > 1:
        rate = card.nvlink * NVLINK_SHARE
    moved = 4 * len(ADAMW_KINDS) * held / rate
    gathered = 0.0
    if work.zero_stage in (1, 2):
        group = strided_group(cluster, work.partition, work.tp)
        gathered = group.one_way(WIDTH * work.rank_parameters)
    return GROWTH_SECONDS + moved + gathered
