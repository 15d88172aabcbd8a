"""Error messages for invalid run files and overrides."""

from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.errors import InputError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("oputput_dir: x", "run.yaml: unknown key 'oputput_dir'; did you mean 'output_dir'?"),
        ("lr: 1e-3", "run.yaml: unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("learning_rate: 1", "run.yaml: unknown key 'learning_rate'; did you mean 'optimizer.lr'?"),
        ("growth: {}", "run.yaml: unknown key 'growth'; did you mean 'stages.N.growth'?"),
        (
            "parallel: {tp: 2}",
            "run.yaml: unknown key 'parallel.tp'; "
            "did you mean 'parallel.tensor_model_parallel_size'?",
        ),
        (
            "deepspeed: {zero_optimization: {stage: 2}, fp16: {enabled: true}}",
            "run.yaml: unknown key 'deepspeed.zero_optimization.stage'; set "
            "'parallel.zero_stage' instead; unknown key 'deepspeed.fp16'; set 'precision' instead",
        ),
        (
            "deepspeed: {zero_optimization: {sub_group_sise: 2}}",
            "run.yaml: unknown key 'deepspeed.zero_optimization.sub_group_sise'; did you mean "
            "'deepspeed.zero_optimization.sub_group_size'?",
        ),
        (
            "schedule: {warmup_step: 3}",
            "run.yaml: unknown key 'schedule.warmup_step'; did you mean 'schedule.warmup_steps'?",
        ),
        (
            "stages: [{}, {optimizer: {larning_rate: 1}}]",
            "run.yaml: unknown key 'stages.1.optimizer.larning_rate'; "
            "did you mean 'stages.1.optimizer.lr'?",
        ),
        (
            "checkpoint: {xyzzy: 1}",
            "run.yaml: unknown key 'checkpoint.xyzzy'; allowed here: interval, keep_last, "
            "keep_every, keep_before_growth, background",
        ),
        (
            "logging: {base: x, 3: y}",
            "run.yaml: unknown key 'logging.base'; allowed here: interval, tensorboard, "
            "wandb_project, wandb_group, wandb_tags, peak_flops, profile; unknown key "
            "'logging.3'; allowed here: interval, tensorboard, wandb_project, wandb_group, "
            "wandb_tags, peak_flops, profile",
        ),
    ],
)
def test_unknown_keys(refusal, line: str, message: str) -> None:
    assert refusal(text=line) == message


def test_an_unknown_key_in_a_list(refusal) -> None:
    message = refusal(text="data: {train: [{path: a}, {pth: b}]}")
    assert message == "run.yaml: unknown key 'data.train.1.pth'; did you mean 'data.train.1.path'?"


def test_an_unknown_key_in_a_part_names_the_parts_file(refusal, write_part) -> None:
    write_part("optimizer/fast", "larning_rate: 1\n")
    message = refusal(["optimizer=fast"])
    assert message == "optimizer/fast.yaml: unknown key 'larning_rate'; did you mean 'lr'?"


def test_an_unknown_key_in_an_override(refusal) -> None:
    assert refusal(["optimizer.larning_rate=1"]) == (
        "--set optimizer.larning_rate=1: unknown key 'optimizer.larning_rate'; "
        "did you mean 'optimizer.lr'?"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "--set optimizer.lr: not an override; use path.to.key=value"),
        ("=3", "--set =3: not an override; use path.to.key=value"),
        ("optimizer..lr=3", "--set optimizer..lr=3: not an override; use path.to.key=value"),
        ("stages.0.tokens=1", "--set stages.0.tokens=1: 'stages' is not a list"),
        (
            "data.train.1.path=x",
            "--set data.train.1.path=x: 'data.train' has no index '1'; it has 1 entries, counted "
            "from 0",
        ),
        (
            "data.train.path=x",
            "--set data.train.path=x: 'data.train' has no index 'path'; it has 1 entries, counted "
            "from 0",
        ),
        (
            "model.base=x",
            "--set model.base=x: base cannot be overridden; use --set model=NAME",
        ),
        ("model=[1", "--set model=[1, line 1: expected ',' or ']', but got '<stream end>'"),
        (
            "model=3",
            "--set model=3: 'model' is neither a mapping nor the name of a file in model/",
        ),
    ],
)
def test_overrides_that_can_not_be_followed(refusal, override: str, message: str) -> None:
    assert refusal([override]) == message


