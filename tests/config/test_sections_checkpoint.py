"""`checkpoint.interval` is a number of steps or a time."""

import pytest

from megagrow.config.load import load_run, to_yaml
from tests.config.conftest import ONE_STAGE

STEPS_OR_TIME = "should be a number of steps such as 1000, or a time such as 90s, 30min or 2h"


@pytest.mark.parametrize(
    ("written", "interval", "seconds"),
    [
        ("500", 500, None),
        ("2K", 2000, None),
        ("5M", 5_000_000, None),
        ("90s", "90s", 90),
        ("30min", "30min", 1800),
        ("30 min", "30 min", 1800),
        ("1.5h", "1.5h", 5400),
    ],
)
def test_steps_and_times(load, tmp_path, written: str, interval: object, seconds: object) -> None:
    run = load(f"checkpoint.interval={written}")
    assert (run.checkpoint.interval, run.checkpoint.seconds) == (interval, seconds)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(run))
    assert load_run(again) == run


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("5m", "'5m': is ambiguous; write 5min for minutes or 5M for millions"),
        ("1.5 m", "'1.5 m': is ambiguous; write 1.5min for minutes or 1.5M for millions"),
        ("0min", "'0min': should be above 0"),
        ("0", "0: should be above 0"),
        ("-5min", f"'-5min': {STEPS_OR_TIME}"),
        ("1d", f"'1d': {STEPS_OR_TIME}"),
        ("2.5", f"2.5: {STEPS_OR_TIME}"),
        ("true", f"True: {STEPS_OR_TIME}"),
    ],
)
def test_refusals(refusal, written: str, message: str) -> None:
    said = refusal([f"checkpoint.interval={written}"])
    assert said == f"run.yaml: 'checkpoint.interval' = {message}"


def test_multiples_to_keep_need_an_interval_in_steps(refusal) -> None:
    said = refusal(text=ONE_STAGE + "checkpoint: {interval: 1h, keep_every: 5000}\n")
    assert said == (
        "run.yaml: checkpoint.keep_every = 5000 keeps multiples of a number of steps, but "
        "checkpoint.interval = 1h is a time; set checkpoint.interval to a number of steps or "
        "remove checkpoint.keep_every"
    )
