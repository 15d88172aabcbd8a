"""Simulated ranks: nothing mixes host and device, and the host rarely waits for the device."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config.schema import ParallelConfig, RunConfig
from megagrow.model.backends import OPERATIONS
from megagrow.planning.memory import stage_memory
from megagrow.planning.traffic import step_traffic
from megagrow.simulation import actions
from megagrow.simulation.isolated import isolated
from megagrow.simulation.rank import EVERYTHING, simulate_rank
from megagrow.simulation.report import STEP, StageReport
from tests.helpers.runs import MODEL, make_run, parallel_of

TRITON = dict.fromkeys(OPERATIONS, "triton")
TORCH = {"attention": "sdpa"} | dict.fromkeys(("norm", "pointwise", "loss", "scan"), "torch")
CHUNKS = {"linear_cross_entropy": True, "loss": "triton"}  # 10 chunks; torch has 64
SMALL = MODEL | {"num_hidden_layers": 1, "vocab_size": 1000, "hidden_size": 64}
LLAMA = {"model_type": "llama"}
OLMO2, QWEN3 = {"model_type": "olmo2"}, {"model_type": "qwen3", "attention_bias": True}
TIED = LLAMA | {"tie_word_embeddings": True}
MAMBA = {"layer_types": ["mamba", "full_attention"]}
SAMBA = {"layer_types": ["mamba", "sliding_attention"], "sliding_window": 16}
WORLD, RANK, LENGTH = 8, 3, 32


@dataclass(frozen=True)
class Case:
    parallel: dict[str, Any]
    precision: str
    kernels: dict[str, Any] = field(default_factory=dict)
    operator: str = "direct_depth"
    packed: bool = False
    """Two documents per sequence."""
    model: dict[str, Any] = field(default_factory=LLAMA.copy)
    rank: int = RANK

    def run(self, tmp: Path) -> RunConfig:
        parallel = ParallelConfig.model_validate(self.parallel)
        pipeline = parallel.pipeline_model_parallel_size
        chunks = pipeline * parallel.virtual_pipeline_model_parallel_size
        per_pass = parallel.data_parallel_size(WORLD)
        stage = {
            "tokens": 10 * 16 * LENGTH,
            "parallel": self.parallel,
            "kernels": self.kernels,
            "batch": {"global_batch_size": 2 * per_pass * pipeline, "micro_batch_size": 1},
        }
        small = SMALL | self.model
        small["num_hidden_layers"] = chunks * len(self.model.get("layer_types", [None]))
        large = small | {"num_hidden_layers": 2 * small["num_hidden_layers"]}
        stages = [
            stage | {"model": small},
            stage | {"model": large, "growth": {"operator": self.operator}},
        ]
        data = {
            "train": [{"path": tmp / "train"}],
            "sequence_length": LENGTH,
            "reset_attention_mask": self.packed,
        }
        return make_run(tmp, stages, precision=self.precision, data=data)


PIPELINE = {"pipeline_model_parallel_size": 2}
CHUNKED = {"virtual_pipeline_model_parallel_size": 2}
OFFLOAD = {"offload_optimizer": True}
CASES = {
    "zero-0": Case(parallel_of(0, 2, True, "full"), "bf16", TRITON),
    "zero-1": Case(
        parallel_of(1, 2),
        "bf16",
        {"attention": "flash_attn", "scan": "mamba_ssm"} | CHUNKS,
        model=MAMBA,
    ),
    "zero-1-fp32": Case(
        parallel_of(1, 1), "fp32", {"attention": "reference"}, operator="random_depth", packed=True
    ),
    "zero-1-full": Case(parallel_of(1, 2, False, "full"), "bf16", model=OLMO2),
    "zero-2": Case(parallel_of(2, 2, True, "selective"), "bf16", TRITON, packed=True, model=SAMBA),
    "zero-2-olmo2": Case(parallel_of(2, 2, True, "selective"), "bf16", model=OLMO2),
    "zero-2-qwen3": Case(parallel_of(2, 2), "bf16", model=QWEN3),
    "zero-3": Case(parallel_of(3, 1), "bf16", {"attention": "flash_attn"} | CHUNKS, packed=True),
    "zero-3-fp32": Case(parallel_of(3, 2, True, "full"), "fp32", TRITON),
    "zero-2-offload": Case(parallel_of(2, 1) | OFFLOAD, "bf16", TORCH, packed=True, model=SAMBA),
    "pipeline-first": Case(parallel_of(1, 2, True) | PIPELINE | CHUNKED, "bf16", model=TIED),
    "pipeline-last": Case(parallel_of(2, 1) | PIPELINE, "bf16", packed=True, model=TIED, rank=7),
    "context": Case(parallel_of(1, 2) | {"context_parallel_size": 2}, "bf16", model=MAMBA),
}
"""Every ZeRO stage, precision, kernel backend and kind of parallelism."""

AGREEMENT = {"megagrow/parallel/agreement.py (share_values_and_flags)": 1}
ZERO3 = AGREEMENT | {
    "deepspeed/runtime/zero/stage3.py "
    "(DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue)": 2,
    "deepspeed/runtime/zero/partition_parameters.py (Init._allgather_params_coalesced)": 1,
    "deepspeed/runtime/utils.py (is_invalid_grad_norm)": 1,
}
WAITS: dict[str, dict[str, int]] = dict.fromkeys(CASES, AGREEMENT) | {
    "zero-3": ZERO3,
    "zero-3-fp32": ZERO3,
    # The host updates the weights: it reads gradients, their norm and the clipping factor.
    "zero-2-offload": AGREEMENT
    | {
        "megagrow/parallel/flat_optimizer.py (FlatOptimizer.step)": 2,
        "megagrow/parallel/update_scaling.py (clip_in_update)": 2,
    },
}
"""Waits of the host in one step of two micro-batches, at most: the end of the step in which the
ranks agree on the next one, and under ZeRO 3 those of DeepSpeed."""

PAGEABLE = "DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct"
"""Only function that copies from pageable memory in a step: scalars, under ZeRO 3."""

SCALARS = 256
"""Bytes of norms, losses and flags in a step, which are not planned."""


def test_every_backend_is_simulated() -> None:
    """Also those of kernels that are not installed (`simulation.patches`)."""
    backends = {(name, backend) for name, known in OPERATIONS.items() for backend in known}
    simulated = {choice for case in CASES.values() for choice in case.kernels.items()}
    assert backends <= simulated


@pytest.mark.parametrize("name", CASES)
def test_a_rank_builds_loads_trains_validates_saves_and_grows(tmp_path: Path, name: str) -> None:
    run = CASES[name].run(tmp_path)
    reports = isolated(simulate_rank, run, WORLD, CASES[name].rank, EVERYTHING)
    assert len(reports) == 2
    for index, report in enumerate(reports):
        check_waits(name, report)
        parallel = run.stages[index].parallel
        is_last = parallel.pipeline_model_parallel_size == 1 or CASES[name].rank == WORLD - 1
        check_evaluation(report, zero3=parallel.zero_stage == 3, is_last=is_last)
        check_memory(report, first=index == 0)
        check_traffic(run, index, CASES[name].rank, report)


def check_waits(name: str, report: StageReport) -> None:
    found: Counter[str] = Counter()
    for wait, count in report.waits_in(STEP).items():
        found[f"{wait.site.file} ({wait.site.function})"] += count
    allowed = WAITS[name]
    over = [place for place, count in found.items() if count > allowed.get(place, 0)]
    lines = [f"{count} x {wait.operation} at {wait.site}" for wait, count in report.waits.items()]
    assert not over, "\n".join(["the host waits in a step:", *over, "of all waits:", *lines])
    pageable = [x.site for x in report.copies if x.section == STEP and not x.pinned]
    assert [str(site) for site in pageable if site.function != PAGEABLE] == []


def check_evaluation(report: StageReport, zero3: bool, is_last: bool) -> None:
    """The host reads one result per pass, and two over all batches of a validation.

    On the last pipeline rank it also reads the logits of sampled texts, and under ZeRO 3 the vote
    of all ranks on another pass.
    """
    assert sum(report.waits_in("validation").values()) == 2
    greedy, sampled, after_end = actions.TOKENS
    for section in (actions.LIKELIHOOD, actions.PROMPT, *actions.TOKENS):
        waits, logits = report.waits_in(section), is_last and section == sampled
        assert sum(waits.values()) == 1 + zero3 + logits, [str(wait.site) for wait in waits]
    assert sum(report.waits_in(actions.FINISH).values()) == zero3
    # The token ids and the lengths of the texts; rows and choices of the sampled ones; in the end
    # the index of the remaining one.
    copies = {greedy: 2, sampled: 4 if is_last else 2, after_end: 3}
    for section, count in copies.items():
        assert report.copies_in(section, pinned=False) == count + zero3, section


def check_memory(report: StageReport, first: bool) -> None:
    begin = {"build", "load"} if first else {"growth"}
    steps = {"first step", "forward", "backward", "step"}
    assert report.peaks.keys() == begin | steps | {"validation", "save", *actions.SECTIONS}
    for phase, peak in report.peaks.items():
        assert peak.size == sum(peak.categories.values()), phase
    assert report.training_peak.categories["weights"] >= 0
    assert report.peaks["backward"].size > report.peaks["save"].size


def check_traffic(run: RunConfig, index: int, rank: int, report: StageReport) -> None:
    """Compare the collectives of a step with those of the plan."""
    stage, bf16 = run.stages[index], run.precision == "bf16"
    memory = stage_memory(stage, WORLD, bf16).at_rank(rank)
    planned: Counter[tuple[str, int]] = Counter()
    for each in step_traffic(memory):
        planned[each.kind, each.ranks] += each.payload
    found = report.step_traffic
    for key in report.collectives:
        of_data = (key.ranks, key.stride) == (report.dp, report.tp)
        if key.section == STEP and key.operation == "reduce-scatter" and of_data:
            assert key.dtype == torch.float32  # gradients, also those of bf16 weights
    exact = stage.parallel.zero_stage in (1, 2) and not stage.parallel.offload_optimizer
    for key in found.keys() | planned.keys():
        # Under ZeRO 0 and 3 the plan is an upper bound.
        least = planned[key] if exact else 0
        assert least <= found[key] <= planned[key] + SCALARS, key