def test_an_override_that_would_do_nothing(load_two) -> None:
    with pytest.raises(InputError) as caught:
        load_two("tokens=1M")
    assert str(caught.value) == (
        "--set tokens=1M: has no effect, all stages set their own; "
        "set stages.0.tokens or stages.1.tokens"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "'optimizer.lr' = -1: should be greater than 0"),
        (
            "optimizer.lr=fast",
            "'optimizer.lr' = 'fast': should be a valid number",
        ),
        ("optimizer.lr=.inf", "'optimizer.lr' = inf: should be a finite number"),
        ("optimizer={}", "'optimizer.lr' is missing"),
        ("parallel.zero_stage=4", "'parallel.zero_stage' = 4: should be 0, 1, 2 or 3"),
        (
            "precision=fp16",
            "'precision' = 'fp16': should be 'auto', 'fp32' or 'bf16'",
        ),
        (
            "tokens=-3",
            "'tokens' = -3: should be a whole number of 0 or more, such as 2048, 2M or 1.5B",
        ),
        ("tokens=0", "'tokens' = 0: should be greater than 0"),
        ("tokens=1.5", "'tokens' = 1.5: is 1.5, which is not a whole number"),
        (
            "tokens=2X",
            "'tokens' = '2X': should be a whole number of 0 or more, such as 2048, 2M or 1.5B",
        ),
        (
            "batch.micro_batch_size=true",
            "'batch.micro_batch_size' = True: should be a whole number such as 2048, 2M or 1.5B",
        ),
        (
            "data.train=[]",
            "'data.train' = []: list should have at least 1 item after validation, not 0",
        ),
        (
            "data.train.0.weight=0",
            "'data.train.0.weight' = 0: should be greater than 0",
        ),
        ("name=3", "'name' = 3: should be a valid string"),
    ],
)
def test_wrong_values(refusal, override: str, message: str) -> None:
    assert refusal([override]) == f"run.yaml: {message}"


def test_of_many_values_the_closest_is_named(load_two) -> None:
    with pytest.raises(
        InputError, match="= 'direct-depth': not known; did you mean 'direct_depth'"
    ):
        load_two("stages.1.growth.operator=direct-depth")


def test_several_problems_stand_in_one_line(refusal) -> None:
    message = refusal(["optimizer.lr=-1", "parallel.zero_stage=4"])
    assert message.count(";") == 1
    assert "'optimizer.lr' = -1" in message
    assert "'parallel.zero_stage' = 4" in message


def test_a_missing_key_does_not_drag_others_along(refusal) -> None:
    model = "{num_hidden_layers: 2, hidden_size: 16, intermediate_size: 24, vocab_size: 64}"
    assert refusal([f"model={model}"]) == "run.yaml: 'model.num_attention_heads' is missing"


def test_a_default_of_all_stages_is_named_once_and_where_it_was_written(load_two) -> None:
    with pytest.raises(InputError) as caught:
        load_two("optimizer.lr=-1")
    assert str(caught.value).endswith("run.yaml: 'optimizer.lr' = -1: should be greater than 0")
    with pytest.raises(InputError) as caught:
        load_two("stages.1.optimizer.lr=-1")
    assert "'stages.1.optimizer.lr' = -1: should be greater than 0" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [x", "run.yaml, line 1: expected ',' or ']', but got '<stream end>'"),
        ("name: x\n\tseed: 3", "run.yaml, line 2: contains a tab; indent with spaces"),
        ("name: x\nseed: 1\nname: y", "run.yaml, line 3: duplicate key 'name'"),
        ("optimizer: {lr: 1, lr: 2}", "run.yaml, line 1: duplicate key 'lr'"),
        ("a: !!python/object:os.system {}", "run.yaml, line 1: a tag, tag:yaml.org,2002:python/o"),
        ("", "run.yaml: must contain a mapping of keys to values"),
        ("- a", "run.yaml: must contain a mapping of keys to values"),
        ("stages: 3", "run.yaml: 'stages' is not a list of stages"),
        ("stages: [3]", "run.yaml: 'stages.0' is not a mapping of keys to values"),
        ("optimizer:", "run.yaml: 'optimizer' is neither a mapping nor the name of a file in"),
        ("name: \x00", "run.yaml: unacceptable character #x0000"),
        ("{[1]: 2}", "run.yaml, line 1: found unhashable key"),
        ("a: 2020-13-45", "run.yaml: month must be in 1..12"),
    ],
)
def test_broken_files(refusal, text: str, message: str) -> None:
    assert refusal(text=text).startswith(message)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such file; see megagrow config ls"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a directory; give a run file"):
        load_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    with pytest.raises(InputError, match=r"latin\.yaml: not a UTF-8 text file \(byte 6\)"):
        load_run(tmp_path / "latin.yaml")


def test_an_unknown_part(refusal) -> None:
    assert refusal(["model=lama-1.1b"]) == (
        "--set model=lama-1.1b: 'model' = 'lama-1.1b': model/lama-1.1b.yaml not found; "
        "did you mean 'llama-1.1b'?"
    )


def test_a_part_of_a_section_that_has_none(refusal) -> None:
    message = refusal(text="schedule: slow")
    assert message.endswith("schedule/slow.yaml not found; no schedule/ contains any file")


def test_a_part_built_on_itself(refusal, write_part) -> None:
    write_part("model/a", "base: b\n")
    write_part("model/b", "base: a\n")
    message = refusal(text="stages: [{model: a}]")
    assert message == "run.yaml: 'stages.0.model' includes itself: a -> b -> a"


def test_cross_checks_are_errors_of_the_file(refusal) -> None:
    message = refusal(["parallel.tensor_model_parallel_size=3"])
    assert message.startswith(
        "run.yaml: stages.0.model.num_attention_heads = 4 is not divisible by"
    )
