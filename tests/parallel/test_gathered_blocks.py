"""ZeRO 3 gathers a block's weights for the block, and releases them after each pass."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megagrow.config.deepspeed import DeepSpeedConfig
from megagrow.model.layers.modules import LayerModule
from tests.helpers.hugging_face import tiny
from tests.helpers.parallel.engines import LENGTH, Built, Case, Plain, build, difference
from tests.helpers.spawn import run_ranks

LARGE = tiny(hidden_size=320, num_key_value_heads=4, intermediate_size=352)
"""DeepSpeed keeps weights of less than 100,000 elements gathered; these have more."""
SUB_GROUP = 50_000
DEEPSPEED = DeepSpeedConfig.model_validate(
    {
        "zero_optimization": {
            "sub_group_size": SUB_GROUP,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": "200K",
            "stage3_max_reuse_distance": 0,
            "overlap_comm": False,
            "contiguous_gradients": False,
        }
    }
)
CASES = [
    Case(3, 1),
    Case(3, 1, deepspeed=DEEPSPEED),
    Case(3, 1, recompute="selective", bf16=True),
    Case(3, 1, recompute="full"),
]
STEPS = 2


def train(case: Case) -> tuple[list[str], int, list[float], float]:
    """Weights still in memory after a forward pass, those seen, norms, and errors of weights."""
    built, plain = build(case, config=LARGE), Plain(config=LARGE)
    alive, seen = kept_after_forward(built)
    norms = [model.train_step(seed=seed) for model in (built, plain) for seed in range(STEPS)]
    error = difference(plain.weights(), built.weights())
    sizes = [len(part) for part in built.engine._engine.optimizer.fp32_partitioned_groups_flat]
    assert (len(sizes) > 2) == (case.deepspeed is not None)
    built.release()
    return alive, seen, norms, error


def kept_after_forward(built: Built) -> tuple[list[str], int]:
    gathered: dict[str, StorageWeakRef] = {}
    for name, block in built.engine._engine.module.named_modules():
        if isinstance(block, LayerModule):
            block.post_collective.register_forward_pre_hook(
                lambda *_, name=name, block=block: gathered.update(
                    (f"{name}.{leaf}", StorageWeakRef(parameter.untyped_storage()))
                    for leaf, parameter in block.named_parameters()
                    if parameter.ds_numel > 100_000 and parameter.numel() > 0
                )
            )
    ids = torch.arange(LENGTH)[None]
    logits = built.engine.forward(ids, ids, None)
    assert logits.requires_grad  # the graph is alive
    return [name for name, storage in gathered.items() if not storage.expired()], len(gathered)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_gathered_and_released(case: Case) -> None:
    for alive, seen, norms, error in run_ranks(2, train, case):
        assert seen == 2 * (3 + 2 + 2) and alive == []
        tolerance = 0.1 if case.bf16 else 1e-4
        assert norms[:STEPS] == pytest.approx(norms[STEPS:], rel=tolerance)
        assert error < (2e-2 if case.bf16 else 1e-4)
