"""Writing a resolved run as YAML."""

from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config.data import MEASUREMENTS
from megagrow.config.load import load_run, to_yaml
from megagrow.config.schema import OptimizerConfig, RunConfig


def test_loading_what_was_shown_gives_the_same_run(load_two, load, tmp_path: Path) -> None:
    run = load_two(
        "stages.1.growth.layer_map=[0,0,0,0,1,1,1,1]",
        "schedule.warmup_tokens=1.5K",
        "data.tokenizer=tok.model",
        "logging.peak_flops=989e12",
    )
    assert load(text=to_yaml(run)) == run


def test_everything_is_shown_and_tokens_are_readable(load) -> None:
    shown = yaml.safe_load(to_yaml(load()))
    assert list(shown) == [*RunConfig.model_fields, *MEASUREMENTS]
    assert list(shown["stages"][0]["optimizer"]) == list(OptimizerConfig.model_fields)
    assert shown["stages"][0]["tokens"] == "10K"
    assert shown["validation"]["tokens"] == "1M"
    assert shown["stages"][0]["schedule"]["warmup_tokens"] is None
    assert shown["stages"][0]["model"]["vocab_size"] == 64


@given(lr=st.floats(1e-12, 1e3), seed=st.integers(0, 2**40), tokens=st.integers(1, 10**15))
def test_numbers_survive(tmp_path_factory, lr: float, seed: int, tokens: int) -> None:
    run = RunConfig.model_validate(
        {
            "name": "t",
            "seed": seed,
            "output_dir": "o",
            "data": {"train": [{"path": "x"}], "sequence_length": 2},
            "stages": [
                {
                    "model": dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
                    | dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 2),
                    "tokens": tokens,
                    "batch": {"global_batch_size": 1, "micro_batch_size": 1},
                    "optimizer": {"lr": lr},
                }
            ],
        }
    )
    path = tmp_path_factory.mktemp("shown") / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(path) == run
