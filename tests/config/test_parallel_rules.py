"""Constraints of context and pipeline parallelism, and of the number of ranks."""

import pytest

from megagrow.config.parallel_rules import world_problems
from megagrow.config.validation import problems
from tests.helpers.run.valid_runs import run

CP, PP = "context_parallel_size", "pipeline_model_parallel_size"
VPP, TP = "virtual_pipeline_model_parallel_size", "tensor_model_parallel_size"


@pytest.mark.parametrize(
    ("parallel", "model", "named"),
    [
        ({CP: 3}, {}, ["data.sequence_length = 64", "2 x 3", f"{CP} = 3"]),
        ({CP: 32, TP: 3, "sequence_parallel": True}, {}, ["32 x 3", "sequence_parallel"]),
        ({CP: 4, "cp_comm_type": "a2a"}, {}, ["num_attention_heads = 6", "1 x 4", "a2a"]),
        (
            {CP: 2},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            [f"{CP} = 2", "rope_type = dynamic"],
        ),
        ({VPP: 2}, {}, [f"{VPP} = 2", f"{PP} above 1"]),
        ({PP: 2, "zero_stage": 3}, {}, [f"{PP} = 2", "zero_stage = 3"]),
        ({PP: 2, VPP: 2}, {}, ["num_hidden_layers = 2", "2 x 2"]),
    ],
)
def test_impossible_parallelism_is_refused_by_the_names_of_its_keys(parallel, model, named) -> None:
    found = problems(run({"parallel": parallel, "model": model}))
    assert found and all(word in "; ".join(found) for word in named), found


def test_all_sizes_divide_the_world() -> None:
    sizes = {TP: 2, CP: 2, PP: 2}
    config = run({"parallel": sizes})
    assert problems(config) == world_problems(config, 8) == world_problems(config, 16) == []
    assert world_problems(config, 12) == [
        f"world size 12 is not divisible by stages.0.parallel.{TP} = 2 x {CP} = 2 x {PP} = 2; "
        "use a multiple of 8 ranks, or smaller sizes"
    ]
