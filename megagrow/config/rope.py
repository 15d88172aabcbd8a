"""Rotary positions that reach further than those a model was first trained on."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from megagrow.config.section import Count, Section

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
    factor: float = Field(ge=1)
    original_max_position_embeddings: Count | None = None
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    mscale: float | None = Field(default=None, ge=0)
    mscale_all_dim: float | None = Field(default=None, ge=0)
    truncate: bool | None = None

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
