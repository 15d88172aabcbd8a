"""Signals: the first one is noted, echoes of it are ignored, a later one interrupts."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import megagrow.train.fault_tolerance.signals
from megagrow.train.fault_tolerance.signals import SAME_REQUEST_SECONDS, StopSignal
from tests.helpers.source_tree import ROOT


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


def test_a_line_on_a_terminal_does_not_continue_the_live_line(clock: Clock) -> None:
    terminal, stdout = os.openpty()
    before = os.dup(1)
    try:
        os.dup2(stdout, 1)
        with StopSignal(announce=True):
            signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(before, 1)
    shown = os.read(terminal, 200)
    for descriptor in (before, stdout, terminal):
        os.close(descriptor)
    assert shown.startswith(b"\r\n2026-01-02 03:04:05 | SIGINT received")


def test_a_file_that_has_the_descriptor_of_a_closed_stdout_is_unchanged(tmp_path: Path) -> None:
    program = f"""
import os, signal
from megagrow.train.fault_tolerance.signals import StopSignal
file = os.open({str(tmp_path / "metrics")!r}, os.O_CREAT | os.O_WRONLY)
os.dup2(file, 1)
with StopSignal(announce=True):
    signal.raise_signal(signal.SIGINT)
"""
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} >&-"
    subprocess.run(command, shell=True, cwd=ROOT, check=True)
    assert (tmp_path / "metrics").read_text() == ""
