"""Loading run files: named sections, defaults of stages, overrides."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.config.growth import GrowthConfig
from megagrow.config.load import load_run, to_yaml
from megagrow.config.schema import ParallelConfig, RunConfig
from megagrow.errors import InputError

PART = "num_hidden_layers: 3\nhidden_size: 16\nnum_attention_heads: 4\nintermediate_size: 24\n"
NAMED = """
name: tiny
output_dir: out
data: {train: [{path: corpus}], sequence_length: 32}
model: small
tokens: 10K
batch: {global_batch_size: 8, micro_batch_size: 2}
optimizer: {lr: 1e-3}
"""


def test_the_top_is_the_only_stage_where_there_are_none(load) -> None:
    run = load()
    assert len(run.stages) == 1
    stage = run.stages[0]
    assert stage.tokens == 10_000
    assert stage.model.num_key_value_heads == 4
    assert stage.optimizer.lr == 1e-3
    assert stage.parallel == ParallelConfig()
    assert run.output_dir == Path("out")
    assert run.stages[0].data.train[0].path == Path("corpus")


def test_stages_take_the_top_as_their_defaults(load_two) -> None:
    first, second = load_two().stages
    assert (first.tokens, second.tokens) == (5_000, 20_000)
    assert (first.model.num_hidden_layers, second.model.num_hidden_layers) == (2, 8)
    assert first.optimizer == second.optimizer
    assert first.growth is None
    assert second.growth == GrowthConfig(operator=["direct_depth"])


def test_a_stage_changes_single_keys_of_a_default_section(load_two) -> None:
    first, second = load_two(
        "optimizer={lr: 1e-3, min_lr: 1e-5, eps: 1e-7}", "stages.1.optimizer.lr=5e-4"
    ).stages
    assert (first.optimizer.lr, first.optimizer.min_lr, first.optimizer.eps) == (1e-3, 1e-5, 1e-7)
    assert (second.optimizer.lr, second.optimizer.min_lr, second.optimizer.eps) == (
        5e-4,
        1e-5,
        1e-7,
    )


def test_a_stages_model_replaces_the_default_model_whole(load_two) -> None:
    first, second = load_two("model.rope_theta=500000", "stages.1.model.rope_theta=500000").stages
    assert first.model.rope_theta == second.model.rope_theta == 500_000.0
    with pytest.raises(InputError, match=r"'stages\.1\.model\.hidden_size' is missing"):
        load_two("stages.1.model={num_hidden_layers: 8}")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda run: run.seed == 7),
        ("tokens=1.5M", lambda run: run.stages[0].tokens == 1_500_000),
        ("tokens=1e6", lambda run: run.stages[0].tokens == 1_000_000),
        ("optimizer.lr=2e-3", lambda run: run.stages[0].optimizer.lr == 2e-3),
        ("optimizer.betas=[0.8, 0.9]", lambda run: run.stages[0].optimizer.betas == (0.8, 0.9)),
        ("parallel.zero_stage=3", lambda run: run.stages[0].parallel.zero_stage == 3),
        ("data.train.0.weight=2", lambda run: run.stages[0].data.train[0].weight == 2.0),
        ("data.train.0.path=a=b", lambda run: run.stages[0].data.train[0].path == Path("a=b")),
        ("data.tokenizer=", lambda run: run.data.tokenizer is None),
        ("logging.wandb_project=null", lambda run: run.logging.wandb_project is None),
    ],
)
def test_overrides(load, override: str, read: Callable) -> None:
    assert read(load(override))


def test_overrides_within_a_stage_and_their_order(load_two) -> None:
    layers = "stages.1.growth.layer_map=[0,0,0,0,1,1,1,1]"
    run = load_two("stages.1.tokens=1M", "stages.1.tokens=2M", layers)
    assert run.stages[1].tokens == 2_000_000
    assert run.stages[1].growth.layer_map == [0, 0, 0, 0, 1, 1, 1, 1]


def test_data_of_stages(load_two, tmp_path) -> None:
    """The top's keys are defaults of all stages; a stage's corpora replace the default ones."""
    run = load_two("stages.1.data={train: [a, {path: b, weight: 2}]}")
    first, second = (stage.data for stage in run.stages)
    assert (first.sequence_length, second.sequence_length) == (32, 32)
    assert [str(corpus.path) for corpus in (*first.train, *second.train)] == ["corpus", "a", "b"]
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(run))
    assert load_run(written) == run
    assert RunConfig.model_validate(run.model_dump()) == run
    with pytest.raises(InputError, match=r"'stages\.1\.data\.train\.0\.path' is missing"):
        load_two("stages.1.data={train: [{weight: 2}]}")
    with pytest.raises(InputError, match=r"unknown key 'stages\.0\.data\.validation'"):
        load_two("stages.0.data={validation: x}")
    with pytest.raises(InputError, match=r"set stages\.0\.data\.train\.0\.path or stages\.1"):
        load_two(*(f"stages.{i}.data={{train: x}}" for i in (0, 1)), "data.train.0.path=y")


def test_a_part_by_name(load, write_part) -> None:
    write_part("model/small", PART + "vocab_size: 64\n")
    assert load(text=NAMED).stages[0].model.num_hidden_layers == 3


def test_parts_are_also_found_under_configs_and_in_folders_above(tmp_path, write_part) -> None:
    write_part("configs/model/small", PART + "vocab_size: 64\n")
    path = write_part("runs/today/run", NAMED)
    assert load_run(path).stages[0].model.num_hidden_layers == 3


def test_the_nearest_part_wins(write_part) -> None:
    write_part("configs/model/small", PART + "vocab_size: 64\n")
    write_part("runs/model/small", PART.replace("3", "5") + "vocab_size: 64\n")
    path = write_part("runs/run", NAMED)
    assert load_run(path).stages[0].model.num_hidden_layers == 5


def test_the_checkouts_parts_are_found_from_anywhere(load) -> None:
    model = load(text=NAMED.replace("small", "llama-1.1b")).stages[0].model
    assert (model.num_hidden_layers, model.hidden_size) == (24, 2048)


def test_a_base_with_changes(load, write_part) -> None:
    write_part("model/small", PART + "vocab_size: 64\n")
    text = NAMED.replace("model: small", "model: {base: small, num_hidden_layers: 6}")
    model = load(text=text).stages[0].model
    assert (model.num_hidden_layers, model.hidden_size, model.vocab_size) == (6, 16, 64)


def test_a_part_may_build_on_a_part(load, write_part) -> None:
    write_part("model/smaller", PART + "vocab_size: 64\n")
    write_part("model/small", "base: smaller\nvocab_size: 128\n")
    model = load(text=NAMED).stages[0].model
    assert (model.num_hidden_layers, model.vocab_size) == (3, 128)


def test_overrides_reach_into_parts_and_name_them(load, write_part) -> None:
    write_part("model/small", PART + "vocab_size: 64\n")
    write_part("model/other", PART + "vocab_size: 256\n")
    write_part("data/mix", "train: [{path: a}, {path: b}]\nsequence_length: 16\n")
    text = NAMED.replace("data: {train: [{path: corpus}], sequence_length: 32}", "data: mix")
    run = load("data.train.1.path=c", "model=other", "model.vocab_size=512", text=text)
    assert [str(corpus.path) for corpus in run.stages[0].data.train] == ["a", "c"]
    assert run.stages[0].model.vocab_size == 512


def test_a_parts_section_is_merged_into_a_stages_defaults(load_two, write_part) -> None:
    write_part("optimizer/late", "min_lr: 1e-6\n")
    first, second = load_two("stages.1.optimizer=late").stages
    assert (first.optimizer.min_lr, second.optimizer.min_lr) == (0.0, 1e-6)
    assert second.optimizer.lr == 1e-3


def test_numbers_that_yaml_reads_as_text(load) -> None:
    run = load("optimizer.eps=1e-6", "optimizer.weight_decay=1e-1", "logging.peak_flops=989e12")
    assert run.stages[0].optimizer.eps == 1e-6
    assert run.stages[0].optimizer.weight_decay == 0.1
    assert run.logging.peak_flops == 989e12


def test_the_run_can_not_be_changed_afterwards(load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3


def test_merge_keys_are_no_duplicates(load) -> None:
    text = """
name: tiny
output_dir: out
data: {train: [{path: a}], sequence_length: 32}
model: llama-410m
tokens: 10K
batch: {global_batch_size: 8, micro_batch_size: 2}
stages:
  - optimizer: {<<: &late {<<: {lr: 1e-3, eps: 1e-6}, lr: 2e-3}, lr: 3e-3}
  - {optimizer: *late, growth: {}}
"""
    first, second = load(text=text).stages
    assert (first.optimizer.lr, first.optimizer.eps) == (3e-3, 1e-6)
    assert (second.optimizer.lr, second.optimizer.eps) == (2e-3, 1e-6)


@pytest.mark.parametrize("written", ["corpus", "corpus.bin", "[corpus]", "[{path: corpus.idx}]"])
def test_corpora_are_given_as_paths(load, write_part, written: str) -> None:
    write_part("model/small", PART + "vocab_size: 64\n")
    text = NAMED.replace("[{path: corpus}]", written)
    assert load(text=text).data == load(text=NAMED).data


def test_gstack_is_direct_depth(load_two) -> None:
    for override in ("gstack", "[gstack]"):
        run = load_two(f"stages.1.growth.operator={override}")
        assert run.stages[1].growth.operator == ["direct_depth"]
