"""What all sections of a run file have in common."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megagrow.common.sizes import parse_count

Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
"""A positive whole number, written for people: `2048`, `2M`, `10B`."""


class Section(BaseModel):
    """A part of a run file: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class EvaluationConfig(Section):
    """When the model is evaluated, and on what (docs/guides/evaluation.md). The end of a stage and
    of the
    run always are. Needs lm-eval, `pip install megagrow[eval]`, and `data.tokenizer`."""

    interval: Count = 1000
    """Steps from one evaluation to the next."""
    tasks: list[str] = Field(default=["gstack"], min_length=1)
    """Of lm-eval; `gstack` stands for the paper's eight."""
    data_dir: Path | None = None
    """Local files of the tasks; null is the hub."""
    limit: Count | None = None
    """Documents of each task; null is all of them."""
    batch_size: Count = 16
    """Sequences in a pass of one data-parallel rank."""


class LossSpikeConfig(Section):
    """When a loss counts as a spike: it lies `zscore` standard deviations above the mean of the
    last `window` losses, and those of the `patience` - 1 steps before it did so too."""

    window: int = Field(default=100, ge=2)
    """In steps; what is itself that high does not enter it, and a growth begins it anew."""
    zscore: float = Field(default=6.0, gt=0)
    """How many standard deviations above the mean a loss has to lie."""
    patience: Count = 3
    """How many steps in a row have to lie there."""


class GuardsConfig(Section):
    """Steps that are not finite, loss spikes, and ranks that hang
    (docs/guides/fault-tolerance.md)."""

    max_skipped_steps: Count = 3
    """After so many steps in a row whose loss or gradient is not finite the run rewinds."""
    max_rewinds: int = Field(default=3, ge=0)
    """After so many rewinds to the same checkpoint, or to earlier ones, the run ends."""
    loss_spike: LossSpikeConfig | None = None
    """Rewinds after a loss spike too; null does not look for any."""
    hang_timeout: float | None = Field(default=600.0, ge=1)
    """Seconds in which a rank must get on; null never ends a run that hangs. What may take long
    (a growth, a checkpoint, the first step of a stage) has six times as long."""


RowBackend = Literal["auto", "triton", "torch"]


class KernelsConfig(Section):
    """A backend for each operation. `auto` is the fastest one that computes it correctly on the
    device at hand; one that is named and cannot run there ends the run before it starts.
    `megagrow doctor` tells what is possible here, and what `auto` takes."""

    attention: Literal["auto", "triton", "flash_attn", "sdpa", "reference"] = "auto"
    """`triton` and `flash_attn` pass over what a document does not see, `sdpa` (torch's own)
    computes it and throws it away; `reference` is the definition, for comparison."""
    norm: RowBackend = "auto"
    """RMSNorm, also together with the addition to the residual stream before it."""
    pointwise: RowBackend = "auto"
    """Rotary positions and SwiGLU."""
    loss: RowBackend = "auto"
    """Cross-entropy over a vocabulary that may be spread over ranks."""
    linear_cross_entropy: bool = False
    """Computes the head and the loss in chunks: the logits of all tokens are never in memory."""


RopeType = Literal["linear", "dynamic", "llama3", "yarn"]


ROPE_TYPES: tuple[str, ...] = get_args(RopeType)


_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
"""What a type needs besides its factor."""


_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
"""What yarn may have besides."""


class RopeScaling(Section):
    """Hugging Face's `rope_scaling`, with its names. What each type computes stands in
    `model/rope.py`; keys of another type are refused."""

    rope_type: RopeType
    """How the frequencies are stretched."""
    factor: float = Field(ge=1)
    """How many times as far the positions are to reach."""
    original_max_position_embeddings: Count | None = None
    """`llama3` and `yarn`, which need it: tokens of the sequences first trained on."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: waves longer than the original length over this are stretched by `factor`."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: waves shorter than the original length over this stay as they are."""
    attention_factor: float | None = Field(default=None, gt=0)
    """`yarn`: the factor on cosines and sines itself, in place of what follows from the others."""
    beta_fast: float | None = Field(default=None, gt=0)
    """`yarn`: pairs that turn more often than this over the original length stay; by default 32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """`yarn`: pairs that turn less often than this are stretched by `factor`; by default 1."""
    mscale: float | None = Field(default=None, ge=0)
    """`yarn`: with `mscale_all_dim`, the factor on cosines and sines is the ratio of 0.1 x this x
    ln(factor) + 1 for the one and the other."""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    """`yarn`: see `mscale`."""
    truncate: bool | None = None
    """`yarn`: whether the bounds of the ramp are rounded to whole pairs; by default they are."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        needs = _NEEDS[self.rope_type]
        may = _YARN if self.rope_type == "yarn" else ()
        given = self.given().keys() - {"rope_type", "factor"}
        if missing := [key for key in needs if key not in given]:
            raise ValueError(f"{self.rope_type} needs {', '.join(missing)}")
        if other := sorted(given - {*needs, *may}):
            raise ValueError(f"{self.rope_type} has no {', '.join(other)}")
        if self.rope_type == "llama3" and not self._is_ordered():
            raise ValueError("high_freq_factor should be above low_freq_factor")
        return self

    def given(self) -> dict[str, Any]:
        """The keys that are set, as Hugging Face writes them."""
        return self.model_dump(exclude_none=True)

    def _is_ordered(self) -> bool:
        low, high = self.low_freq_factor, self.high_freq_factor
        return low is not None and high is not None and low < high
