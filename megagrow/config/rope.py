"""Rotary positions that reach further than those a model was first trained on."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from megagrow.config.sections import Count, Section

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
