"""How a stage's model comes out of the model of the stage before it: every key of `growth`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megagrow.config.sections import Count, Section

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
"""The first eight are the paper's; see `growth/operators.py` for all of them."""

StatePolicy = Literal[
    "transport", "asymmetric", "keep_second_moment", "estimate_second_moment", "reset"
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class LearnConfig(Section):
    """How learned operators (LiGO) are trained; the paper's code uses these values."""

    steps: Count = 100
    """Steps of training the operator, each on a global batch."""
    lr: float = Field(default=7e-5, gt=0)
    """The highest learning rate of it."""
    min_lr: float = Field(default=7e-6, ge=0)
    """Where its cosine ends; not above `lr`."""
    warmup_steps: int = Field(default=50, ge=0)
    """Of `steps`, those in which the rate rises."""


class NewEntriesConfig(Section):
    """A learning rate of their own for the entries that a growth has made (SPARKLING, sec. 4.2).

    It rises from the rate at the growth to `peak_factor` times that, and then falls along a cosine
    to min_lr at the end of the schedule.
    """

    peak_factor: float = Field(default=1.3, gt=0)
    """How many times the rate at the growth it rises to."""
    warmup_steps: int = Field(default=250, ge=0)
    """Steps in which it rises."""


class ProbeConfig(Section):
    """Several operators are tried in turn on the same tokens, and the best is kept."""

    operators: list[OperatorName] = Field(min_length=2)
    """What is tried."""
    steps: Count = 100
    """Steps that each of them is trained for before they are compared."""


class GrowthConfig(Section):
    """How a stage's model comes out of the model of the stage before it."""

    operator: Annotated[list[OperatorName], BeforeValidator(_as_list)] = Field(
        default=["direct_depth"], min_length=1
    )
    """One operator, or several that grow different axes in one event. A `probe` has its own."""
    layer_map: list[Annotated[int, Field(ge=0)]] | str | None = None
    """Depth: for each new layer the source layer it copies, or a preset: `stack`, `interpolate`, or
    the paper's notation for partial stacking, such as `12-3456x5-56`."""
    new_layer_init: Literal["copy", "random"] = "copy"
    """Depth: what a new layer holds where the operator makes it a silent one."""
    copy_order: Literal["interleaved", "tiled"] = "interleaved"
    """Width: whether copies of an entry stand side by side, or the axis is repeated whole."""
    copy_split: Literal["even", "uneven"] = "even"
    """Width: whether copies share their consumers' weights evenly."""
    paper_exact: bool = False
    """Width: the operator as the paper prints it, without what makes it exact."""
    noise: float | None = Field(default=None, ge=0)
    """Width: standard deviation, relative to initializer_range, of noise on the consumers of
    copies that cancels in what they compute; by default what the operator says."""
    mixing_noise: float = Field(default=0.0, ge=0, le=1)
    """The paper's W <- (1 - a) W + a * noise (its appendix I.2)."""
    optimizer_state: StatePolicy | None = None
    """What becomes of Adam's moments (docs/reference/operators.md,
    docs/results/optimizer-states.md); by default what
    the operator says."""
    second_moment_batches: Count = 8
    """`estimate_second_moment`: global batches on which the exp_avg_sq of new entries is
    measured."""
    exact_continuation: bool | None = None
    """Scales each parameter's lr, weight decay and eps so that copies follow the small model
    exactly; by default only where the operator says so."""
    lr_schedule: Literal["rewarm", "continue", "by_size"] = "rewarm"
    """The schedule starts again at the growth, goes on as if nothing had happened, or goes on with
    the rates of the stage before times the ratio of the paper's rates at the two sizes (Table 1);
    `optimizer.lr` and `min_lr` of this stage must then be those of the stage before."""
    new_entries: NewEntriesConfig | None = None
    """A learning rate of their own for new entries; only `sparkling` sets it by itself."""
    freeze_tokens: Count | None = None
    """Old entries do not change until so many tokens after the growth."""
    ramp_tokens: Count | None = None
    """`random_*`: tokens over which the masks of new parts rise from 0 to 1, the axes of the width
    one after the other. By default 5000 steps for each axis, but no more than the stage has."""
    learn: LearnConfig = LearnConfig()
    """`learn_*`: how the operator itself is trained."""
    probe: ProbeConfig | None = None
    """In the place of `operator`: several are tried, the best is kept."""
    tolerance: float = Field(default=1e-3, gt=0)
    """How much the loss on a fixed batch may change at a growth that preserves the function."""
