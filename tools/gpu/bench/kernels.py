"""Benchmark one family of kernels against hardware ceilings and other libraries.

    python tools/gpu/bench/kernels.py rows|attention|loss|scan --output rows.jsonl [--smoke]

Started by gpu_check.py. Writes one record per line as it runs (see `case.py`), so an interrupted
benchmark keeps its results. The ceilings, a large matrix product and a large copy, are measured in
the same process, before and after the rest; the better one counts.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch._functorch.config as functorch_config

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.gpu.bench import attention as attention  # noqa: E402
from tools.gpu.bench import baselines as baselines  # noqa: E402
from tools.gpu.bench import loss as loss  # noqa: E402
from tools.gpu.bench import rows as rows  # noqa: E402
from tools.gpu.bench import scan as scan  # noqa: E402
from tools.gpu.bench.case import BenchmarkCase, DeviceSetup, Record, measure  # noqa: E402
from tools.gpu.bench.timer import Timer  # noqa: E402

MATMUL, COPY_BYTES = 8192, 2**30
SMOKE_MATMUL, SMOKE_COPY_BYTES = 64, 2**16
FAMILIES = {"rows": rows, "attention": attention, "loss": loss, "scan": scan}


def main() -> None:
    """Measure a family and write its records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    setup = DeviceSetup(torch.device("cpu" if options.smoke else "cuda"), options.smoke)
    with options.output.open("w", encoding="utf-8") as file:
        for record in records(options.family, setup):
            file.write(json.dumps(record) + "\n")
            file.flush()


def records(family: str, setup: DeviceSetup) -> Iterator[Record]:
    """Yield all records of a family on a device."""
    torch.manual_seed(0)
    timer = setup.timer()
    yield ceilings(setup, timer)
    for library in baselines.missing_libraries():
        yield {"kind": "missing", "library": library}
    # Compiled backward passes are repeated, so they must not donate their saved buffers.
    with functorch_config.patch(donated_buffer=False):
        for case in cases(family, setup):
            yield from measure(case, timer)
            if not setup.smoke:
                torch.cuda.empty_cache()
    if family == "loss":
        yield from loss.memory(setup)
    yield ceilings(setup, timer)


def cases(family: str, setup: DeviceSetup) -> Iterable[BenchmarkCase]:
    """Return the family's cases, created lazily: together they do not fit in memory."""
    return FAMILIES[family].cases(setup)


def ceilings(setup: DeviceSetup, timer: Timer) -> Record:
    """Return the matmul rate in FLOP/s and the copy rate in bytes/s, reads and writes counted."""
    size = SMOKE_MATMUL if setup.smoke else MATMUL
    a, b = (setup.draw(size, size, gradient=False) for _ in range(2))
    elements = (SMOKE_COPY_BYTES if setup.smoke else COPY_BYTES) // a.element_size()
    source = setup.draw(elements, gradient=False)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    seconds = timer.compare(calls)
    moved = 2 * source.numel() * source.element_size()
    rates = {"matmul": 2 * size**3 / seconds["matmul"], "copy": moved / seconds["copy"]}
    return {"kind": "ceiling", **rates}


if __name__ == "__main__":
    main()
