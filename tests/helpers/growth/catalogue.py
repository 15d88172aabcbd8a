"""One growth of a small model by every operator, and by the options that change what they do."""

from typing import Any

from megagrow.config.growth import OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.operators import OPERATORS
from tests.helpers.growth.cases import Case, case, times

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
"""Its vocabulary is padded on 2 and on 4 tensor-parallel ranks."""

DEEPER: dict[str, Any] = {"num_hidden_layers": 4}
TWICE = times(SOURCE, 2, 2, 2)
ODD = TWICE | {"hidden_size": 17, "intermediate_size": 12}
"""The residual stream grows to no multiple."""

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
"""To what each operator grows the source, where that is not twice its width or depth."""


def _case_of(name: OperatorName) -> Case:
    operator = OPERATORS[name]
    sizes = SIZES.get(name, TWICE if operator.wider else DEEPER)
    return case(SOURCE, sizes, operator=name)


CATALOGUE = {name: _case_of(name) for name in OPERATORS} | {
    "stack and widen": case(SOURCE, TWICE | DEEPER, operator=["direct_depth", "direct_width"]),
    "uneven, noisy, tiled": case(
        *(SOURCE, TWICE),
        operator="direct_width",
        copy_split="uneven",
        noise=1.0,
        copy_order="tiled",
    ),
    "asymmetric": case(SOURCE, TWICE, operator="direct_width", optimizer_state="asymmetric"),
    "keep_second_moment": case(
        SOURCE, DEEPER, operator="direct_depth", optimizer_state="keep_second_moment"
    ),
    "reset": case(SOURCE, DEEPER, operator="direct_depth", optimizer_state="reset"),
    "mixing": case(SOURCE, DEEPER, operator="direct_depth", mixing_noise=0.2),
    "literal zero": case(SOURCE, {"hidden_size": 17}, operator="zero_width", paper_exact=True),
}
