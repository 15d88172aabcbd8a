"""With sequences sharded over ranks a run has the losses, norms and weights of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.config.schema import RunConfig
from megagrow.parallel import collectives
from megagrow.parallel.collectives import ProcessGroup
from megagrow.train.data_setup import open_inputs
from megagrow.train.stage import masks_now
from megagrow.train.state_check import predictions
from megagrow.train.step import mean_loss
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, STEP_TOKENS, full_tensors, make_run
from tests.helpers.spawn import run_ranks
from tests.helpers.train.starting import losses_of, start

STEPS = {"llama": 20, "tensor": 4, "samba": 4, "crossing": 4}
LLAMA = MODEL | {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
SAMBA = {
    **{"model_type": "samba", "num_hidden_layers": 4, "hidden_size": 16, "vocab_size": 101},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 24},
    **{"max_position_embeddings": 64, "sliding_window": 5, "tie_word_embeddings": True},
    **{"mamba_d_inner": 24, "mamba_d_state": 3, "mamba_d_conv": 4, "mamba_dt_rank": 2},
}
"""A window and a convolution that reach across the borders of chunks, which have 2 or 4 tokens."""
PACKED = {"reset_attention_mask": True, "reset_position_ids": True}


def parallel(zero: int, tp: int, cp: int, comm_type: str, **options: Any) -> dict[str, Any]:
    return {
        **{"zero_stage": zero, "tensor_model_parallel_size": tp, "context_parallel_size": cp},
        **{"cp_comm_type": comm_type, **options},
    }


INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}

CASES = {
    "llama": [
        parallel(0, 1, 2, "all_gather"),
        parallel(1, 1, 4, "a2a", activation_checkpointing="selective"),
    ],
    "tensor": [
        parallel(2, 2, 2, "a2a", sequence_parallel=True),
        parallel(3, 2, 2, "all_gather", activation_checkpointing="full", sequence_parallel=True),
    ],
    "samba": [
        parallel(3, 1, 4, "a2a", zero_hpz_partition_size=2),
        parallel(1, 2, 2, "all_gather", activation_checkpointing="full"),
        parallel(0, 1, 4, "all_gather", activation_checkpointing="selective"),
        parallel(1, 1, 2, "all_gather", **INTERLEAVED),
    ],
    "crossing": [parallel(2, 1, 4, "all_gather"), parallel(0, 1, 2, "a2a")],
}


BF16 = parallel(1, 2, 2, "all_gather"), parallel(0, 1, 4, "a2a")
"""Layouts of the hybrid in bf16, against one process in fp32."""
BF16_LIMITS = (1e-3, 3e-2)
"""Relative tolerances of losses and norms; those of other layouts (tests/train/test_layouts.py)."""


def run_of(folder: Any, kind: str, layout: dict[str, Any], precision: str = "fp32") -> RunConfig:
    """Micro-batches of one sequence: one process accumulates 4 of them."""
    model = SAMBA if kind == "samba" else LLAMA
    data = {} if kind == "crossing" else PACKED
    optimizer = {"lr": 1e-2, "z_loss_multiplier": 1e-2, "weight_decay_on": "matrices"}
    optimizer["type"] = "muon" if kind == "crossing" else "adamw"
    kernels = {"linear_cross_entropy": "cp_comm_type" in layout}
    stage = {"model": model, "data": data, "parallel": layout, "optimizer": optimizer}
    stage["kernels"] = kernels
    tokens = STEPS[kind] * STEP_TOKENS
    return make_run(folder, [{"tokens": tokens, **stage}], precision=precision)


def outcomes(runs: list[RunConfig]) -> list[tuple[list[float], dict[str, Tensor], Tensor]]:
    """Per run the losses and norms of the steps and a validation loss, the weights, and logits."""
    out = []
    for run in runs:
        stage = start(run)
        losses, state = losses_of(run, stage, RunState())
        masks, reader = masks_now(run, stage, state.stage_tokens), open_inputs(run).stages[0].fixed
        losses.append(mean_loss(stage, reader, 5, masks))
        logits = predictions(stage, reader, masks)
        weights = full_tensors(stage.layout, stage.engine.storage())
        out.append((losses, {n: kinds["fp32"].clone() for n, kinds in weights.items()}, logits))
        stage.release()
    return out


def outcomes_and_control(runs: list[RunConfig], control: RunConfig) -> tuple[list, list[float]]:
    """The outcomes, and the losses of a run whose ranks keep their gradients of keys and values."""
    found = outcomes(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_reduce_scatter_sequence", own_part)
        return found, outcomes([control])[0][0]


def own_part(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim=1)[group.rank()]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("context")
    runs = [run_of(folder, kind, {"zero_stage": 0}) for kind in CASES]
    return folder, dict(zip(CASES, run_ranks(1, outcomes, runs)[0], strict=True))


@pytest.mark.dist
@pytest.mark.slow
def test_runs_are_those_of_one_process(references):
    folder, expected = references
    cases = [(kind, layout) for kind, layouts in CASES.items() for layout in layouts]
    low = [("samba", layout, "bf16") for layout in BF16]
    runs = [run_of(folder, *case) for case in (*cases, *low)]
    control = run_of(folder, "crossing", CASES["crossing"][0])
    for found, of_control in run_ranks(4, outcomes_and_control, runs, control):
        for case, (losses, weights, logits) in zip(cases, found, strict=False):
            reference, of_one, logits_of_one = expected[case[0]]
            assert losses == pytest.approx(reference, rel=1e-5), case
            for name, weight in weights.items():
                torch.testing.assert_close(weight, of_one[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits, logits_of_one, rtol=1e-4, atol=1e-4)
        for case, (losses, *_) in zip(low, found[len(cases) :], strict=True):
            for kind, limit in enumerate(BF16_LIMITS):
                assert losses[kind::2] == pytest.approx(expected["samba"][0][kind::2], rel=limit), (
                    case
                )
        assert of_control != pytest.approx(expected["crossing"][0], rel=1e-3)
