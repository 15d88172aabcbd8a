"""Answers of the adapter equal those of lm-eval's Hugging Face model of the exported checkpoint."""

import pytest
from lm_eval.api.instance import Instance

pytest.importorskip(
    "accelerate", reason="lm-eval's Hugging Face model needs it: pip install lm-eval[hf]"
)

from tests.helpers.evaluation.comparing import answers, figures, ours, theirs, write_source
from tests.helpers.evaluation.folders import DATA
from tests.helpers.spawn import run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets in {DATA}"),
]

GREEDY = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
SAMPLED = {"max_gen_toks": 12, "temperature": 1.0, "top_k": 0}
CONTEXTS = ["He said that", "A much longer context, which stands beside it in the batch", "x"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Checkpoint, tokenizer, the answers of lm-eval's Hugging Face model, and samples of ours."""
    folder = tmp_path_factory.mktemp("evaluation")
    source = write_source(folder)
    model = theirs(folder, *source)
    expected = {**answers(model), "choices": model.loglikelihood(choice_requests())}
    texts = [model.generate_until([each])[0] for each in generation_requests(GREEDY)]
    assert any(texts) and not any("e" in text for text in texts)
    return source, expected, figures(model), texts, []


def generation_requests(options: dict) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, options), number)
        for number, context in enumerate(CONTEXTS)
    ]


def choice_requests() -> list[Instance]:
    """One-token and longer choices with one context, a repeated choice, and an empty context."""
    pairs = [("Is it so", choice) for choice in ("?", "!", ".", " that he", "!", " that")]
    pairs += [("", "He said"), ("He ", "said"), ("x" * 400, " y")]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def rank(source: tuple, tp: int) -> tuple:
    model = ours(*source, tp)
    chosen = model.loglikelihood(choice_requests())
    return (
        {**answers(model), "choices": chosen},
        figures(model),
        model.generate_until(generation_requests(GREEDY)),
        model.generate_until(generation_requests(SAMPLED)),
    )


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2), (2, 1)])
def test_answers_and_metrics_equal_those_of_lm_eval(case, world, tp):
    source, expected, metrics, texts, samples = case
    for found, own_metrics, written, sampled in run_ranks(world, rank, source, tp):
        assert written == texts
        samples.append(sampled)
        assert sampled == samples[0], "samples depend on the layout"
        for task, values in expected.items():
            assert len(found[task]) == len(values) > 0
            for one, other in zip(found[task], values, strict=True):
                if isinstance(other, tuple):
                    assert one[1] == other[1]
                    one, other = one[0], other[0]
                assert one == pytest.approx(other, abs=1e-4, rel=1e-6)
        for task, values in metrics.items():
            assert own_metrics[task] == pytest.approx(values, rel=1e-6)
