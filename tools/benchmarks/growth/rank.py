"""One rank of the growth benchmark: measures live growth and growth by gathering on rank 0.

    torchrun --nproc-per-node 4 tools/benchmarks/growth/rank.py CASES.json RESULTS.jsonl

tools/benchmarks/growth/run.py starts it. Each case is measured three times, on engines whose state
is filled with random numbers. Seconds are those of the slowest rank in the fastest repetition. Peak
memory is the maximum over ranks and repetitions, above the memory of the process without a model.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import megagrow.train.growth_event.event as growing
from megagrow.config.schema import RunConfig
from megagrow.parallel.launch import read_launch, tune_process
from megagrow.parallel.process_groups import init_process_group, leave_process_group
from megagrow.parallel.sharding import ADAMW_KINDS, Storage
from megagrow.reshard.layout import Layout
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.stage import Stage, build_stage

Measures = dict[str, float]
REPEATS = 3
NO_FEED: Any = None
"""Stacking neither trains nor measures anything, so it reads no tokens."""


def main() -> None:
    """Measure each case of a JSON file and append its results to a JSON lines file."""
    cases, results = map(Path, sys.argv[1:])
    tune_process()
    device = init_process_group(read_launch())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    for case in json.loads(cases.read_text(encoding="utf-8")):
        run = RunConfig.model_validate(case["run"])
        needed = case["live_bytes"] // dist.get_world_size()
        measures = _best([measure_live(run, device, needed) for _ in range(REPEATS)])
        if case["gather"]:
            gather = _best([measure_gather(run, device, needed) for _ in range(REPEATS)])
            if gather.pop("sum") != measures["sum"]:
                raise AssertionError("live growth and growth by gathering gave different models")
            measures |= {f"gather_{name}": value for name, value in gather.items()}
        measures.pop("sum")
        if dist.get_rank() == 0:
            with results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(case | measures) + "\n")
    leave_process_group()


def measure_live(run: RunConfig, device: torch.device, needed: int) -> Measures:
    """Measure a live growth, and a memcpy of the resulting state as the lower bound."""
    base, stage = _resident(), _begin(run, device)
    spent: dict[str, float] = {}
    _touch(needed)
    with _timed(growing, "build_stage", spent), _timed(growing, "exchange", spent), _peak() as peak:
        begin = time.perf_counter()
        finished = growing.end_stage(stage)
        stage, report = growing.grow(run, finished, NO_FEED)
        del finished
        seconds = time.perf_counter() - begin
    storage = stage.engine.storage()
    limit = min(_copy_seconds(storage) for _ in range(REPEATS))
    total = _sum(storage)
    del storage
    stage.release()
    return {
        "seconds": _highest(seconds),
        "build_seconds": _highest(spent["build_stage"]),
        "move_seconds": _highest(spent["exchange"]),
        "limit_seconds": limit,
        "bytes_between_ranks": report.bytes_between_ranks,
        "bytes_within_ranks": report.bytes_within_ranks,
        "peak_bytes": _highest(peak[0] - base),
        "sum": total,
    }


def measure_gather(run: RunConfig, device: torch.device, needed: int) -> Measures:
    """Measure the same growth by full state dicts on rank 0."""
    base, stage = _resident(), _begin(run, device)
    sent = [0]
    _touch(needed)
    with _peak() as peak:
        begin = time.perf_counter()
        layout, old = stage.layout, stage.release()
        full = _gather(layout, old, sent)
        del old
        grown = _stack(run, full)
        del full
        stage = build_stage(run, 1, device)
        _scatter(stage, grown, sent)
        del grown
        stage.engine.ready(0)
        seconds = time.perf_counter() - begin
    total = _sum(stage.engine.storage())
    stage.release()
    return {
        "seconds": _highest(seconds),
        "bytes_between_ranks": _total(sent[0]),
        "peak_bytes": _highest(peak[0] - base),
        "sum": total,
    }


def _best(measures: list[Measures]) -> Measures:
    """Return the fastest repetition, with the shortest limit and the highest peak."""
    best = min(measures, key=lambda one: one["seconds"])
    if "limit_seconds" in best:
        best["limit_seconds"] = min(one["limit_seconds"] for one in measures)
    return best | {"peak_bytes": max(one["peak_bytes"] for one in measures)}


def _begin(run: RunConfig, device: torch.device) -> Stage:
    """Build the first stage with random state on all ranks."""
    stage = build_stage(run, 0, device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for kinds in stage.engine.storage().values():
        for tensor in kinds.values():
            tensor.uniform_(generator=generator)
    stage.engine.ready(1)
    dist.barrier()
    return stage


def _gather(layout: Layout, storage: Storage, sent: list[int]) -> dict[str, dict[str, Any]]:
    """Gather the state as full flat tensors on rank 0; other ranks return empty entries."""
    rank, gathered = dist.get_rank(), {}
    for name, spec in layout.plan.items():
        gathered[name] = {}
        for kind in ADAMW_KINDS:
            mine = layout.interval(name, rank)
            if rank > 0 and mine:
                dist.send(storage[name][kind], dst=0)
                sent[0] += 4 * len(mine)
            if rank > 0:
                continue
            full = torch.empty(spec.rows * spec.cols)
            full[mine.start : mine.stop] = storage[name][kind] if mine else 0
            for peer in range(1, dist.get_world_size()):
                theirs = layout.interval(name, peer)
                if theirs:
                    dist.recv(full[theirs.start : theirs.stop], src=peer)
            gathered[name][kind] = full
    return gathered


def _stack(run: RunConfig, full: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the grown state dict, on rank 0."""
    terms = stage_growth(run, 1).weights
    return {
        name: {kind: tensor.clone() for kind, tensor in full[term.sources[0]].items()}
        for name, (term,) in terms.items()
    }


