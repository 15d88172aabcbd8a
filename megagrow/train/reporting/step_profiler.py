"""Traces of training steps by torch's profiler (`logging.profile`), for Perfetto or Chrome."""

import logging

import torch
from torch.profiler import ProfilerActivity, profile

from megagrow.config.schema import RunConfig

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder of the traces in the run directory."""

VIEWER = "open it at https://ui.perfetto.dev"


class StepProfiler:
    """Profiler of the steps in `logging.profile` on rank 0; writes one trace when they are done.

    A problem with the trace is a warning: it must not stop the run. A run that starts or ends
    within the steps profiles its part of them.
    """

    def __init__(self, run: RunConfig, enabled: bool) -> None:
        options = run.logging.profile
        self._steps = range(0) if options is None or not enabled else options.range
        self._folder = run.output_dir / FOLDER
        self._profile: profile | None = None
        self._first = self._last = 0

    def completed(self, step: int) -> None:
        """Start or stop after a completed step, or before the first one of this process."""
        self._last = step
        if self._profile is None and step + 1 in self._steps:
            self._first, self._profile = step + 1, profile(activities=_activities())
            self._profile.start()
        elif self._profile is not None and step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Write the trace, if one was started."""
        trace, self._profile = self._profile, None
        if trace is None:
            return
        self._steps = range(0)  # not again after a rewind
        path = self._folder / f"steps-{self._first}-{self._last}.json"
        trace.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning("%s: the trace cannot be written (%s)", path, error)
        else:
            logger.info("trace of steps %d to %d | %s | %s", self._first, self._last, path, VIEWER)


def _activities() -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]
