"""Measure memory and time of `megagrow convert` on a random model, for every format.

    python tools/benchmarks/checkpoint/convert_memory.py FOLDER [--gigabytes 3] [--memory 512MiB]

Writes a Hugging Face folder of random fp32 weights of that size, in files of at most 1 GB, and runs
each command in a separate process. Prints the peak resident memory (VmHWM) of each. Needs about
seven times the model's size on FOLDER's disk; all files are removed at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.tensor_file import raw_bytes
from megagrow.common.sizes import format_bytes
from megagrow.common.tables import markdown_table
from megagrow.config.schema import ModelConfig
from megagrow.formats.hugging_face import INDEX_FILE, index_of, planned_files, single_rank_layout
from megagrow.formats.hugging_face_config import CONFIG_FILE, config_of
from megagrow.model.layers.flops import parameters

_CHUNK = 2**20
"""Values that are drawn at a time."""

_RUN = """
import sys
from megagrow.cli.app import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("peak", status.split("VmHWM:")[1].split()[0])
"""


@dataclass(frozen=True)
class CommandCost:
    """Peak memory and time of one command."""

    command: str
    peak_bytes: int
    """Peak resident memory of the process."""
    seconds: float


def random_model(gigabytes: float) -> ModelConfig:
    """Return a Llama of width 2048 with about `gigabytes` (1e9 bytes) of fp32 weights."""

    def with_layers(layers: int) -> ModelConfig:
        return ModelConfig(
            num_hidden_layers=layers,
            hidden_size=2048,
            num_attention_heads=16,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=32_003,
        )

    one, two = (parameters(with_layers(layers)) for layers in (1, 2))
    return with_layers(max(1, 1 + round((gigabytes * 1e9 / 4 - one) / (two - one))))


def write_model(model: ModelConfig, folder: Path, file_bytes: int) -> None:
    """Write a Hugging Face folder of random weights, in chunks."""
    folder.mkdir(parents=True)
    files = planned_files(single_rank_layout(model), "F32", file_bytes)
    generator = torch.Generator().manual_seed(0)
    for name, plan in files.items():
        with (folder / name).open("wb") as file:
            file.write(plan.header)
            left = (plan.size - len(plan.header)) // 4
            while left:
                values = torch.randn(min(left, _CHUNK), generator=generator)
                file.write(raw_bytes(values))
                left -= len(values)
    documents = {CONFIG_FILE: config_of(model, "F32", {}), INDEX_FILE: index_of(files)}
    for name, value in documents.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def measure(folder: Path, memory: str) -> Iterator[CommandCost]:
    """Convert FOLDER/model through every format to FOLDER/out; yield the cost of each command.

    Each command reads the result of the one before, which is removed afterwards. Raises
    CalledProcessError if a command fails.
    """
    steps = [
        ("hf-import", "--zero-stage", "3", "--dp", "4", "--memory", memory),
        ("reshard", "--zero-stage", "1", "--dp", "2", "--tp", "2", "--memory", memory),
        ("megatron-export", "--tp", "2"),
        ("megatron-import",),
        ("universal-export",),
        ("universal-import",),
        ("hf-export", "--shard-size", "1GB", "--memory", memory),
    ]
    model = source = str(folder / "model")
    for command, *options in steps:
        target = str(folder / ("out" if command == steps[-1][0] else command))
        words = ["convert", command, source, target, *options]
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", _RUN, *words], check=True, stdout=subprocess.PIPE, text=True
        )
        seconds = time.monotonic() - begin
        peak = int(done.stdout.split()[-1]) * 1024
        if source != model:
            shutil.rmtree(source)
        source = target
        yield CommandCost(command, peak, seconds)


def main() -> None:
    """Measure all commands and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--memory", default="512MiB")
    arguments = parser.parse_args()
    folder, model = arguments.folder / "convert-memory", random_model(arguments.gigabytes)
    try:
        write_model(model, folder / "model", 10**9)
        print(f"weights: {format_bytes(4 * parameters(model))}, --memory {arguments.memory}")
        rows = [
            (f"`{cost.command}`", format_bytes(cost.peak_bytes), f"{cost.seconds:.0f} s")
            for cost in measure(folder, arguments.memory)
        ]
        print(markdown_table(("command", "peak resident memory", "time"), rows))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
