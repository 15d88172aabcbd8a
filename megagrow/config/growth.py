"""Growth section of a stage: operators, copies, optimizer state and learning rate."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megagrow.config.sections import Count, CountOrZero, Section

OperatorName = Literal[
    "direct_depth",
    "direct_width",
    "learn_depth",
    "learn_width",
    "zero_depth",
    "zero_width",
    "random_depth",
    "random_width",
    "net2net_width",
    "staged_width",
    "bert2bert_fpi",
    "bert2bert_aki",
    "lemon",
    "hypercloning",
    "mup_copy",
    "sparkling",
    "isometric",
    "head_dim",
    "vocabulary",
    "solar",
    "llama_pro",
    "mslt",
    "midas",
    "lidas",
]
"""Growth operators, defined in `growth/operators.py`; the first eight are the paper's."""

StatePolicy = Literal[
    "transport", "asymmetric", "keep_second_moment", "estimate_second_moment", "reset"
]


GSTACK = "gstack"
GSTACK_OPERATOR: OperatorName = "direct_depth"
"""Operator of Gstack, and its name in the paper's runs, which is accepted for it."""


def _operators(value: object) -> object:
    """Return a single operator as a list, and the paper's name under the operator's."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        return names
    return [GSTACK_OPERATOR if name == GSTACK else name for name in names]


_NamedOperator = OperatorName | Literal["gstack"]


class LearnConfig(Section):
    """Training of learned operators (LiGO). Defaults are the values of the paper's code."""

    steps: Count = 100
    """Training steps of the operator, each on one global batch."""
    lr: float = Field(default=7e-5, gt=0)
    """Peak learning rate of the operator."""
    min_lr: float = Field(default=7e-6, ge=0)
    """Final learning rate of its cosine schedule; at most `lr`."""
    warmup_steps: int = Field(default=50, ge=0)
    """Warm-up steps, included in `steps`."""


class NewEntriesConfig(Section):
    """Separate learning rate of the entries added by a growth (SPARKLING, section 4.2).

    It rises from the rate at the growth to `peak_factor` times that rate, and then follows a cosine
    to `min_lr` at the end of the schedule. It continues in stages without growth that continue the
    schedule.
    """

    peak_factor: float = Field(default=1.3, gt=0)
    """Ratio of the peak to the learning rate at the growth."""
    warmup_steps: int = Field(default=250, ge=0)
    """Steps from the growth to the peak."""


class ProbeConfig(Section):
    """Operator search: each operator is trained on the same tokens, and the best one is kept."""

    operators: list[OperatorName] = Field(min_length=2)
    """Candidate operators."""
    steps: Count = 100
    """Training steps per candidate before the comparison."""


class GrowthConfig(Section):
    """Growth of the previous stage's model into this stage's model."""

    operator: Annotated[
        list[OperatorName],
        BeforeValidator(_operators, json_schema_input_type=_NamedOperator | list[_NamedOperator]),
    ] = Field(default=["direct_depth"], min_length=1)
    """One operator, or several that grow different axes in one event; `gstack` is `direct_depth`.
    With `probe`, set `probe.operators` instead."""
    layer_map: list[Annotated[int, Field(ge=-1)]] | str | None = None
    """Depth: source layer of each target layer, counted from 0, with -1 for a new layer of initial
    weights; or a preset: `stack`, `interpolate`, or the paper's notation for partial stacking, such
    as `12-3456x5-56`. For `random_depth` repeated layers are new layers; default: on top."""
    new_layer_init: Literal["copy", "random"] = "copy"
    """Weights of silent new layers (`zero_depth`, `llama_pro`) and of the new entries of
    `sparkling`: copies, or the initial distribution."""
    copy_order: Literal["interleaved", "tiled"] = "interleaved"
    """Width: place copies of an entry next to each other, or repeat the complete axis."""
    copy_split: Literal["even", "uneven"] = "even"
    """Width: distribution of the consumers' weights over the copies."""
    paper_exact: bool = False
    """Width: the paper's formula verbatim, without the corrections that preserve the function."""
    noise: float | None = Field(default=None, ge=0)
    """Width: standard deviation, relative to `initializer_range`, of noise on the consumers of
    copies that cancels in their output. Default: defined by the operator."""
    mixing_noise: float = Field(default=0.0, ge=0, le=1)
    """Factor a of the paper's W <- (1 - a) W + a * noise (appendix I.2)."""
    optimizer_state: StatePolicy | None = None
    """Policy for Adam's moments (docs/reference/operators.md, docs/results/optimizer-states.md).
    Default: defined by the operator."""
    second_moment_batches: Count = 8
    """`estimate_second_moment`: global batches on which the exp_avg_sq of new entries is
    measured."""
    exact_continuation: bool | None = None
    """Scale lr, weight decay and eps per parameter so that copies follow the small model exactly.
    Default: defined by the operator (true only for `mup_copy`)."""
    lr_schedule: Literal["rewarm", "continue", "by_size"] = "rewarm"
    """`rewarm` restarts the schedule at the growth; `continue` does not interrupt it; `by_size`
    continues the previous stage's schedule, times the ratio of the paper's learning rates for the
    two sizes (Table 1), and requires the same `optimizer.lr` and `min_lr` in both stages."""
    new_entries: NewEntriesConfig | None = None
    """Separate learning rate of new entries. Set by default only for `sparkling`."""
    freeze_tokens: Count | None = None
    """Tokens after the growth during which old entries are frozen."""
    ramp_tokens: CountOrZero | None = None
    """`random_*`: tokens over which the masks of new parts rise from 0 to 1, one width axis after
    the other. 0: no masks, the new parts contribute at once and the loss jumps. Default: 5000
    steps per axis, at most `tokens` of the stage."""
    learn: LearnConfig = LearnConfig()
    """`learn_*`: training of the operator."""
    probe: ProbeConfig | None = None
    """Operator search over several operators; replaces `operator`."""
    tolerance: float | None = Field(default=None, gt=0)
    """Maximum change of the loss on a fixed batch, and of the KL divergence, at a growth that
    preserves the function, in nats; null derives it from the precision."""
