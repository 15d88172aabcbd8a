"""Generation options of lm-eval's requests, with the meaning they have for its Hugging Face model.

An option that is not supported is refused, unless its value has no effect.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from megagrow.errors import ConfigError
from megagrow.evaluation.generation import GenerationDefaults, Sampling

DEFAULT_MAX_TOKENS = 256
"""Maximum number of generated tokens of tasks without one; lm-eval's default."""

DEFAULT_TOP_K = 50
"""`top_k` of transformers for sampling tasks without one."""

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length")
"""Names of a maximum number of tokens."""

_NO_EFFECT: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "typical_p": 1.0,
}
"""Values that leave generation unchanged, of options that are not supported."""

_BEAM_OPTIONS = ("early_stopping", "length_penalty")
"""Options that only beam search reads."""

_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Options that only sampling reads."""


class _Range(NamedTuple):
    holds: Callable[[float], bool]
    text: str


_ANY = _Range(lambda value: True, "a number")
_RANGES = {
    "temperature": _Range(lambda value: value > 0, "a number above 0"),
    "top_k": _Range(lambda value: value >= 0 and value == int(value), "an integer of at least 0"),
    "top_p": _Range(lambda value: value >= 0, "a number of at least 0"),
    "min_p": _Range(lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": _Range(lambda value: value > 0, "a number above 0"),
}


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one request."""

    max_tokens: int
    """Maximum number of generated tokens. The prompt is cut on the left to leave space for them."""
    max_length: int | None
    """Maximum number of tokens of prompt and text together; it then limits the generated tokens
    instead of `max_tokens`."""
    stop_strings: tuple[str, ...]
    sampling: Sampling
    warnings: tuple[str, ...] = ()
    """Options without effect."""


def read_options(
    given: Mapping[str, Any], eos: str, defaults: GenerationDefaults
) -> GenerationOptions:
    """Read the options of a request; `eos` is the text of the end-of-text token.

    Raises ConfigError if an option is not supported or has an invalid value.
    """
    given = {key: value for key, value in given.items() if value is not None}
    stops = _stop_strings(given.get("until", []))
    if not isinstance(given.get("do_sample", False), bool):
        raise ConfigError(f"do_sample = {given['do_sample']!r}: must be true or false")
    numbers = {key: _number(key, given[key]) for key in (*_LIMITS, "temperature") if key in given}
    for name in numbers.keys() & {*_LIMITS}:
        numbers[name] = int(numbers[name])
        if numbers[name] < 1:
            raise ConfigError(f"{name} = {given[name]!r}: must be at least 1 token")
    options: dict[str, Any] = dict(normalize_gen_kwargs({**given, **numbers}, DEFAULT_MAX_TOKENS))
    max_tokens, max_length = options.pop("max_gen_toks"), options.pop("max_length", None)
    options.pop("until")
    return GenerationOptions(
        max_tokens,
        max_length,
        tuple(handle_stop_sequences(stops, eos)),
        _sampling(options, defaults),
        tuple(_warnings(given, numbers, max_tokens)),
    )


def _warnings(
    given: Mapping[str, Any], numbers: Mapping[str, Any], max_tokens: int
) -> Iterator[str]:
    limits = {name: value for name, value in numbers.items() if name in _LIMITS[:-1]}
    if len(set(limits.values())) > 1:
        text = ", ".join(f"{name} = {value}" for name, value in limits.items())
        yield f"{text}: the limit of generated tokens is {max_tokens}"
    if "max_length" in numbers:
        yield f"max_length = {numbers['max_length']} limits prompt and text; prefer max_gen_toks"
    if given.get("do_sample") is False and numbers.get("temperature"):
        yield f"temperature = {numbers['temperature']} is ignored, because do_sample = false"


def _stop_strings(until: Any) -> list[str]:
    stops = until if isinstance(until, list) else [until]
    for stop in stops:
        if not isinstance(stop, str):
            raise ConfigError(f"until = {until!r}: must be a string or a list of strings")
    return list(stops)


def _sampling(options: dict[str, Any], defaults: GenerationDefaults) -> Sampling:
    samples = options.pop("do_sample")
    if samples and not options.get("temperature"):
        raise ConfigError(
            "do_sample = true without a temperature above 0; set temperature, or do_sample = false"
        )
    options = {"top_k": DEFAULT_TOP_K, **defaults.options, **options}
    ignored = _BEAM_OPTIONS if samples else (*_BEAM_OPTIONS, *_SAMPLING_OPTIONS)
    supported = {each.name for each in fields(Sampling)} - {"do_sample"}
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name in ignored or value is None or value == _NO_EFFECT.get(name):
            continue
        if name not in supported:
            raise ConfigError(
                f"generation option {name} = {value!r} is not supported; supported are until, "
                f"{', '.join((*_LIMITS, 'do_sample', *sorted(supported)))}"
            )
        values[name] = _number(name, value, _RANGES[name])
    values["top_k"] = int(values.get("top_k", 0))
    return Sampling(do_sample=samples, **values)


def _number(name: str, value: Any, allowed: _Range = _ANY) -> float:
    """Return the number that an option is."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not allowed.holds(number):
        raise ConfigError(f"{name} = {value!r}: must be {allowed.text}")
    return number
