"""Tune the tile sizes of kernels on a GPU and write the tile tables.

    python tools/gpu/tune_kernels.py [--op attention] [--limit 40] [--folder DIR]

For each op, and each combination of its table features (in bf16), candidates are first compiled
without the GPU. Those that spill or exceed the shared memory are dropped. The others are compared
with the reference on the GPU; those that compute wrong results are dropped, printed, and recorded
in `wrong_candidates.jsonl` in the folder. The rest is timed on random inputs: median GPU time with
a cold L2 cache, excluding host time. The fastest becomes a row of tiles/OP.json for this GPU's
architecture. Commit the tables, then run `python tools/gpu/kernel_code.py`.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # for runs as a script

from megagrow_kernels.calls import launches  # noqa: E402
from megagrow_kernels.launching import architecture  # noqa: E402
from megagrow_kernels.self_check import check, is_correct  # noqa: E402
from megagrow_kernels.tiles import Row, rows, rows_for  # noqa: E402
from tools.gpu.kernel_candidates import (  # noqa: E402
    TABLE_FEATURES,
    Tiles,
    candidates,
    choose,
    format_table,
    is_specialized,
    merge_rows,
    row_conditions,
)
from tools.gpu.kernel_cases import OPS, KernelCase, cases, override_tiles  # noqa: E402
from tools.gpu.kernel_code import CompileJob, CompileResult, inspect  # noqa: E402

FOLDER = ROOT / "kernels" / "megagrow_kernels" / "tiles"
BYTES = 2
"""Bytes per element in training; rows for fp32 are not tuned."""
WRONG = "wrong_candidates.jsonl"
PROCESSES = 8
"""Concurrent compiler processes."""


class CallTimer(Protocol):
    """Timer interface, implemented by `tools.gpu.bench.timer.CudaTimer`."""

    def compare(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Return the median seconds of each call."""


def training_cases(op: str, capability: int) -> Iterator[KernelCase]:
    """Yield the cases of an op to tune: those of training, one per row to write."""
    features = OPS[op].features
    for case in cases(op, capability):
        is_typical = all(case.features[name] in known for name, known in features.items())
        is_training = case.features.get("bytes", BYTES) == BYTES and not case.features.get("window")
        if is_typical and is_training:
            yield case


def valid_tiles(outcomes: Iterable[CompileResult]) -> list[Tiles]:
    """Return the tiles whose code compiled without problems, of jobs that tune one table."""
    return [
        dict(tiles)
        for outcome in outcomes
        if not outcome.problems()
        for tiles in outcome.job.tiles.values()
    ]


def compare_tiles(
    case: KernelCase, table: str, candidate_tiles: Sequence[Tiles], device: torch.device
) -> tuple[list[Tiles], list[dict[str, Any]]]:
    """Return the candidates that compute the result of the reference, and records of the others."""
    right, wrong = [], []
    for tiles in candidate_tiles:
        with override_tiles(architecture(device), {table: tiles}):
            result = check(case.op, device, case.arguments)
        if is_correct(result):
            right.append(tiles)
        else:
            call = {"op": case.op, "arguments": case.arguments, "table": table, "tiles": tiles}
            wrong.append(call | {"result": result})
    return right, wrong


def fastest(
    case: KernelCase,
    table: str,
    candidate_tiles: Sequence[Tiles],
    timer: CallTimer,
    device: torch.device,
) -> tuple[Tiles, float]:
    """Return the fastest candidate of a table, and its seconds."""
    capability = architecture(device)
    launch = launches(case.op, device, case.arguments)[table]

    def with_tiles(tiles: Tiles) -> Callable[[], object]:
        def call() -> object:
            with override_tiles(capability, {table: tiles}):
                return launch()

        return call

    named = {str(index): with_tiles(tiles) for index, tiles in enumerate(candidate_tiles)}
    seconds = timer.compare(named)
    return choose([(tiles, seconds[str(index)]) for index, tiles in enumerate(candidate_tiles)])


def measured_row(
    table: str, case: KernelCase, capability: int, tiles: Tiles, seconds: float, device: str
) -> Row:
    """Return a table row with its measurement."""
    known, special = rows_for(table, capability), is_specialized(tiles)
    row = row_conditions(TABLE_FEATURES[table], case.features, known, special)
    day = datetime.date.today().isoformat()
    measured = {"device": device, "date": day, "microseconds": round(seconds * 1e6, 2)}
    return row | {"use": tiles, "measured": measured}


def fastest_rows(
    case: KernelCase,
    table: str,
    candidate_tiles: Sequence[Tiles],
    timer: CallTimer,
    device: torch.device,
    name: str,
) -> list[Row]:
    """Return the row of the fastest candidate, on a device of this name.

    If it is warp-specialized, the fastest of the others follows, for the calls that it does not
    support.
    """
    measured: list[Row] = []
    remaining = list(candidate_tiles)
    while remaining:
        tiles, seconds = fastest(case, table, remaining, timer, device)
        measured.append(measured_row(table, case, architecture(device), tiles, seconds, name))
        others = [each for each in remaining if not is_specialized(each)]
        remaining = others if is_specialized(tiles) else []
    return measured


def merged_table(table: str, capability: int, measured: Sequence[Row]) -> str:
    """Return the text of the table with the measured rows merged in."""
    known = rows_for(table, capability)
    return format_table(
        dict(rows(table)) | {capability: merge_rows(TABLE_FEATURES[table], known, measured)}
    )


def tune(
    op: str, table: str, timer: CallTimer, device: torch.device, limit: int | None, folder: Path
) -> list[Row]:
    """Measure one table, print the results and record wrong candidates."""
    capability, name = architecture(device), torch.cuda.get_device_name(device)
    measured: dict[str, list[Row]] = {}
    for case in training_cases(op, capability):
        features = {name: case.features[name] for name in TABLE_FEATURES[table]}
        if str(features) in measured:
            continue
        tile_candidates = candidates(table, features, capability)[:limit]
        jobs = [
            CompileJob(capability, op, case.arguments, is_specialized(tiles), {table: tiles})
            for tiles in tile_candidates
        ]
        compiled = valid_tiles(inspect(jobs, PROCESSES))
        valid, wrong = compare_tiles(case, table, compiled, device)
        with (folder / WRONG).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in wrong)
        for record in wrong:
            print(f"{table} {features}: {record['tiles']} is wrong: {record['result']}")
        if not valid:
            print(
                f"{table} {features}: of {len(jobs)} candidates {len(compiled)} compile without "
                "problems, and none of them is correct"
            )
            continue
        found = measured[str(features)] = fastest_rows(case, table, valid, timer, device, name)
        results = (f"{row['use']}, {row['measured']['microseconds']} us" for row in found)
        timed = f"{len(valid)} of {len(jobs)} timed"
        print(f"{table} {features}: {timed}, {'; '.join(results)}", flush=True)
    return [row for found in measured.values() for row in found]


def main() -> None:
    """Tune all ops, or those selected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=[op for op in OPS if op != "add_rms_norm"], action="append")
    parser.add_argument("--limit", type=int, help="maximum number of candidates per row")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="output folder of the tables")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernels needs a GPU: torch.cuda.is_available() is False")
    from tools.gpu.bench.timer import CudaTimer

    device = torch.device("cuda", torch.cuda.current_device())
    timer = CudaTimer(device)
    options.folder.mkdir(parents=True, exist_ok=True)
    for op in options.op or (op for op in OPS if op != "add_rms_norm"):
        for table in OPS[op].tables:
            measured = tune(op, table, timer, device, options.limit, options.folder)
            text = merged_table(table, architecture(device), measured)
            (options.folder / f"{table}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
