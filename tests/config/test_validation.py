"""Constraints between sections and with the number of ranks."""

import pytest

from megagrow.config.parallel_rules import world_problems
from megagrow.config.validation import problems
from tests.helpers.run.valid_runs import run

KEY = "stages.0.parallel.tensor_model_parallel_size"


def not_divisible(name: str, size: int, tensor: int) -> str:
    return (
        f"stages.0.model.{name} = {size} is not divisible by {KEY} = {tensor}; "
        f"use a divisor of {size}"
    )


PATTERN = {"optimizer": {"weight_decay_exclude": ["*.up_proj.weight"]}}
"""Matches no parameter of a model without layers."""


@pytest.mark.parametrize(
    "changes",
    [
        ({},),
        ({}, {}),
        ({}, {}, {}),
        ({"parallel": {"sequence_parallel": True}},),
        ({"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},),
        ({}, {"model": {"num_hidden_layers": 3}, "growth": {"layer_map": [0, 1, 1]}}),
        ({}, {"model": {"num_hidden_layers": 2}}),
        ({}, {"parallel": {"tensor_model_parallel_size": 2, "zero_stage": 3}}),
        ({"parallel": {"zero_stage": 2, "offload_optimizer": True}},),
        ({"model": {"num_attention_heads": 10, "head_dim": 8}},),
        ({"schedule": {"type": "wsd"}},),
        ({"schedule": {"warmup_steps": 0}},),
        ({"model": {"num_hidden_layers": 0}} | PATTERN, PATTERN),
    ],
)
def test_what_is_right(changes: tuple[dict, ...]) -> None:
    assert problems(run(*changes)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"num_attention_heads": 10}},
            [
                "stages.0.model.hidden_size = 48 is not divisible by num_attention_heads = 10; "
                "set head_dim or change one of them"
            ],
        ),
        (
            {"model": {"head_dim": 7}},
            ["stages.0.model: head_dim = 7 is not even; rotary embeddings need an even head_dim"],
        ),
        (
            {"model": {"num_attention_heads": 16, "num_key_value_heads": 16}},
            [
                "stages.0.model: hidden_size / num_attention_heads = 3 is not even; "
                "rotary embeddings need an even head_dim"
            ],
        ),
        (
            {"model": {"num_key_value_heads": 4}},
            [
                "stages.0.model.num_attention_heads = 6 is not divisible by "
                "num_key_value_heads = 4; use a divisor of 6"
            ],
        ),
        (
            {"parallel": {"zero_stage": 0, "offload_optimizer": True}},
            [
                "stages.0.parallel.offload_optimizer needs a sharded optimizer state, but "
                "zero_stage = 0; set stages.0.parallel.zero_stage to 1, 2 or 3"
            ],
        ),
        (
            {"parallel": {"zero_stage": 2, "zero_hpz_partition_size": 2}},
            [
                "stages.0.parallel.zero_hpz_partition_size needs sharded weights, but "
                "zero_stage = 2; set stages.0.parallel.zero_stage to 3"
            ],
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 3}},
            [not_divisible("num_key_value_heads", 2, 3)],
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 4}, "model": {"intermediate_size": 90}},
            [
                not_divisible("num_attention_heads", 6, 4),
                not_divisible("num_key_value_heads", 2, 4),
                not_divisible("intermediate_size", 90, 4),
            ],
        ),
        (
            {"batch": {"micro_batch_size": 16}},
            [
                "stages.0.batch.global_batch_size = 8 is not divisible by micro_batch_size = 16; "
                "use a divisor of 8"
            ],
        ),
        (
            {"deepspeed": {"zero_optimization": {"sub_group_size": "1M"}}},
            [
                "stages.0.deepspeed has options of ZeRO 3 only, but zero_stage = 1; remove it, or "
                "set stages.0.parallel.zero_stage to 3"
            ],
        ),
        (
            {"batch": {"rampup_batch_size": [2, 4, 100]}},
            [
                "stages.0.batch.rampup_batch_size = [2, 4, 100] does not lead from 2 to "
                "global_batch_size = 8 in increments of 4; use a smaller start and a divisor of "
                "the difference"
            ],
        ),
        (
            {"batch": {"rampup_batch_size": [8, 2, 100]}},
            [
                "stages.0.batch.rampup_batch_size = [8, 2, 100] does not lead from 8 to "
                "global_batch_size = 8 in increments of 2; use a smaller start and a divisor of "
                "the difference"
            ],
        ),
        (
            {"batch": {"rampup_batch_size": [2, 3, 100]}},
            [
                "stages.0.batch.rampup_batch_size = [2, 3, 100]: 3 is not divisible by "
                "micro_batch_size = 2; use multiples of 2"
            ],
        ),
        (
            {"optimizer": {"momentum": 0.9, "weight_decay_exclude": ["*.norm.weight", "*.bias"]}},
            [
                "stages.0.optimizer.momentum = 0.9 is a key of Muon, but stages.0.optimizer.type = "
                "adamw; remove it or set type: muon",
                "stages.0.optimizer.weight_decay_exclude: *.bias matches no parameter of any "
                "stage; use a pattern of names such as model.layers.0.input_layernorm.weight",
            ],
        ),
        (
            {"optimizer": {"decoupled_min_lr": 0.1, "type": "muon", "adamw_lr": 1e-9}},
            [
                "stages.0.optimizer.decoupled_min_lr = 0.1 has no decoupled_lr; set it or remove "
                "the key"
            ],
        ),
        (
            {"optimizer": {"decoupled_lr": 0.001, "decoupled_min_lr": 0.1}},
            [
                "stages.0.optimizer.decoupled_min_lr = 0.1 is above decoupled_lr = 0.001; use at "
                "most decoupled_lr"
            ],
        ),
        (
            {"optimizer": {"min_lr": 0.01}},
            ["stages.0.optimizer.min_lr = 0.01 is above lr = 0.001; use at most lr"],
        ),
        (
            {"schedule": {"warmup_steps": 3, "warmup_tokens": 3}},
            ["stages.0.schedule sets both warmup_steps and warmup_tokens; set one of them to null"],
        ),
        (
            {"model": {"max_position_embeddings": 32}},
            [
                "stages.0.data.sequence_length = 64 is above "
                "stages.0.model.max_position_embeddings = 32; lower the one or raise the other"
            ],
        ),
        (
            {"growth": {}},
            ["stages.0.growth: the first stage has no model to grow from; remove it"],
        ),
    ],
)
def test_one_stage(change: dict, message: list[str]) -> None:
    assert problems(run(change)) == message


