"""Measures tiles of kernels on a GPU and writes the tables that kernels read.

    python tools/gpu/tune_kernels.py [--op attention] [--limit 40] [--folder DIR]

For each op, and each combination of the features that its tables tell apart (in bf16), candidates
are compiled first, without the GPU; those that spill or need more shared memory than there is are
dropped, the others timed on random inputs: the median, with a cold second-level cache and nothing
of the host's time. The fastest becomes a row of tiles/OP.json for this GPU's architecture. Commit
the files, then run `python tools/gpu/kernel_code.py`.
"""

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run as a script, it finds only itself

from megagrow_kernels.calls import launches  # noqa: E402
from megagrow_kernels.launching import architecture  # noqa: E402
from megagrow_kernels.tiles import Row, rows, rows_for  # noqa: E402
from tools.gpu.kernel_candidates import (  # noqa: E402
    TOLD,
    Tiles,
    candidates,
    choose,
    conditions,
    merged,
    text_of,
)
from tools.gpu.kernel_cases import OPS, Case, cases, replaced  # noqa: E402
from tools.gpu.kernel_code import Job, Outcome, inspect  # noqa: E402

FOLDER = ROOT / "kernels" / "megagrow_kernels" / "tiles"
BYTES = 2
"""Of a number in training: fp32 is left as it is."""
PROCESSES = 8
"""That compile, beside the GPU."""


class Timing(Protocol):
    """What times calls: `tools.gpu.bench.clock.CudaClock`."""

    def compare(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each call."""


def typical(op: str, capability: int) -> Iterator[Case]:
    """The cases of an op that are tuned: those of training, one for every row that is written."""
    wanted = OPS[op].features
    for case in cases(op, capability):
        usual = all(case.features[name] in known for name, known in wanted.items())
        trained = case.features.get("bytes", BYTES) == BYTES and not case.features.get("window")
        if usual and trained:
            yield case


def possible(outcomes: Iterable[Outcome]) -> list[Tiles]:
    """The tiles, of jobs that have some for one table, with whose code nothing is wrong."""
    return [
        dict(tiles)
        for outcome in outcomes
        if not outcome.problems()
        for tiles in outcome.job.tiles.values()
    ]


def fastest(
    case: Case, table: str, tried: Sequence[Tiles], clock: Timing, device: torch.device
) -> tuple[Tiles, float]:
    """The fastest of the candidates for a table, and its seconds."""
    capability = architecture(device)
    launch = launches(case.op, device, case.arguments)[table]

    def with_tiles(tiles: Tiles) -> Callable[[], object]:
        def call() -> object:
            with replaced(capability, {table: tiles}):
                return launch()

        return call

    named = {str(index): with_tiles(tiles) for index, tiles in enumerate(tried)}
    seconds = clock.compare(named)
    return choose([(tiles, seconds[str(index)]) for index, tiles in enumerate(tried)])


def measured_row(
    table: str, case: Case, capability: int, tiles: Tiles, seconds: float, device: str
) -> Row:
    """A row of a table, with what was measured."""
    told = conditions(TOLD[table], case.features, rows_for(table, capability))
    day = datetime.date.today().isoformat()
    measured = {"device": device, "date": day, "microseconds": round(seconds * 1e6, 2)}
    return told | {"use": tiles, "measured": measured}


def written(table: str, capability: int, measured: Sequence[Row]) -> str:
    """The table with the rows that were measured in their places."""
    known = rows_for(table, capability)
    return text_of(dict(rows(table)) | {capability: merged(TOLD[table], known, measured)})


def tune(op: str, table: str, clock: Timing, device: torch.device, limit: int | None) -> list[Row]:
    """Measures one table; says what it finds."""
    capability, name = architecture(device), torch.cuda.get_device_name(device)
    found: dict[str, Row] = {}
    for case in typical(op, capability):
        features = {name: case.features[name] for name in TOLD[table]}
        if str(features) in found:
            continue
        listed = candidates(table, features, capability)[:limit]
        jobs = [Job(capability, op, case.arguments, tiles={table: tiles}) for tiles in listed]
        tried = possible(inspect(jobs, PROCESSES))
        if not tried:
            print(f"{table} {features}: none of {len(jobs)} candidates is possible")
            continue
        tiles, seconds = fastest(case, table, tried, clock, device)
        found[str(features)] = measured_row(table, case, capability, tiles, seconds, name)
        shown = f"{len(tried)} of {len(jobs)} tried, {tiles}, {seconds * 1e6:.1f} us"
        print(f"{table} {features}: {shown}", flush=True)
    return list(found.values())


def main() -> None:
    """Tunes all ops, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=[op for op in OPS if op != "add_rms_norm"], action="append")
    parser.add_argument("--limit", type=int, help="most candidates for a row")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tables are written")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernels needs a GPU: torch.cuda.is_available() is False")
    from tools.gpu.bench.clock import CudaClock

    device = torch.device("cuda", torch.cuda.current_device())
    clock = CudaClock(device)
    given.folder.mkdir(parents=True, exist_ok=True)
    for op in given.op or (op for op in OPS if op != "add_rms_norm"):
        for table in OPS[op].tables:
            measured = tune(op, table, clock, device, given.limit)
            text = written(table, architecture(device), measured)
            (given.folder / f"{table}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
