"""Options of generation requests and empty texts are those of lm-eval's Hugging Face model."""

import logging
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

pytest.importorskip(
    "accelerate", reason="lm-eval's Hugging Face model needs it: pip install lm-eval[hf]"
)

from lm_eval.models.huggingface import HFLM

from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.errors import ConfigError, DataError
from megagrow.evaluation.generation import GenerationDefaults, Sampling, TokenSampler
from megagrow.evaluation.lm import LMAdapter
from megagrow.evaluation.logprobs import ModelScorer
from megagrow.evaluation.model import LoadedModel, generation_defaults
from megagrow.evaluation.tokenizer import EvalTokenizer, open_tokenizer
from megagrow.formats.hugging_face_origin import HuggingFaceOrigin
from megagrow.model.decoder import CausalLM
from megagrow.parallel.process_groups import Topology
from tests.helpers.evaluation.small import sentences
from tests.helpers.hugging_face import hugging_face, tiny

WINDOW = 48
CONFIG = tiny(vocab_size=301, num_key_value_heads=2, max_position_embeddings=WINDOW)
CONTEXTS = ["ab", "ab de ik lno rst", " ".join(sentences(4)), "x </s> y"]
"""The third one exceeds the window."""


@cache
def tokenizer() -> EvalTokenizer:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_sentencepiece(sentences(60), 300, path)
        return open_tokenizer(str(path), CONFIG.vocab_size)


@cache
def theirs() -> HFLM:
    return HFLM(
        pretrained=hugging_face(CONFIG).eval(), tokenizer=tokenizer().tokenizer, batch_size=1
    )


def ours(batch: int = 3, **changes: Any) -> LMAdapter:
    model = CausalLM(CONFIG).eval()
    model.load_state_dict(hugging_face(CONFIG).state_dict())
    alone: Any = None  # process groups are used with several ranks only
    topology = Topology(0, 1, 1, alone, alone, torch.device("cpu"))
    defaults = changes.pop("defaults", GenerationDefaults())
    loaded = LoadedModel(model, tokenizer(), Path(), None, defaults)
    scorer = ModelScorer(loaded, topology)
    return LMAdapter(scorer, tokenizer(), topology, WINDOW, batch, defaults, **changes)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def generated(model: Any, options: dict[str, Any]) -> list[str]:
    asked = requests("generate_until", *((context, dict(options)) for context in CONTEXTS))
    return model.generate_until(asked, disable_tqdm=True)


