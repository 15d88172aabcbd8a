"""Models of transformers are trained and grown by a run, and loaded by transformers again."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.offline.convert import export_hugging_face
from megagrow.offline.request import Request
from tests.formats.test_round_trips import logits, own_logits
from tests.helpers.families import of_family
from tests.helpers.growth.cases import times
from tests.helpers.hugging_face import chat_folder
from tests.helpers.jobs import records, train, write_run
from tests.helpers.runs import STEP_TOKENS, make_run, parallel_of
from tests.offline.test_hugging_face_files import assert_complete

pytestmark = pytest.mark.dist

EXACT = 1e-5
STILL = {"lr": 1e-30, "weight_decay_on": "matrices"}
"""Updates that change no weight in fp32."""


def trained(folder: Path, source: Path, stages: list[dict[str, Any]]) -> RunConfig:
    """Train a run of two steps per stage on two ranks, from a Hugging Face folder."""
    stages = [{"tokens": 2 * STEP_TOKENS, **stage} for stage in stages]
    run = make_run(folder, stages, init_from=source)
    ended = train(write_run(folder / "run.yaml", run), 2).finish()
    assert ended.codes == [0, 0], ended.err
    return run


def exported(run: RunConfig, out: Path) -> Path:
    request = Request(source=run.output_dir, out=out, form="huggingface", memory="20MiB")
    export_hugging_face(request, Console(quiet=True))
    return out


def wider(model: ModelConfig) -> dict[str, Any]:
    """The stage of a model of twice the width, with all heads copied."""
    target = model.model_dump() | times(model, 2, 2, 2)
    return {"model": target, "growth": {"operator": "direct_width"}}


def with_silent_layers(model: ModelConfig) -> dict[str, Any]:
    """The stage of a model of twice the depth, whose new layers add nothing."""
    target = model.model_dump() | {"num_hidden_layers": 2 * model.num_hidden_layers}
    return {"model": target, "growth": {"operator": "zero_depth"}}


def test_a_qwen3_is_stacked_and_widened_by_a_run_and_loaded_by_transformers(tmp_path):
    model = of_family("qwen3", vocab_size=301, tie_word_embeddings=True)
    source = chat_folder(tmp_path / "qwen3", model)
    deeper = model.model_copy(update={"num_hidden_layers": 4})
    parallel = parallel_of(2, 1), parallel_of(1, 2, True), parallel_of(3, 2)
    stages = [
        {"model": model.model_dump()},
        {"model": deeper.model_dump(), "growth": {"operator": "direct_depth"}},
        wider(deeper),
    ]
    stages = [{**stage, "parallel": each} for stage, each in zip(stages, parallel, strict=True)]
    run = trained(tmp_path, source, stages)
    assert records(run, "growth", ["stage", "step"]) == [(1, 2), (2, 4)]
    out = exported(run, tmp_path / "out")
    theirs, found = logits(out)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert (theirs.config.num_hidden_layers, theirs.config.num_attention_heads) == (4, 8)
    last = run.output_dir / "checkpoints" / checkpoint_name(6)
    assert (found - own_logits(last)).abs().max() < EXACT
    assert_complete(out, source)


@pytest.mark.parametrize(
    ("name", "grown"),
    [*((name, wider) for name in ("qwen2", "qwen3", "olmo2")), ("olmo2", with_silent_layers)],
)
def test_a_larger_model_computes_the_function_of_the_original(tmp_path, name, grown):
    model = of_family(name, vocab_size=301)
    source = chat_folder(tmp_path / name, model)
    stages = [{"model": model.model_dump()}, grown(model)]
    stages = [{**stage, "optimizer": STILL, "parallel": parallel_of(1, 2)} for stage in stages]
    out = exported(trained(tmp_path, source, stages), tmp_path / "out")
    (theirs, found), (original, wanted) = logits(out), logits(source)
    assert theirs.num_parameters() > 1.4 * original.num_parameters()
    assert (found - wanted).abs().max() < EXACT