def test_sequence_parallel_needs_sequences_that_tensor_parallel_divides() -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert problems(run({"parallel": parallel}, data={"sequence_length": 63})) == [
        f"stages.0.data.sequence_length = 63 is not divisible by {KEY} = 2, which "
        "sequence_parallel requires; use a divisor of 63"
    ]


def test_a_stage_without_its_growth() -> None:
    assert problems(run({}, {"growth": None})) == [
        "stages.1.model changes num_hidden_layers from 2 to 8; add stages.1.growth, or set "
        "stages.1.model.num_hidden_layers to the value of stages.0"
    ]
    kept = {"num_hidden_layers": 2, "rope_theta": 5e5, "max_position_embeddings": 4096}
    assert problems(run({}, {"growth": None, "model": kept})) == []
    assert problems(run({}, {"schedule": {"restart": True}})) == [
        "stages.1.schedule.restart = true is for stages without growth; remove it and set "
        "stages.1.growth.lr_schedule to rewarm"
    ]


def test_checking_changes_nothing() -> None:
    config = run({}, {"growth": None})
    before = config.model_dump()
    problems(config)
    assert config.model_dump() == before


@pytest.mark.parametrize(("tensor", "world"), [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8)])
def test_worlds_that_fit(tensor: int, world: int) -> None:
    config = run({"parallel": {"tensor_model_parallel_size": tensor}})
    assert world_problems(config, world) == []


def test_worlds_that_do_not_fit() -> None:
    config = run({}, {"parallel": {"tensor_model_parallel_size": 2}})
    assert world_problems(config, 3) == [
        "stages.0.batch.global_batch_size = 8 is not divisible by "
        "micro_batch_size x data parallel = 2 x 3; use a multiple of 6",
        "world size 3 is not divisible by stages.1.parallel.tensor_model_parallel_size = 2; "
        "use a multiple of 2 ranks, or smaller sizes",
    ]
    hybrid = run({"parallel": {"zero_stage": 3, "zero_hpz_partition_size": 4}})
    assert world_problems(hybrid, 2) == [
        "data x context parallel 2 is not divisible by "
        "stages.0.parallel.zero_hpz_partition_size = 4; use a divisor of 2"
    ]
    ramp = run({"batch": {"rampup_batch_size": [2, 2, 100]}})
    assert world_problems(ramp, 2) == [
        "stages.0.batch.rampup_batch_size: 2 is not divisible by micro_batch_size x data parallel "
        "= 2 x 2; use multiples of 4"
    ]
    assert world_problems(config, 16) == [
        "stages.0.batch.global_batch_size = 8 is not divisible by "
        "micro_batch_size x data parallel = 2 x 16; use a multiple of 32",
        "stages.1.batch.global_batch_size = 8 is not divisible by "
        "micro_batch_size x data parallel = 2 x 8; use a multiple of 16",
    ]