ACCEPTED: dict[str, dict[str, Any]] = {
    "max_gen_toks": {"max_gen_toks": 9, "until": ["zzz"]},
    "max_new_tokens": {"max_new_tokens": 5},
    "max_tokens": {"max_tokens": 4},
    "max_completion_tokens": {"max_completion_tokens": 6},
    "priority": {"max_gen_toks": 3, "max_new_tokens": 5},
    "an absent limit": {"max_gen_toks": None, "max_tokens": "4"},
    "fraction": {"max_gen_toks": 4.7},
    "window": {"max_gen_toks": WINDOW - 1},
    "max_length": {"max_gen_toks": 4, "max_length": WINDOW},
    "string": {"max_gen_toks": 12, "until": "a"},
    "list": {"max_gen_toks": 12, "until": ["zz", "d", "t"]},
    "overlapping stops": {"max_gen_toks": 12, "until": ["ke", "k", "sd", "ds"]},
    "empty stop": {"max_gen_toks": 8, "until": [""]},
    "empty stop and another": {"max_gen_toks": 8, "until": ["", "t"]},
    "empty string": {"max_gen_toks": 8, "until": ""},
    "no stop": {"max_gen_toks": 4, "until": []},
    "eos": {"max_gen_toks": 4, "until": ["</s>", "t"]},
    "another special token": {"max_gen_toks": 8, "until": ["<unk>", "<s>"]},
    "no sampling": {"max_gen_toks": 4, "do_sample": False, "temperature": 0.7, "top_p": 0.9},
    "cold": {"max_gen_toks": 4, "temperature": 0.0, "top_k": 5, "num_beams": 1},
    "top_k": {"max_gen_toks": 6, "do_sample": True, "temperature": 2.0, "top_k": 1},
    "top_p": {"max_gen_toks": 6, "temperature": 2.0, "top_p": 1e-6},
    "min_p": {"max_gen_toks": 6, "temperature": 2.0, "min_p": 1.0, "top_p": 1.5},
    "repetition_penalty": {"max_gen_toks": 12, "repetition_penalty": 1.7},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_texts_are_those_of_lm_eval(case: str) -> None:
    expected = generated(theirs(), ACCEPTED[case])
    assert generated(ours(), ACCEPTED[case]) == expected
    assert any(expected)


def test_options_of_the_model_are_defaults_of_requests() -> None:
    """The third generated token ends a text if generation_config.json lists it."""
    options = {"max_gen_toks": 9}
    ids = [tokenizer().encode(text, special=False)[:3] for text in generated(ours(), options)]
    config = {"eos_token_id": [2, ids[0][2]], "repetition_penalty": 1.7, "foo": "not generation"}
    try:
        theirs().model.generation_config.update(**config)
        expected = generated(theirs(), options)
    finally:
        theirs().model.generation_config.update(eos_token_id=2, repetition_penalty=1.0)
    assert generated(ours(defaults=GenerationDefaults.of(config)), options) == expected
    assert expected != generated(theirs(), options)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, GenerationDefaults({}, frozenset({7}))),
        ({"eos_token_id": [8, 9], "top_p": 0.9, "do_sample": True, "max_length": 20},
         GenerationDefaults({"top_p": 0.9}, frozenset({8, 9}))),
        ({"temperature": 0.6, "cache_implementation": "static"},
         GenerationDefaults({"temperature": 0.6})),
    ],
)  # fmt: skip
def test_defaults_are_recorded_in_the_environment_of_a_source(
    generation: Any, expected: GenerationDefaults
) -> None:
    origin = HuggingFaceOrigin(config={"eos_token_id": 7, "top_k": 3}, generation_config=generation)
    source: Any = SimpleNamespace(environment=origin.as_environment())
    assert generation_defaults(source) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"max_gen_toks": 0}, "max_gen_toks = 0: must be at least 1"),
    "negative": ({"max_tokens": -1}, "max_tokens = -1: must be at least 1"),
    "window": ({"max_gen_toks": WINDOW}, "max_gen_toks = 48 is not less than the context length"),
    "default limit": ({}, "max_gen_toks = 256 is not less than the context length 48"),
    "max_length": (
        {"max_gen_toks": 4, "max_length": 2},
        "max_length = 2 for a prompt of 12 tokens and a context length of 48",
    ),
    "stop": ({"max_gen_toks": 4, "until": ["a", 5]}, "until = ['a', 5]: must be a string or"),
    "sampling": ({"max_gen_toks": 4, "do_sample": True}, "do_sample = true without a temp"),
    "temperature": (
        {"max_gen_toks": 4, "do_sample": True, "temperature": -0.5},
        "temperature = -0.5: must be a number above 0",
    ),
    "top_k": ({"max_gen_toks": 4, "temperature": 1, "top_k": -1}, "top_k = -1: must be an int"),
    "unknown": ({"max_gen_toks": 4, "foo": 3}, "generation option foo = 3 is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_lm_eval_does_not_accept_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        generated(ours(), options)
    assert message in str(error.value)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        generated(theirs(), options)


BEYOND = {
    "beams": ({"num_beams": 2}, "generation option num_beams = 2 is not supported"),
    "window": ({"max_length": WINDOW + 1}, "max_length = 49 for a prompt of"),
    "not a number": ({"temperature": "warm"}, "temperature = 'warm': must be a number"),
    "not a boolean": ({"do_sample": "true"}, "do_sample = 'true': must be true or false"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_other_options_are_refused_by_name(case: str) -> None:
    options, message = BEYOND[case]
    with pytest.raises(ConfigError) as error:
        generated(ours(), {"max_gen_toks": 4, **options})
    assert message in str(error.value)


def test_options_without_effect_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    options = ACCEPTED["priority"] | {"do_sample": False, "temperature": 0.7}
    with caplog.at_level(logging.WARNING, logger="megagrow.evaluation"):
        generated(ours(), options)
    assert caplog.messages == [
        "generation: max_gen_toks = 3, max_new_tokens = 5: the limit of generated tokens is 3",
        "generation: temperature = 0.7 is ignored, because do_sample = false",
    ]


PAIRS = [("ab", "c"), ("ab ", ""), ("", "ab"), ("", "</s>"), ("ab", "</s>"), ("e" * 90, " t")]
EMPTY = [("", ""), ("ab", ""), ("", "<s>"), (" ", "a")]


def test_log_likelihoods_are_those_of_lm_eval() -> None:
    asked = requests("loglikelihood", *PAIRS)
    expected = theirs().loglikelihood(asked, disable_tqdm=True)
    for (score, greedy), (other, same) in zip(ours().loglikelihood(asked), expected, strict=True):
        assert (greedy, score) == (same, pytest.approx(other, abs=1e-5))
    texts = requests("loglikelihood_rolling", *((text,) for text in ("", "ab", "</s>", "e" * 120)))
    assert ours().loglikelihood_rolling(texts) == pytest.approx(
        theirs().loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4
    )


@pytest.mark.parametrize("pair", EMPTY)
def test_texts_without_tokens_to_predict_are_refused(pair: tuple[str, str]) -> None:
    """Any answer would be the log-probability of a token of the context."""
    asked = requests("loglikelihood", pair)
    with pytest.raises(DataError, match="has no tokens to predict"):
        ours().loglikelihood(asked)
    with pytest.raises((AssertionError, IndexError)):
        theirs().loglikelihood(asked, disable_tqdm=True)


def test_samples_depend_on_the_seed_and_not_on_the_batch() -> None:
    options = {"max_gen_toks": 10, "temperature": 1.5, "top_p": 0.9}
    alone, batched = (generated(ours(batch), options) for batch in (1, 4))
    assert alone == batched
    for seed in (1, 1234 + 2**32):
        assert alone != generated(ours(seed=seed), options)
    repeated = requests("generate_until", *[("ab", options)] * 4)
    assert len(set(ours().generate_until(repeated))) == 4, "repetitions are equal"


def test_a_batch_may_mix_choices() -> None:
    """Each text gets its own choice, of its own logits."""
    prompts, least = [[5, 6], [7], [8, 9, 10]], lambda logits: int(logits.argmin())

    def chosen(*choices: Any) -> list[int]:
        return scorer.decode(prompts).next_tokens(choices)

    scorer = ours()._scorer
    most, fewest = chosen(None, None, None), chosen(least, least, least)
    assert not {*most} & {*fewest}
    assert chosen(least, None, least) == [fewest[0], most[1], fewest[2]]


def test_samples_have_the_filtered_distribution() -> None:
    """Top-k keeps four tokens of five, top-p three of these."""
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    sampler = TokenSampler(Sampling(True, temperature=0.5, top_k=4, top_p=0.85), seed=(0, 0))
    drawn = torch.tensor([sampler([0], (0.5 * probabilities.log())) for _ in range(4000)])
    found = drawn.bincount(minlength=5) / len(drawn)
    kept = torch.tensor([0.0, 0.4, 0.0, 0.25, 0.2])
    assert torch.equal(found == 0, kept == 0)
    assert (found - kept / kept.sum()).abs().max() < 0.03


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(True), Sampling(True, 0.8, top_k=2, top_p=0.9, min_p=0.1), Sampling(False, 1.0)],
)
def test_a_diverged_model_has_samples(sampling: Sampling, value: float) -> None:
    sample = TokenSampler(sampling, (0, 0))
    for logits in (torch.full((5,), value), torch.tensor([1.0, value, 2.0, 3.0, 0.0])):
        assert 0 <= sample([1, 2], logits) < 5
