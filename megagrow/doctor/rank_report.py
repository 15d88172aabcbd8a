"""Report of one rank: software versions, environment variables and state of its device."""

import hashlib
import platform
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megagrow.parallel.launch import Launch, own_device, shared_variables
from megagrow.train.reporting.run_files import package_version

COMPARED_PACKAGES = ("megagrow", "torch", "deepspeed", "triton", "numpy")

MATMUL_SIZE = 8192
"""Rows and columns of the square matrices of the GPU benchmark."""

MATMULS = 20
"""Number of timed matrix products."""


@dataclass(frozen=True)
class GpuReport:
    """State of a GPU, measured by its rank."""

    uuid: str
    memory: int
    """Total memory in bytes."""
    free: int
    """Free memory in bytes, before this rank allocates any."""
    teraflops: float
    """TFLOP/s of bf16 matrix products."""
    ecc_errors: int | None
    """Uncorrected memory errors since the driver was loaded; None if unknown."""


@dataclass(frozen=True)
class RankReport:
    """Local state of one rank."""

    rank: int
    local_rank: int
    host: str
    device: str
    """`cpu`, or the name of the GPU."""
    versions: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that must be equal on all ranks."""
    gpu: GpuReport | None = None
    device_error: str | None = None
    """First line of the device's error; None if the device works."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RankReport":
        """Build a report from the values of `to_json`."""
        gpu = values["gpu"]
        return cls(**values | {"gpu": None if gpu is None else GpuReport(**gpu)})


def collect_report(launch: Launch) -> RankReport:
    """Return the report of this process. A failing device is reported and does not raise."""
    device = own_device(launch)
    name, gpu, device_error = device.type, None, None
    if device.type == "cuda":
        try:
            name, gpu = torch.cuda.get_device_name(device), _probe_gpu(device)
        except (RuntimeError, AssertionError) as error:  # torch raises both for invalid devices
            device_error = str(error).splitlines()[0]
    return RankReport(
        launch.rank,
        launch.local_rank,
        socket.gethostname(),
        name,
        _versions(),
        shared_variables(),
        gpu,
        device_error,
    )


def _versions() -> dict[str, str]:
    packages = {name: package_version(name) or "not installed" for name in COMPARED_PACKAGES}
    cuda = {"CUDA of torch": torch.version.cuda or "none"}
    return {"python": platform.python_version()} | packages | cuda | {"code": _code()}


def _code() -> str:
    """Return a digest of megagrow's source files; equal versions may have different code."""
    root, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _probe_gpu(device: torch.device) -> GpuReport:
    free, memory = torch.cuda.mem_get_info(device)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return GpuReport(uuid, memory, free, _teraflops(device), _ecc_errors(uuid))


def _teraflops(device: torch.device) -> float:
    """Measure TFLOP/s of bf16 products of square matrices, after one warm-up product."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device)
    b = torch.ones_like(a)
    out = a @ b
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(MATMULS):
        torch.mm(a, b, out=out)
    torch.cuda.synchronize(device)
    return 2 * MATMULS * MATMUL_SIZE**3 / (time.perf_counter() - begin) / 1e12


def _ecc_errors(uuid: str) -> int | None:
    """Query nvidia-smi; return None if it is missing or the GPU does not count errors."""
    query = "--query-gpu=ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", uuid]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
