"""One growth of a small model per operator, and one per option that changes the result."""

from typing import Any

from megagrow.config.growth import OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.operators import OPERATORS
from tools.docs.operators.cases import GrowthCase, growth_case, times

SOURCE = ModelConfig(
    num_hidden_layers=2,
    hidden_size=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=2,
    intermediate_size=8,
    vocab_size=11,
    rms_norm_eps=1e-2,
)
"""Source model; its vocabulary is padded on 2 and on 4 tensor-parallel ranks."""

DEEPER: dict[str, Any] = {"num_hidden_layers": 4}
TWICE = times(SOURCE, 2, 2, 2)
ODD = TWICE | {"hidden_size": 17, "intermediate_size": 12}
"""Width with a residual stream that is not a multiple of the source's."""

SIZES: dict[OperatorName, dict[str, Any]] = {
    "zero_width": ODD,
    "random_width": ODD,
    "lemon": ODD,
    "sparkling": ODD,
    "isometric": {"hidden_size": 17},
    "head_dim": {"head_dim": 6},
    "vocabulary": {"vocab_size": 14},
    "lidas": {"num_hidden_layers": 3},
}
"""Target sizes of operators that do not double the width or the depth."""


def _case_of(name: OperatorName) -> GrowthCase:
    sizes = SIZES.get(name, TWICE if OPERATORS[name].wider else DEEPER)
    return growth_case(SOURCE, sizes, operator=name)


CATALOGUE = {name: _case_of(name) for name in OPERATORS} | {
    "stack and widen": growth_case(
        SOURCE, TWICE | DEEPER, operator=["direct_depth", "direct_width"]
    ),
    "uneven, noisy, tiled": growth_case(
        *(SOURCE, TWICE),
        operator="direct_width",
        copy_split="uneven",
        noise=1.0,
        copy_order="tiled",
    ),
    "asymmetric": growth_case(SOURCE, TWICE, operator="direct_width", optimizer_state="asymmetric"),
    "keep_second_moment": growth_case(
        SOURCE, DEEPER, operator="direct_depth", optimizer_state="keep_second_moment"
    ),
    "reset": growth_case(SOURCE, DEEPER, operator="direct_depth", optimizer_state="reset"),
    "mixing": growth_case(SOURCE, DEEPER, operator="direct_depth", mixing_noise=0.2),
    "paper_exact zero": growth_case(
        SOURCE, {"hidden_size": 17}, operator="zero_width", paper_exact=True
    ),
}
"""Label -> growth."""
