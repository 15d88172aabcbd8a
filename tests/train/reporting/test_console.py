import logging
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megagrow.common.log_setup import configure_logging
from megagrow.train.reporting.console import Eta, LiveLine, Status, scientific

pytestmark = pytest.mark.usefixtures("restored_logging")

logger = logging.getLogger("megagrow.test")


def status(step: int, flops: float = 0.0, mfu: float | None = 0.4) -> Status:
    return Status(
        stage=1, stages=2, step=step, loss=3.14159, grad_norm=0.8321, lr=3e-4,
        tokens_per_second=12345.0, flops=flops or float(step), mfu=mfu,
    )  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_line(terminal: bool, clock: Clock, width: int = 100) -> tuple[LiveLine, StringIO]:
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False)
    configure_logging(console=console)
    return LiveLine(100, 100.0, console, clock=clock), out


@given(
    pace=st.floats(1e3, 1e18),
    done=st.floats(0.01, 0.9),
    seconds=st.lists(st.floats(0.1, 9), min_size=1),
)
def test_eta_of_a_steady_pace_is_exact(pace: float, done: float, seconds: list[float]) -> None:
    total = pace * sum(seconds) / done
    eta, now = Eta(total), 0.0
    left = eta.seconds(now, 0.0)
    assert left is None
    for passed in seconds:
        now += passed
        left = eta.seconds(now, pace * now)
    assert left == pytest.approx((total - pace * now) / pace)


def test_eta_charges_a_costlier_stage() -> None:
    """10 steps of cost 1 at 1 s are done, 10 of cost 4 are left: 40 s, not 10."""
    eta = Eta(total_flops=50.0)
    for at in range(11):
        left = eta.seconds(float(at), float(at))
    assert left == pytest.approx(40.0)


def test_eta_forgets_an_old_pace() -> None:
    eta, now, flops = Eta(total_flops=1000.0, window=10.0), 0.0, 0.0
    for rate in [1.0] * 20 + [5.0] * 20:
        now, flops = now + 1.0, flops + rate
        left = eta.seconds(now, flops)
    assert left == pytest.approx((1000.0 - flops) / 5.0)


def test_eta_of_a_resumed_run_is_the_pace_of_now() -> None:
    eta = Eta(total_flops=100.0)
    eta.seconds(0.0, 90.0)
    assert eta.seconds(2.0, 92.0) == pytest.approx(8.0)


def test_plain_lines_are_throttled_and_the_last_one_is_shown() -> None:
    clock = Clock()
    line, out = make_line(False, clock)
    with line:
        for step in range(1, 101):
            clock.now += 0.125
            line.update(status(step))
        logger.info("growth [1/1] done")
    lines = [text.split(" | ", 1)[1] for text in out.getvalue().splitlines()]
    (end,) = [text for text in lines if text.startswith("estimated end")]
    assert lines.index(end) == 2 and end.endswith(" | 2s left"), "once, after ten seconds"
    lines.remove(end)
    assert [text.split(" | ")[0] for text in lines[:-1]] == [
        f"step {step}" for step in (1, 41, 81, 100)
    ]
    assert lines[0] == (
        "step 1 | loss 3.142 | grad norm 0.832 | lr 3.0e-4 | 12.3k tok/s | MFU 40.0% | ETA -"
    )
    assert lines[1].endswith(" | ETA 7s")
    assert lines[-1] == "growth [1/1] done"


def test_fields_without_a_value_show_a_dash() -> None:
    line, out = make_line(False, Clock())
    line.update(replace(status(1, mfu=None), grad_norm=None))
    assert " | grad norm - | " in out.getvalue() and " | MFU - | " in out.getvalue()


FIELDS = ("step 50", "loss 3.142", "12.3k tok/s", "MFU 40.0%", "ETA -")


@pytest.mark.parametrize(
    ("width", "more"),
    [
        (60, ()),
        (72, ("lr 3.0e-4",)),
        (90, ("grad norm 0.832", "lr 3.0e-4")),
        (120, ("stage 2/2", "grad norm 0.832", "lr 3.0e-4")),
    ],
)
def test_live_line_fits_in_one_row(width: int, more: tuple[str, ...]) -> None:
    line, _ = make_line(True, Clock(), width)
    line.update(status(50))
    (row,) = [text for text in line._progress.console.render_lines(line._progress) if text]
    text = "".join(part.text for part in row)
    assert len(text) == width
    for part in (*FIELDS, *more):
        assert part in text
    dropped = {"stage 2/2", "grad norm 0.832", "lr 3.0e-4"} - {*more}
    assert not any(part in text for part in dropped)


def test_terminal_is_given_back_after_an_error() -> None:
    line, out = make_line(True, Clock())

    def fail() -> None:
        with line:
            line.update(status(1))
            logger.warning("checkpoint saved")
            raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError, match="rank 1 died"):
        fail()
    text = out.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "warning: checkpoint saved" in text


def test_nothing_is_shown_where_it_is_not_enabled() -> None:
    _, out = make_line(False, Clock())
    with LiveLine(10, 10.0, Console(file=out, width=100), enabled=False) as line:
        line.update(status(10))
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("number", "text"), [(3e-4, "3.0e-4"), (0.0, "0.0e0"), (1.0, "1.0e0"), (2.4e-12, "2.4e-12")]
)
def test_scientific(number: float, text: str) -> None:
    assert scientific(number) == text
