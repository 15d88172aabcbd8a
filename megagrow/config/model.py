"""Model section: family, layer types and sizes of a model, and its rotary position scaling."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megagrow.config.sections import Count, CountOrZero, Section

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


ModelType = Literal["llama", "mistral", "qwen2", "qwen3", "olmo2", "samba"]

LayerTypeName = Literal["full_attention", "sliding_attention", "mamba"]

QKNorm = Literal["per_head", "full_width"]

_LLAMA: dict[str, Any] = {"attention_bias": False, "qk_norm": None, "norm_position": "pre"}

_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": "per_head"},
    "olmo2": {"qk_norm": "full_width", "norm_position": "post"},
}
"""Features by `model_type`, where they differ from those of `llama`."""

FEATURE_KEYS = ("layer_types", *_LLAMA)
"""Keys that select the blocks of a layer and their parameters."""

MAMBA_KEYS = ("mamba_d_inner", "mamba_d_state", "mamba_d_conv", "mamba_dt_rank")

MOST_LAYERS = 10_000


def family_features(model_type: str) -> dict[str, Any]:
    """Return the values of `FEATURE_KEYS` without `layer_types` that a family has by default, and
    that Hugging Face's class of it always has."""
    return _LLAMA | _FAMILIES.get(model_type, {})


def _of_family(key: str) -> Any:
    """Return a field whose default depends on `model_type`."""
    return Field(default_factory=lambda seen: family_features(seen["model_type"])[key])


def _default_layer_types(seen: dict[str, Any]) -> list[LayerTypeName]:
    attention: LayerTypeName = "sliding_attention" if seen["sliding_window"] else "full_attention"
    return ["mamba", attention] if seen["model_type"] == "samba" else [attention]


def _of_mamba(size: Callable[[int], int]) -> Any:
    """Return a size of Mamba layers: by default `size(hidden_size)`, None without such layers."""
    return Field(
        default_factory=lambda seen: (
            size(seen["hidden_size"]) if "mamba" in seen["layer_types"] else None
        )
    )


_FUNCTION_KEYS = ("rope_theta", "rope_scaling", "sliding_window")

WEIGHTLESS_KEYS = (*_FUNCTION_KEYS, "max_position_embeddings", "initializer_range")
"""Keys on which no weight depends: they may change between any two stages."""


class ModelConfig(Section):
    """Model: embedding, decoder layers, final norm, head. A layer is a mixer of its type (attention
    or Mamba) and a SwiGLU feed-forward block, each with an RMSNorm. Field names are those of
    Hugging Face's configurations; `mamba_*` are those of Jamba."""

    model_type: ModelType = "llama"
    """Family: it selects the names of imports and exports, and the defaults of `layer_types`,
    `attention_bias`, `qk_norm` and `norm_position`. Biases for `qwen2`, query and key norms for
    `qwen3` and `olmo2`, norms after the blocks for `olmo2`, Mamba alternating with attention for
    `samba`."""
    num_hidden_layers: Annotated[CountOrZero, Field(le=MOST_LAYERS)]
    """Number of layers. With 0 the model is embedding, final norm and head: a base that grows by
    `random_depth`. The limit bounds tables with one row per layer."""
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
    sliding_window: Count | None = None
    """Tokens that a query of a `sliding_attention` layer attends to: itself and those before it.
    At most `max_position_embeddings`; null if no layer has this type."""
    layer_types: list[LayerTypeName] = Field(
        default_factory=_default_layer_types, min_length=1, validate_default=True
    )
    """Types of the layers: one entry per layer, or a period that is repeated. Default:
    `full_attention`, or `sliding_attention` if `sliding_window` is set; for `samba`, `mamba` before
    each of them."""
    attention_bias: bool = _of_family("attention_bias")
    """Add biases to the query, key and value projections, as in Qwen2."""
    qk_norm: QKNorm | None = _of_family("qk_norm")
    """RMSNorm of queries and keys: `per_head` over each head (Qwen3), `full_width` over all heads
    (OLMo 2); null for none."""
    norm_position: Literal["pre", "post"] = _of_family("norm_position")
    """`pre` normalizes the input of each block, `post` its output (OLMo 2)."""
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
    mamba_d_inner: Count | None = _of_mamba(lambda width: 2 * width)
    """Inner channels of Mamba layers. Default: 2 `hidden_size`, an expansion of 2; null without
    Mamba layers, as are the other `mamba_*` keys."""
    mamba_d_state: Count | None = _of_mamba(lambda width: 16)
    """State entries per channel of Mamba layers. Default: 16."""
    mamba_d_conv: Count | None = _of_mamba(lambda width: 4)
    """Taps of the causal convolution of Mamba layers. Default: 4."""
    mamba_dt_rank: Count | None = _of_mamba(lambda width: -(-width // 16))
    """Rank of the step-size projection of Mamba layers. Default: `hidden_size` / 16, rounded up."""

    @field_validator("layer_types")
    @classmethod
    def _shortest_period(
        cls, names: list[LayerTypeName], info: ValidationInfo
    ) -> list[LayerTypeName]:
        """Return the shortest period, so that equal models are equal in their configuration."""
        layers = info.data.get("num_hidden_layers")
        if layers is None:
            return list(names)
        if layers % len(names):
            raise ValueError(
                f"has {len(names)} entries, which do not divide num_hidden_layers = {layers}; "
                "list one type per layer or a period that fits"
            )
        sizes = (size for size in range(1, len(names) + 1) if len(names) % size == 0)
        return next(
            list(names[:size]) for size in sizes if names[:size] * (len(names) // size) == names
        )

    def layer_type(self, layer: int) -> LayerTypeName:
        """Return the type of a layer."""
        return self.layer_types[layer % len(self.layer_types)]

    @property
    def mamba_dynamics(self) -> int:
        """Return the outputs of x_proj in Mamba layers: the low-rank step size, B and C."""
        assert self.mamba_dt_rank is not None and self.mamba_d_state is not None
        return self.mamba_dt_rank + 2 * self.mamba_d_state


def same_function(source: ModelConfig, target: ModelConfig) -> bool:
    """Return True if no weightless key that changes the function differs between two models.

    `rope_scaling: dynamic` also depends on `max_position_embeddings`.
    """
    keys = [*_FUNCTION_KEYS]
    if source.rope_scaling is not None and source.rope_scaling.rope_type == "dynamic":
        keys.append("max_position_embeddings")
    return all(getattr(source, key) == getattr(target, key) for key in keys)
