"""Run files with a base and with hardware profiles."""

import re

import pytest

from megagrow.errors import ConfigError
from tests.config.conftest import ONE_STAGE, SECOND_STAGE

OFFER = "parallel: {zero_stage: 2, activation_checkpointing: full}\nbatch: {micro_batch_size: 4}\n"


def test_a_run_file_builds_on_another(load, write_part) -> None:
    write_part("first", ONE_STAGE)
    run = load(text="base: first\nname: second\noptimizer: {min_lr: 1e-5}\ntokens: 20K\n")
    assert (run.name, run.output_dir.name, run.stages[0].tokens) == ("second", "out", 20_000)
    assert (run.stages[0].optimizer.lr, run.stages[0].optimizer.min_lr) == (1e-3, 1e-5)


def test_on_one_that_builds_on_another_and_in_the_folders_above(load, write_part) -> None:
    write_part("configs/first", ONE_STAGE)
    write_part("configs/own/second", "base: first\nseed: 5\noptimizer: {eps: 1e-6}\n")
    write_part("third", "base: own/second\noptimizer: {min_lr: 1e-5}\n")
    run = load(text="base: third\nname: last\n")
    rate = run.stages[0].optimizer
    assert (run.name, run.seed, rate.lr, rate.min_lr, rate.eps) == ("last", 5, 1e-3, 1e-5, 1e-6)


def test_stages_replace_those_of_the_base(load, write_part) -> None:
    write_part("first", ONE_STAGE + SECOND_STAGE)
    run = load(text="base: first\nstages: [{tokens: 7K}]\n")
    assert [stage.tokens for stage in run.stages] == [7_000]
    assert run.stages[0].model.num_hidden_layers == 2


def test_a_mapping_changes_single_stages_of_the_base(load, write_part) -> None:
    write_part("first", ONE_STAGE + SECOND_STAGE)
    base = load(text="base: first\n")
    run = load(text="base: first\nstages: {1: {tokens: 7K, optimizer: {min_lr: 1e-5}}}\n")
    assert run.stages[0] == base.stages[0] and run.stages[1].tokens == 7_000
    assert run.stages[1].growth == base.stages[1].growth
    assert run.stages[1].optimizer == base.stages[1].optimizer.model_copy(update={"min_lr": 1e-5})
    write_part("second", "base: first\nstages: {0: {tokens: 3K}}\n")
    both = load(text="base: second\nstages: {1: {at_tokens: 9K}}\n").stages
    assert [(stage.tokens, stage.at_tokens) for stage in both] == [
        (3_000, None),
        (5_928, 9_000),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: first\nstages: {2: {}}\n", "'stages.2' does not exist; the base has 0, 1"),
        ("base: first\nstages: {last: {}}\n", "'stages.last' does not exist; the base has 0, 1"),
        ("base: first\nstages: {1: 5}\n", "'stages.1' is not a mapping"),
        ("base: first\nstages: {1: {tokns: 5}}\n", "unknown key 'stages.1.tokns'"),
        ("base: first\nseed: 1\nstages: {1: {model: none}}\n", "'stages.1.model' = 'none'"),
        ("base: flat\nstages: {0: {}}\n", "'stages.0' does not exist; no base has a list of"),
        (ONE_STAGE + "stages: {0: {}}\n", "'stages.0' does not exist; no base has a list of"),
    ],
)
def test_a_mapping_of_stages_that_changes_nothing(load, write_part, text, message) -> None:
    write_part("first", ONE_STAGE + SECOND_STAGE)
    write_part("flat", ONE_STAGE)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(text=text)


def test_a_section_by_name_replaces_that_of_the_base(load, write_part) -> None:
    write_part("first", ONE_STAGE.replace("vocab_size: 64", "vocab_size: 64\n  rope_theta: 5e5"))
    write_part(
        "model/other",
        "{num_hidden_layers: 4, hidden_size: 8, num_attention_heads: 2, intermediate_size: 8, "
        "vocab_size: 32}",
    )
    for named in ("model: other", "model: {base: other, vocab_size: 32}"):
        model = load(text=f"base: first\n{named}\n").stages[0].model
        assert (model.num_hidden_layers, model.vocab_size, model.rope_theta) == (4, 32, 1e4)
    changed = load(text="base: first\nmodel: {vocab_size: 32}\n").stages[0].model
    assert (changed.num_hidden_layers, changed.vocab_size, changed.rope_theta) == (2, 32, 5e5)


def test_a_profile_lies_on_the_base_and_below_the_files_own_keys(load, write_part) -> None:
    write_part("first", ONE_STAGE + "parallel: {zero_stage: 3}\n")
    write_part("hardware/small", OFFER)
    own = "base: first\nhardware: small\nbatch: {global_batch_size: 16}\nkernels: {loss: torch}\n"
    stage = load(text=own).stages[0]
    assert (stage.parallel.zero_stage, stage.parallel.activation_checkpointing) == (2, "full")
    assert (stage.batch.global_batch_size, stage.batch.micro_batch_size) == (16, 4)
    nearer = load(text=own + "parallel: {zero_stage: 1}\n").stages[0].parallel
    assert (nearer.zero_stage, nearer.activation_checkpointing) == (1, "full")


def test_a_profile_of_the_command_line_wins_in_every_stage(load_two, write_part) -> None:
    write_part("hardware/small", "base: smaller\nbatch: {micro_batch_size: 4}\n")
    write_part("hardware/smaller", "parallel: {zero_stage: 2}\nbatch: {micro_batch_size: 1}\n")
    own = ("parallel.zero_stage=3", "stages.1.parallel={zero_stage: 0}")
    run = load_two(*own, "hardware=small")
    assert [stage.parallel.zero_stage for stage in run.stages] == [2, 2]
    assert [stage.batch.micro_batch_size for stage in run.stages] == [4, 4]
    assert {stage.batch.global_batch_size for stage in run.stages} == {8}
    later = load_two(*own, "hardware=small", "batch.micro_batch_size=2")
    assert later.stages[0].batch.micro_batch_size == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: frist\n", "'base' = 'frist': frist.yaml not found; did you mean 'first'"),
        ("base: first.yaml\n", "first.yaml.yaml not found; did you mean 'first'"),
        ("base: run\n", "'base' includes itself: run -> run"),
        ("base: round\n", "round.yaml: 'base' includes itself: run -> round -> run"),
        ("base: first\nhardwear: small\n", "unknown key 'hardwear'; did you mean 'hardware'"),
        ("base: broken\n", "broken.yaml: unknown key 'tokns'; did you mean 'tokens'"),
        ("base: first\nhardware: smal\n", "hardware/smal.yaml not found; did you mean 'small'"),
        ("base: first\nhardware: {zero_stage: 1}\n", "'hardware' is not the name of a file"),
        ("base: first\nhardware: rates\n", "rates.yaml: unknown key 'optimizer'"),
        (
            "base: two\ntokens: 1K\n",
            "run.yaml: tokens: has no effect, all stages set their own; set stages.0.tokens or "
            "stages.1.tokens",
        ),
    ],
)
def test_what_is_refused(refusal, write_part, text: str, message: str) -> None:
    write_part("first", ONE_STAGE)
    write_part("two", ONE_STAGE + SECOND_STAGE)
    write_part("round", "base: run\n")
    write_part("broken", "tokns: 5\n")
    write_part("hardware/small", OFFER)
    write_part("hardware/rates", "optimizer: {lr: 1}\n")
    assert message in refusal(text=text)


def test_a_base_cannot_be_set_on_the_command_line(refusal) -> None:
    assert "use the other run file on the command line" in refusal(["base=other"])
