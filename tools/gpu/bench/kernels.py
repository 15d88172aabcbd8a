"""One family of kernels, measured against what the card can do and against others.

    python tools/gpu/bench/kernels.py rows|attention|loss --output rows.jsonl [--smoke]

Started by gpu_check.py. Writes a record per line as it goes (see `gpu_bench_case`), so that what is
cut short has left what it found. The ceilings, a large matrix product and a large copy, are
measured in the same process, before and after the rest; the better one counts.
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
from tools.gpu.bench import loss as loss  # noqa: E402
from tools.gpu.bench import others as others  # noqa: E402
from tools.gpu.bench import rows as rows  # noqa: E402
from tools.gpu.bench.case import Case, Place, Record, measure  # noqa: E402
from tools.gpu.bench.clock import Clock  # noqa: E402

MATMUL, COPY_BYTES = 8192, 2**30
SMOKE_MATMUL, SMOKE_COPY_BYTES = 64, 2**16
FAMILIES = {"rows": rows, "attention": attention, "loss": loss}


def main() -> None:
    """Measures a family and writes its records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    place = Place(torch.device("cpu" if options.smoke else "cuda"), options.smoke)
    with options.output.open("w", encoding="utf-8") as file:
        for record in records(options.family, place):
            file.write(json.dumps(record) + "\n")
            file.flush()


def records(family: str, place: Place) -> Iterator[Record]:
    """All that is to be known of a family at a place."""
    torch.manual_seed(0)
    clock = place.clock()
    yield ceilings(place, clock)
    for library in others.missing():
        yield {"kind": "missing", "library": library}
    # A compiled backward pass is repeated here, so it may not give away what it has read.
    with functorch_config.patch(donated_buffer=False):
        for case in cases(family, place):
            yield from measure(case, clock)
            if not place.smoke:
                torch.cuda.empty_cache()
    if family == "loss":
        yield from loss.memory(place)
    yield ceilings(place, clock)


def cases(family: str, place: Place) -> Iterable[Case]:
    """The family's cases, each made when it is asked for: they do not fit into memory together."""
    return FAMILIES[family].cases(place)


def ceilings(place: Place, clock: Clock) -> Record:
    """Matrix product in FLOP/s and copy in bytes/s, read and written ones counted."""
    size = SMOKE_MATMUL if place.smoke else MATMUL
    a, b = (place.draw(size, size, gradient=False) for _ in range(2))
    numbers = (SMOKE_COPY_BYTES if place.smoke else COPY_BYTES) // a.element_size()
    source = place.draw(numbers, gradient=False)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    seconds = clock.compare(calls)
    moved = 2 * source.numel() * source.element_size()
    rates = {"matmul": 2 * size**3 / seconds["matmul"], "copy": moved / seconds["copy"]}
    return {"kind": "ceiling", **rates}


if __name__ == "__main__":
    main()
