"""Memory of a simulated step by category, by hand, and the source lines that decide on it."""

from pathlib import Path
from typing import Any

import pytest

from megagrow.model.backends import OPERATIONS
from megagrow.planning.simulated import SimulatedStage, simulate_run
from megagrow.simulation.sites import NOWHERE, Site, current_site
from tests.helpers.runs import make_run, parallel_of

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, WIDTH, VOCABULARY = 2, 256, 4, 2, 64, 512, 1024
MODEL = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": WIDTH,
    "vocab_size": VOCABULARY,
}
DP, RANK, TOKENS = 4, 1, 256
"""Ranks, and tokens of a micro-batch of one sequence; a step has two."""

NORMS = 2 * LAYERS + 1
TABLE = VOCABULARY * HIDDEN
LAYER = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * GROUPS * HEAD_DIM + 3 * HIDDEN * WIDTH
PARAMETERS = 2 * TABLE + NORMS * HIDDEN + LAYERS * LAYER

ROW = 2 * NORMS * HIDDEN + LAYERS * (2 * (HEADS + GROUPS) * HEAD_DIM + 4 * WIDTH)
"""Elements kept of a token: inputs and outputs of norms; q, k, v and output of attention; gate, up,
silu(gate) and their product."""
ACTIVATIONS = TOKENS * (2 * ROW + 4 * (NORMS + LAYERS * HEADS) + 2 * 2 * HEAD_DIM)
"""In bf16; in fp32 a value of each norm and each query. Cosines and sines of the positions."""
LOGITS = TOKENS * VOCABULARY * (2 + 4 + 4)
"""In bf16, and at the gradient of the loss two tensors in fp32."""

EXPECTED: dict[int, dict[str, float]] = {
    1: {
        "weights": 2 * PARAMETERS,
        "gathered weights": 0,
        "master weights": 4 * PARAMETERS / DP,
        "moments": 8 * PARAMETERS / DP,
        "gradients": 4 * PARAMETERS,
        "buckets": 0,
    },
    2: {
        "weights": 2 * PARAMETERS,
        "gathered weights": 0,
        "master weights": 4 * PARAMETERS / DP,
        "moments": 8 * PARAMETERS / DP,
        "gradients": 4 * PARAMETERS / DP,
        "buckets": 2 * 4 * PARAMETERS / 8,
    },
    3: {
        "weights": 2 * PARAMETERS / DP,
        "gathered weights": 2 * PARAMETERS,
        "master weights": 4 * PARAMETERS / DP,
        "moments": 8 * PARAMETERS / DP,
        "gradients": 4 * PARAMETERS / DP,
        "buckets": 4 * PARAMETERS,
    },
}
"""Bytes by ZeRO stage. ZeRO 2 has two staging buckets of an eighth; ZeRO 3 has a bucket for all
gradients and has gathered all weights at the loss."""

SCALARS = 8192
"""Bytes of norms, flags, counts and token ids, and of rounding each tensor up to 512 bytes."""


TRITON = dict.fromkeys(OPERATIONS, "triton")


def simulated(
    folder: Path,
    zero: int,
    kernels: dict[str, str] | None = None,
    packed: bool = False,
    **model: Any,
) -> SimulatedStage:
    stage = {
        "model": MODEL | model,
        "tokens": 100 * 2 * DP * TOKENS,
        "parallel": parallel_of(zero, 1),
        "kernels": kernels or {},
        "batch": {"global_batch_size": 2 * DP, "micro_batch_size": 1},
    }
    data = {"train": [{"path": folder / "train"}], "sequence_length": TOKENS}
    data["reset_attention_mask"] = packed
    run = make_run(folder, [stage], precision="bf16", data=data)
    (result,) = simulate_run(run, DP, RANK)
    return result


@pytest.mark.parametrize("zero", EXPECTED)
def test_categories_at_the_loss(tmp_path: Path, zero: int) -> None:
    expected = EXPECTED[zero] | {"activations": ACTIVATIONS, "logits": LOGITS, "other": 0}
    peak = simulated(tmp_path, zero).report.peaks["backward"]
    assert peak.categories.keys() == expected.keys()
    for name, size in expected.items():
        assert 0 <= peak.categories[name] - size <= SCALARS, (name, size, peak.categories)


def test_without_zero_the_weights_are_the_copies_of_autocast(tmp_path: Path) -> None:
    """Norms and the embedding are not operands of products."""
    categories = simulated(tmp_path, 0).report.peaks["backward"].categories
    assert categories["weights"] == 2 * (TABLE + LAYERS * LAYER)
    state = {name: categories[name] for name in ("master weights", "moments", "gradients")}
    for name, width in zip(state, (4, 8, 4), strict=True):
        assert 0 <= state[name] - width * PARAMETERS <= SCALARS * NORMS, name
    assert categories["gathered weights"] == 0


@pytest.mark.parametrize(
    ("kernels", "packed"), [(TRITON, True), (TRITON, False), ({"attention": "reference"}, True)]
)
def test_plan_of_other_backends(tmp_path: Path, kernels: dict[str, str], packed: bool) -> None:
    assert simulated(tmp_path, 1, kernels, packed).training.agrees


@pytest.mark.parametrize(
    ("kernels", "model"),
    [
        (TRITON, {"model_type": "samba", "sliding_window": 64}),
        ({"scan": "mamba_ssm"}, {"model_type": "samba"}),
        ({}, {"model_type": "olmo2"}),
        (TRITON, {"model_type": "qwen3", "attention_bias": True}),
    ],
    ids=["samba-triton", "samba-mamba_ssm", "olmo2", "qwen3"],
)
def test_activations_of_other_layer_types(
    tmp_path: Path, kernels: dict[str, str], model: dict[str, Any]
) -> None:
    """The plan leaves out values per row and per parameter, such as those of norms."""
    found = simulated(tmp_path, 1, kernels, **model)
    kept = found.report.peaks["backward"].categories["activations"]
    assert found.memory.activations() == pytest.approx(kept, rel=0.06)
    assert found.training.agrees


@pytest.mark.parametrize(("backend", "masks"), [("sdpa", LAYERS), ("flash_attn", 0)])
def test_masks_of_documents(tmp_path: Path, backend: str, masks: int) -> None:
    """torch's attention keeps a mask in bf16 in each layer; flash-attn has none."""
    kernels = {"attention": backend}
    plain, packed = (
        simulated(tmp_path, 1, kernels, each).report.peaks["backward"].categories["activations"]
        for each in (False, True)
    )
    assert packed - plain == masks * 2 * TOKENS * TOKENS


def test_packages_are_found_by_their_folders(tmp_path: Path) -> None:
    """Not by a part of a path: a checkout may be in a folder named as a package."""
    source = "from megagrow.simulation.sites import current_site\nsite = current_site()"
    names: dict[str, Site] = {}
    exec(compile(source, str(tmp_path / "megagrow/.venv/torch/nn.py"), "exec"), names)
    assert names["site"] == current_site() == NOWHERE
