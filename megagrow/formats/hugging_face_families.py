"""Model families of transformers: class, defaults and layer types of each `model_type`.

The reference is the configuration and the model class of a family in transformers. Biases, norms of
queries and keys, and the position of norms follow from the class (`config.model.family_features`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megagrow.config.model import MOST_LAYERS, LayerTypeName, family_features
from megagrow.config.schema import ModelConfig

Values = Mapping[str, Any]
"""Keys of a config.json."""

_FULL: LayerTypeName = "full_attention"
_SLIDING: LayerTypeName = "sliding_attention"

_WINDOW = 4096
"""Default of `sliding_window` in the classes that have it."""

_FULL_LAYERS = 28
"""Default of `max_window_layers`: layers below it have no window."""

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""LlamaConfig's defaults of keys that may be absent in config.json."""


def _unused_window(config: Values) -> Any:
    return None if config.get("use_sliding_window") is False else config.get("sliding_window")


def _window(config: Values) -> Any:
    return config.get("sliding_window", _WINDOW)


def _optional_window(config: Values) -> Any:
    return _window(config) if config.get("use_sliding_window") else None


def _no_keys(model: ModelConfig) -> dict[str, Any]:
    return {}


def _window_key(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window}


def _layer_keys(model: ModelConfig) -> dict[str, Any]:
    """Return `layer_types`, and the keys from which older versions of transformers derive it."""
    types = [model.layer_type(layer) for layer in range(model.num_hidden_layers)]
    below = {"max_window_layers": types.index(_SLIDING)} if _SLIDING in types else {}
    window = model.sliding_window
    return {
        "layer_types": types,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        **below,
    }


@dataclass(frozen=True, kw_only=True)
class Family:
    """Classes of one `model_type` in transformers."""

    architecture: str
    """Name of the model class."""
    defaults: Values = field(default_factory=dict)
    """Defaults of the configuration class that differ from LlamaConfig's."""
    constants: Values = field(default_factory=dict)
    """Further keys of an exported config.json."""
    windowed: tuple[LayerTypeName, ...] = (_FULL,)
    """Types of layers that a model with a window can have; others have full attention only."""
    window: Callable[[Values], Any] = _unused_window
    """Return the window of a config.json, None without one."""
    window_keys: Callable[[ModelConfig], dict[str, Any]] = _no_keys
    """Return the keys that write layer types and window of a model."""

    def default(self, key: str) -> Any:
        """Return the default of one of `READ_KEYS`."""
        return self.defaults.get(key, _DEFAULTS[key])

    def possible_types(self, window: Any) -> tuple[LayerTypeName, ...]:
        """Return the types of layers that a model with this window can have."""
        return (_FULL,) if window is None else self.windowed

    def layer_types(self, config: Values) -> list[Any]:
        """Return the types of all layers, or a period of them, of a valid config.json."""
        if given := config.get("layer_types"):
            return list(given)
        first, *others = self.possible_types(self.window(config))
        if not others:
            return [first]
        layers, below = config.get("num_hidden_layers"), config.get("max_window_layers")
        count = min(layers, MOST_LAYERS) if isinstance(layers, int) else 0
        below = _FULL_LAYERS if below is None else below
        if layers == 0:
            return list(others)  # those with the window
        return [first if layer < below else others[0] for layer in range(count)]

    def unsupported(self, config: Values) -> Iterator[tuple[str, str]]:
        """Yield the window keys of a config.json that the class or ModelConfig does not support,
        with the supported value."""
        window = self.window(config)
        types = self.possible_types(window)
        if window and types == (_FULL,):
            yield "sliding_window", "null"
        given = config.get("layer_types") or []
        if not isinstance(given, list) or any(name not in types for name in given):
            yield "layer_types", " or ".join(map(repr, types))
        if type(config.get("max_window_layers") or 0) is not int:
            yield "max_window_layers", "an integer"


READ_KEYS = tuple(_DEFAULTS)
"""Keys of config.json with a default in the class of every family."""

_QWEN: Values = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_NO_BIAS: Values = {"attention_bias": False}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", constants={**_NO_BIAS, "mlp_bias": False}),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        windowed=(_SLIDING,),
        window=_window,
        window_keys=_window_key,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        windowed=(_FULL, _SLIDING),
        window=_optional_window,
        window_keys=_layer_keys,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "head_dim": 128},
        constants=_NO_BIAS,
        windowed=(_FULL, _SLIDING),
        window=_optional_window,
        window_keys=_layer_keys,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM", defaults={"rms_norm_eps": 1e-5}, constants=_NO_BIAS
    ),
}
"""Families that are imported and exported, by `model_type`."""


def other_feature(model: ModelConfig, name: str) -> str | None:
    """Return the first feature key of a model whose value the class of a family does not have."""
    for key, value in family_features(name).items():
        if getattr(model, key) != value:
            return key
    types = FAMILIES[name].possible_types(model.sliding_window)
    return None if set(model.layer_types) <= set(types) else "layer_types"


def export_problems(model: ModelConfig) -> Iterator[str]:
    """Yield a problem if the class of the model's family cannot compute its function."""
    name = model.model_type
    fitting = [other for other in FAMILIES if other_feature(model, other) is None]
    fix = f"model_type = {fitting[0]} fits" if fitting else "no class of transformers fits"
    if name not in FAMILIES:
        fix = fix if fitting else "keep the model as a checkpoint"
        yield f"model.model_type = {name}: transformers has no class of this family; {fix}"
    elif key := other_feature(model, name):
        architecture = FAMILIES[name].architecture
        yield f"model.{key} = {getattr(model, key)} is not supported by {architecture}; {fix}"
