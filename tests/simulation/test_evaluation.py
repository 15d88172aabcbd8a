"""A loaded model on the simulated device: nothing mixes host and device, and the host rarely waits.

The evaluation of a model in training is part of tests/simulation/test_rank.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig
from megagrow.evaluation.generation import Generation, GenerationDefaults, Sampling, generate
from megagrow.evaluation.likelihood import log_likelihoods
from megagrow.evaluation.logprobs import POSITIONS_AT_ONCE, ModelScorer
from megagrow.evaluation.model import LoadedModel, build_model
from megagrow.parallel.process_groups import make_topology
from megagrow.parallel.sharding import StateKind, parameter_plan
from megagrow.reshard.layout import Block, Layout
from megagrow.simulation import actions
from megagrow.simulation.isolated import isolated
from megagrow.simulation.rank import simulated_device
from megagrow.simulation.report import StageReport
from tests.helpers.runs import MODEL

CONFIG = ModelConfig.model_validate(MODEL | {"max_position_embeddings": 2 * POSITIONS_AT_ONCE})
LONG = "a continuation of more than one chunk of positions"
MIXED = "a greedy and a sampled text"
TEXTS = "generated texts"
LENGTHS = (3, 5)
SAMPLING = Sampling(True, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.1)


class Zeros(Source):
    """Model of zeros."""

    def read(self, name: str, kind: StateKind, block: Block) -> Tensor:
        return torch.zeros(len(block.rows), len(block.cols))


def zeros() -> Zeros:
    plan = parameter_plan(CONFIG, 1)
    return Zeros(path=Path(), model=CONFIG, layout=Layout(plan, (tuple(plan),), 0, 1, 1), files=())


def evaluate(tp: int) -> StageReport:
    with simulated_device(tp, tp - 1) as (device, recorder):
        topology = make_topology(tp, device)
        model = build_model(zeros(), topology, torch.bfloat16)
        unused: Any = None  # the tokenizer, which only stop strings need
        loaded = LoadedModel(model, unused, Path(), None, GenerationDefaults())
        actions.evaluate(loaded, topology, recorder)
        scorer = ModelScorer(loaded, topology)
        recorder.begin(LONG)
        log_likelihoods([([1], [2] * (POSITIONS_AT_ONCE + 1))], scorer, 2 * POSITIONS_AT_ONCE, 1)
        recorder.begin(MIXED)
        scorer.decode([[1, 2], [3]]).next_tokens([None, lambda logits: int(logits.argmax())])
        recorder.begin(TEXTS)
        texts = [
            Generation([1] * (row + 1), length, (), SAMPLING.sampler((0, row)))
            for row, length in enumerate(LENGTHS)
        ]
        generate(texts, scorer, unused, frozenset())
        assert tuple(len(text.tokens) for text in texts) == LENGTHS
        return recorder.report(topology)


@pytest.mark.parametrize("tp", [1, 2])
def test_waits_of_likelihoods_and_of_generated_tokens(tp: int) -> None:
    report = isolated(evaluate, tp)

    def waits(section: str) -> int:
        return sum(report.waits_in(section).values())

    assert {name: waits(name) for name in actions.SECTIONS} == {
        actions.LIKELIHOOD: 1,
        actions.PROMPT: 1,
        **dict.fromkeys(actions.TOKENS, 1),
        actions.TOKENS[1]: 2,  # the logits, then the tokens
        actions.FINISH: 0,
    }
    assert waits(LONG) == 1
    assert waits(MIXED) == 2
    assert waits(TEXTS) == 2 * max(LENGTHS)
