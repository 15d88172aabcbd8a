"""Signals: the first one is noted, echoes of it are ignored, a later one interrupts."""

import signal

import pytest

import megagrow.train.fault_tolerance.signals
from megagrow.train.fault_tolerance.signals import SAME_REQUEST_SECONDS, StopSignal


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "2026-01-02 03:04:05"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(megagrow.train.fault_tolerance.signals, "time", clock)
    return clock


NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted(clock: Clock, number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number.name


def test_what_the_launcher_passes_on_is_no_second_wish(clock: Clock) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        clock.now += SAME_REQUEST_SECONDS / 2
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGINT"


def test_a_later_signal_interrupts(clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(signal.SIGTERM)
        clock.now += SAME_REQUEST_SECONDS + 0.1
        signal.raise_signal(signal.SIGINT)


def test_afterwards_signals_are_what_they_were(clock: Clock) -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopSignal():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("later", NUMBERS)
def test_what_comes_after_a_warning_does_not_interrupt(clock: Clock, later: signal.Signals) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGUSR1)
        clock.now += SAME_REQUEST_SECONDS + 0.1
        signal.raise_signal(later)
        assert stop.received == "SIGUSR1"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_acknowledged_at_once(
    clock: Clock, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignal(announce=True):
        signal.raise_signal(number)
        signal.raise_signal(number)
        (line,) = capfd.readouterr().out.splitlines()
    expected = f"2026-01-02 03:04:05 | {number.name} received | stopping after this step"
    assert line.startswith(expected)
    assert ("Ctrl-C again" in line) == (number == signal.SIGINT)