def _scatter(stage: Stage, grown: dict[str, dict[str, Any]], sent: list[int]) -> None:
    """Load the state dict of rank 0 into the engines of all ranks, tensor by tensor."""
    rank, layout, storage = dist.get_rank(), stage.layout, stage.engine.storage()
    for name, spec in layout.plan.items():
        for kind in ADAMW_KINDS:
            full = grown[name].pop(kind) if rank == 0 else torch.empty(spec.rows * spec.cols)
            dist.broadcast(full, src=0)
            sent[0] += full.nbytes * (dist.get_world_size() - 1) if rank == 0 else 0
            mine = layout.interval(name, rank)
            if mine:
                storage[name][kind].copy_(full[mine.start : mine.stop])


def _touch(needed: int) -> None:
    """Allocate, fill and free memory before a measurement.

    A virtual machine returns memory that is free for a second or two to its host. Getting it back
    takes ten times as long as copying it, which would distort the first measurement.
    """
    buffer = torch.empty(needed, dtype=torch.uint8).fill_(1)
    dist.barrier()
    del buffer


def _copy_seconds(storage: Storage) -> float:
    """Return the seconds of one copy of the state into new memory, concurrently on all ranks."""
    dist.barrier()
    begin = time.perf_counter()
    for kind in ADAMW_KINDS:
        tensors = [kinds[kind] for kinds in storage.values()]
        new = torch.empty(sum(tensor.numel() for tensor in tensors))
        for tensor, place in zip(tensors, new.split([t.numel() for t in tensors]), strict=True):
            place.copy_(tensor)
    return _highest(time.perf_counter() - begin)


@contextmanager
def _timed(module: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Record the duration of a function of a module; all ranks enter it at the same time."""
    original: Callable[..., Any] = getattr(module, name)

    def timed(*args: Any, **options: Any) -> Any:
        dist.barrier()
        begin = time.perf_counter()
        result = original(*args, **options)
        spent[name] = time.perf_counter() - begin
        return result

    with mock.patch.object(module, name, timed):
        yield


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Yield a list that holds the peak resident bytes once the context has ended."""
    peak = [0]
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    yield peak
    peak[0] = _status("VmHWM")


def _resident() -> int:
    """Return the resident bytes after returning freed memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _sum(storage: Storage) -> float:
    return float(sum(t.double().sum() for kinds in storage.values() for t in kinds.values()))


def _highest(value: float) -> float:
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def _total(value: float) -> float:
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


if __name__ == "__main__":
    main()
