"""Stand-in for the package wandb, with the signatures of the calls that megagrow makes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


class WandbError(Exception):
    """Stand-in for wandb.Error."""


class Wandb:
    """Stand-in for wandb: `init`, `Run.log`, `Run.step` and `Run.finish` with their signatures.

    A run drops steps below its current one. A continued run begins after its last step.
    `rewinds` is False for accounts that may not rewind.
    """

    Error = WandbError

    def __init__(self, rewinds: bool = True) -> None:
        self.rewinds = rewinds
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.settings: list[dict[str, Any]] = []
        self.finished = 0

    def init(
        self,
        *,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        config: dict[str, Any] | None = None,
        allow_val_change: bool | None = None,
        dir: str | None = None,
        id: str | None = None,
        resume: str | None = None,
        resume_from: str | None = None,
    ) -> "Run":
        if project == "refused":
            raise WandbError("no API key")
        self.settings.append(
            {"project": project, "name": name, "group": group, "tags": tags, "config": config}
        )
        if resume_from is not None:
            assert id is None and resume is None, "mutually exclusive"
            id, _, step = resume_from.partition("?_step=")
            if not self.rewinds:
                raise WandbError("Rewind is in private preview")
            steps = self.history[id]
            self.history[id] = {key: row for key, row in steps.items() if key <= int(step)}
        assert id is not None and allow_val_change and dir is not None
        return Run(self, self.history.setdefault(id, {}))

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return SimpleNamespace(columns=columns, data=data)


class Run:
    """Stand-in for wandb.Run."""

    def __init__(self, wandb: Wandb, history: dict[int, dict[str, Any]]) -> None:
        self._wandb, self._history = wandb, history
        self.step = max(history, default=-1) + 1

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is not None and step >= self.step, "W&B would drop it with a warning"
        self._history.setdefault(step, {}).update(data)
        self.step = step

    def finish(self, exit_code: int | None = None) -> None:
        self._wandb.finished += 1
