"""Exit code and output of the command line for each class of error."""

import pytest

import megagrow.cli.app
from megagrow.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Diverged,
    InputError,
    ResourceError,
    RunError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (DataError, 2),
        (CheckpointError, 2),
        (ResourceError, 2),
        (RunError, 1),
        (Diverged, 3),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: type[InputError] | type[RunError],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing() -> None:
        raise error("some.key = 3 is too large; use 2")

    monkeypatch.setattr(megagrow.cli.app, "app", failing)
    with pytest.raises(SystemExit) as end:
        megagrow.cli.app.main()
    assert end.value.code == code
    assert capsys.readouterr() == ("", "error: some.key = 3 is too large; use 2\n")
