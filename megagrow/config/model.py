"""Model section: sizes of a Llama model and its rotary position scaling."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from megagrow.config.sections import Count, Section

RopeType = Literal["linear", "dynamic", "llama3", "yarn"]

ROPE_TYPES: tuple[str, ...] = get_args(RopeType)

_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
"""Keys that a type requires in addition to `factor`."""

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
"""Optional keys of yarn."""


def rope_keys(rope_type: str) -> frozenset[str]:
    """Return all keys that a type of `ROPE_TYPES` reads."""
    optional = _YARN if rope_type == "yarn" else ()
    return frozenset(("rope_type", "factor", *_REQUIRED[rope_type], *optional))


class RopeScaling(Section):
    """Scaling of rotary positions beyond the length of the first training, in the format of Hugging
    Face's `rope_scaling`. `model/rope.py` defines each type; keys of another type are errors."""

    rope_type: RopeType
    """Method that rescales the frequencies."""
    factor: float = Field(ge=1)
    """Ratio of the extended to the original context length."""
    original_max_position_embeddings: Count | None = None
    """`llama3`, `yarn` (required): context length of the first training, in tokens."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: wavelengths above the original length divided by this are stretched by `factor`."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: wavelengths below the original length divided by this are unchanged."""
    attention_factor: float | None = Field(default=None, gt=0)
    """`yarn`: explicit factor on cosines and sines; replaces the one computed from the other
    keys."""
    beta_fast: float | None = Field(default=None, gt=0)
    """`yarn`: pairs with more rotations than this over the original length are unchanged; default
    32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """`yarn`: pairs with fewer rotations than this are stretched by `factor`; default 1."""
    mscale: float | None = Field(default=None, ge=0)
    """`yarn`: with `mscale_all_dim`, the factor on cosines and sines is (0.1 mscale ln(factor) + 1)
    / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    """`yarn`: see `mscale`."""
    truncate: bool | None = None
    """`yarn`: round the bounds of the ramp to integer pair indices; default true."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        present = self.given().keys()
        if missing := [key for key in _REQUIRED[self.rope_type] if key not in present]:
            raise ValueError(f"rope_type {self.rope_type} requires {', '.join(missing)}")
        if other := sorted(present - rope_keys(self.rope_type)):
            raise ValueError(f"rope_type {self.rope_type} has no {', '.join(other)}; remove it")
        if self.rope_type == "llama3" and not self._is_ordered():
            raise ValueError(
                f"high_freq_factor = {self.high_freq_factor} is not above "
                f"low_freq_factor = {self.low_freq_factor}"
            )
        return self

    def given(self) -> dict[str, Any]:
        """Return the keys that are set, in Hugging Face's format."""
        return self.model_dump(exclude_none=True)

    def _is_ordered(self) -> bool:
        low, high = self.low_freq_factor, self.high_freq_factor
        return low is not None and high is not None and low < high


class ModelConfig(Section):
    """Llama model. Field names are those of Hugging Face's LlamaConfig."""

    num_hidden_layers: Annotated[Count, Field(le=10_000)]
    """Number of layers. The limit bounds tables with one row per layer."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads per layer; a multiple of `num_key_value_heads`."""
    num_key_value_heads: Count = Field(default_factory=lambda seen: seen["num_attention_heads"])
    """Key/value heads per layer: fewer than `num_attention_heads` is grouped-query attention, 1 is
    multi-query attention. Default: `num_attention_heads`."""
    head_dim: Count = Field(
        default_factory=lambda seen: seen["hidden_size"] // seen["num_attention_heads"]
    )
    """Width of a head, even. Default: `hidden_size` / `num_attention_heads`."""
    intermediate_size: Count
    """Width of the feed-forward network (SwiGLU: three matrices)."""
    vocab_size: Count
    """Rows of the embedding and of the head, at least as many as the tokenizer has tokens. Padding
    for tensor parallelism is added internally."""
    max_position_embeddings: Count = 2048
    """Maximum sequence length, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Rotary scaling for sequences longer than those of the first training."""
    rms_norm_eps: float = Field(default=1e-5, ge=0)
    """Epsilon added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = False
    """Share one matrix between the embedding and the head."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights. For o_proj and down_proj it is divided by
    sqrt(2 num_hidden_layers), as in Megatron-LM."""
