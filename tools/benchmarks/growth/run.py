"""Benchmark live growth against memcpy and against gathering, and planning at 512 ranks.

    python tools/benchmarks/growth/run.py --output bench_growth

Writes growth.json, growth.md and growth.png. See --help.
"""

import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from megagrow.common.tables import markdown_table
from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.operators import growth_map
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import plan_rank

MIB = 2**20
PROCESS_BYTES = 400 * MIB
"""Memory of a rank without a model."""
RANK = Path(__file__).with_name("rank.py")

SIZES: dict[str, dict[str, int]] = {
    "46M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12},
    "168M": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12},
    "480M": {"hidden_size": 1536, "intermediate_size": 4128, "num_hidden_layers": 16},
    "650M": {"hidden_size": 1792, "intermediate_size": 4816, "num_hidden_layers": 16},
}
"""Parameters of the target model; the source has a quarter of its layers."""

TRANSPORT = {"optimizer_state": "transport"}
"""The full optimizer state is transferred."""

SEVEN_B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
HALF_AS_WIDE = SEVEN_B | {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 5504,
}
SHALLOW = SEVEN_B | {"num_hidden_layers": 8}
Grid = tuple[int, int, int]
PLANS: list[tuple[str, dict[str, int], str, Grid, Grid]] = [
    ("stack, 8 to 32 layers", SHALLOW, "direct_depth", (3, 64, 8), (3, 64, 8)),
    ("stack, 8 to 32 layers", SHALLOW, "direct_depth", (1, 128, 4), (3, 64, 8)),
    ("copy, 2048 to 4096 wide", HALF_AS_WIDE, "direct_width", (3, 64, 8), (3, 64, 8)),
    ("copy, 2048 to 4096 wide", HALF_AS_WIDE, "direct_width", (1, 128, 4), (3, 64, 8)),
]
"""Growths into llama-7b: label, source, operator, and (ZeRO stage, DP, TP) before and after."""


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench_growth"),
    size: Annotated[
        list[str] | None,
        typer.Option(help=f"Target sizes, repeatable: {', '.join(SIZES)}."),
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(help="Numbers of ranks, repeatable. Default: 1, 2, 4, 8.")
    ] = None,
    zero: Annotated[
        list[int] | None, typer.Option(help="ZeRO stages, repeatable. Default: 2 and 3.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="Total memory of all ranks in GiB. Default: 7/8 of the free memory."),
    ] = None,
    gather: Annotated[bool, typer.Option(help="Also measure growth by gathering.")] = True,
) -> None:
    """Measure live growth on the CPU, and planning at 512 ranks.

    Each case is a Gstack growth by a factor of four, on engines with random state. Live growth is
    megagrow.train.growth_event.event.grow: it builds the engine of the next stage and transfers the
    state between ranks. The lower bound is a memcpy of the target's fp32 weights and moments into
    new memory, concurrently on all ranks. Growth by gathering gathers full state dicts on rank 0,
    grows them there, and loads them into new engines on all ranks.

    Each is measured three times; the fastest counts. Cases that do not fit into memory are skipped
    and listed.
    """
    output.mkdir(parents=True, exist_ok=True)
    console, begin = Console(), time.perf_counter()
    room = _available() * 7 // 8 if memory is None else int(memory * 2**30)
    results: dict[str, Any] = {"planning": [planned(*plan) for plan in PLANS], "growth": []}
    for world in ranks or (1, 2, 4, 8):
        cases = [
            case
            for name in size or SIZES
            for stage in zero or (2, 3)
            if (case := make_case(name, world, stage, room, gather, console))
        ]
        console.print(
            f"{world} ranks: {len(cases)} cases, {time.perf_counter() - begin:.0f} s so far"
        )
        results["growth"] += run_cases(world, cases)
    table = markdown(results)
    (output / "growth.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (output / "growth.md").write_text(table, encoding="utf-8")
    draw(results["growth"], output / "growth.png")
    console.print(Markdown(table))


def make_case(
    name: str, world: int, zero: int, room: int, gather: bool, console: Console
) -> dict[str, Any] | None:
    """Return a case for the ranks, or None if it does not fit into `room` bytes."""
    model = SIZES[name] | {"num_attention_heads": 16, "vocab_size": 8192}
    small = model | {"num_hidden_layers": model["num_hidden_layers"] // 4}
    state, old_state = (12 * _parameters(shape) for shape in (model, small))
    # fp32 forward weights, which ZeRO-2 shares on one host, and ZeRO-3's gradient buffer.
    forward = state * 2 // 3 if zero == 3 else state // 3
    live = state + forward + max(old_state, state // 3)
    room -= world * PROCESS_BYTES
    if live > room:
        console.print(f"{name}, ZeRO-{zero}, {world} ranks: needs {live >> 20} MiB, skipped")
        return None
    stage = {"tokens": 1, "parallel": {"zero_stage": zero}, "optimizer": {"lr": 1e-3}}
    stage["batch"] = {"global_batch_size": world, "micro_batch_size": 1}
    return {
        "size": name,
        "ranks": world,
        "zero": zero,
        "gather": gather and 2 * state + forward + old_state < room,
        "target_bytes": state,
        "live_bytes": live - old_state,
        "run": {
            "name": "bench",
            "output_dir": "unused",
            "data": {"train": [{"path": "unused"}], "sequence_length": 16},
            "stages": [stage | {"model": small}, stage | {"model": model, "growth": TRANSPORT}],
        },
    }


def run_cases(world: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure cases on local ranks; return them with their measurements."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "cases.json"), Path(folder, "results.jsonl")
        inputs.write_text(json.dumps(cases), encoding="utf-8")
        outputs.touch()
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
        subprocess.run([sys.executable, *launcher, RANK, inputs, outputs], check=True)
        lines = outputs.read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines]
    return [{key: value for key, value in case.items() if key != "run"} for case in results]


def planned(
    label: str, source: dict[str, int], operator: str, old: Grid, new: Grid
) -> dict[str, Any]:
    """Return seconds and memory of planning all transfers of one rank of 512.

    The maximum over three ranks, each planned in a separate process.
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        measurements = [
            pool.submit(plan_seconds, source, operator, old, new, rank).result()
            for rank in (0, 300, 511)
        ]
    seconds, peak, transfers = map(max, zip(*measurements, strict=True))
    grids = {"before": old, "after": new}
    return {
        "growth": label,
        **grids,
        "seconds": seconds,
        "peak_bytes": peak,
        "transfers": transfers,
    }


def plan_seconds(
    source: dict[str, int], operator: str, old: Grid, new: Grid, rank: int
) -> tuple[float, int, int]:
    """Return seconds, peak bytes of this process, and the number of copies and transfers."""
    models = ModelConfig(**source), ModelConfig(**SEVEN_B)
    layouts = []
    for model, (zero, dp, tp) in zip(models, (old, new), strict=True):
        plan = parameter_plan(model, tp)
        layouts.append(Layout(plan, (tuple(plan),), zero, dp, tp))
    begin = time.perf_counter()
    growth = growth_map(*models, GrowthConfig(operator=[operator]))
    plan_of = plan_rank(rank, layouts[0], growth, layouts[1])
    seconds = time.perf_counter() - begin
    directions = (plan_of.outgoing, plan_of.incoming)
    transfers = sum(len(p) for direction in directions for p in direction.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, peak, len(plan_of.copies.get(rank, ())) + transfers


def markdown(results: dict[str, Any]) -> str:
    """Return all results as two Markdown tables."""
    columns = (
        *("target", "ranks", "ZeRO", "live s", "build s", "move s", "memcpy s", "live / memcpy"),
        *("gather s", "sent MiB", "gather sent MiB", "peak MiB / rank", "gather peak MiB / rank"),
    )
    rows: list[tuple[str, ...]] = []
    for case in results["growth"]:
        gather, sent, peak = (
            case.get(f"gather_{key}") for key in ("seconds", "bytes_between_ranks", "peak_bytes")
        )
        seconds, limit = case["seconds"], case["limit_seconds"]
        rows.append(
            (
                *(str(case["size"]), str(case["ranks"]), str(case["zero"]), f"{seconds:.2f}"),
                *(f"{case['build_seconds']:.2f}", f"{case['move_seconds']:.2f}", f"{limit:.2f}"),
                *(f"{seconds / limit:.1f}", "-" if gather is None else f"{gather:.2f}"),
                *(_mib(case["bytes_between_ranks"]), _mib(sent)),
                *(_mib(case["peak_bytes"]), _mib(peak)),
            )
        )
    planned = [
        (
            *(str(plan["growth"]), str(plan["before"]), str(plan["after"])),
            *(f"{plan['seconds']:.2f}", _mib(plan["peak_bytes"]), str(plan["transfers"])),
        )
        for plan in results["planning"]
    ]
    lines = [markdown_table(columns, rows), ""]
    lines += ["Planning llama-7b on one rank of 512 (ZeRO stage, DP, TP):", ""]
    heading = ("growth", "before", "after", "s", "peak MiB", "copies and transfers")
    return "\n".join([*lines, markdown_table(heading, planned)]) + "\n"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Plot seconds and peak memory by target size, for the number of ranks nearest to 4."""
    world = min({case["ranks"] for case in cases}, key=lambda ranks: abs(ranks - 4))
    shown = [case for case in cases if case["ranks"] == world]
    sizes = {case["target_bytes"] / 2**30: case["size"] for case in shown}
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, keys, unit, scale in (
        (figure.add_subplot(121), ("seconds", "gather_seconds", "limit_seconds"), "s", 1.0),
        (figure.add_subplot(122), ("peak_bytes", "gather_peak_bytes"), "peak GiB per rank", 2**30),
    ):
        for zero, dash in zip(sorted({case["zero"] for case in shown}), ("--", "-"), strict=False):
            for key, color in zip(keys, ("#D55E00", "#0072B2", "#555555"), strict=False):
                points = [
                    (case["target_bytes"] / 2**30, case[key] / scale)
                    for case in shown
                    if case["zero"] == zero and key in case
                ]
                name = {"g": "gather on rank 0", "l": "memcpy"}.get(key[0], "live")
                label = f"{name}, ZeRO-{zero}"
                axes.plot(*zip(*points, strict=True), dash, color=color, marker="o", label=label)
        axes.set(xlabel="target parameters", ylabel=unit, xscale="log", yscale="log")
        axes.set_xticks(list(sizes), list(sizes.values()))
        axes.minorticks_off()
        axes.set_title(f"Gstack by a factor of four on {world} ranks")
        axes.legend(fontsize="small")
        axes.grid(True, alpha=0.3)
    figure.savefig(path, dpi=150)


def _parameters(shape: dict[str, int]) -> int:
    specs = parameter_plan(ModelConfig(**shape), tp=1).values()
    return sum(spec.rows * spec.cols for spec in specs)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


if __name__ == "__main__":
    typer.run(main)
