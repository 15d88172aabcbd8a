"""What one rank says of itself: programs, variables, its device and how that is."""

import hashlib
import platform
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megagrow.common.packages import package_version
from megagrow.parallel.launch import Launch, own_device, shared_variables

COMPARED_PACKAGES = ("megagrow", "torch", "deepspeed", "triton", "numpy")

MATMUL_SIZE = 8192
"""Rows and columns of the square matrices that tell how fast a GPU is."""

MATMULS = 20


@dataclass(frozen=True)
class GpuReport:
    """A GPU as its rank has found it."""

    uuid: str
    memory: int
    """Bytes."""
    free: int
    """Bytes that nobody uses; before this rank does."""
    teraflops: float
    """Of bf16 matrix products."""
    ecc_errors: int | None
    """Memory errors that could not be corrected, since the driver was loaded; None if unknown."""


@dataclass(frozen=True)
class RankReport:
    """What a rank knows by itself."""

    rank: int
    local_rank: int
    host: str
    device: str
    """`cpu`, or the name of the GPU."""
    versions: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that should be the same for all ranks."""
    gpu: GpuReport | None = None
    trouble: str | None = None
    """Why its device could not be looked at."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RankReport":
        """The report that `to_json` has made plain."""
        gpu = values["gpu"]
        return cls(**values | {"gpu": None if gpu is None else GpuReport(**gpu)})


def own_report(launch: Launch) -> RankReport:
    """The report of this process. A device that fails is told of, and raises nothing."""
    device = own_device(launch)
    name, gpu, trouble = device.type, None, None
    if device.type == "cuda":
        try:
            name, gpu = torch.cuda.get_device_name(device), _look_at(device)
        except (RuntimeError, AssertionError) as error:  # as torch raises both of a wrong device
            trouble = str(error).splitlines()[0]
    return RankReport(
        launch.rank,
        launch.local_rank,
        socket.gethostname(),
        name,
        _versions(),
        shared_variables(),
        gpu,
        trouble,
    )


def _versions() -> dict[str, str]:
    said = {name: package_version(name) or "not installed" for name in COMPARED_PACKAGES}
    cuda = {"CUDA of torch": torch.version.cuda or "none"}
    return {"python": platform.python_version()} | said | cuda | {"code": _code()}


def _code() -> str:
    """A digest of megagrow's files: two checkouts may have one version, and not be the same."""
    root, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _look_at(device: torch.device) -> GpuReport:
    free, memory = torch.cuda.mem_get_info(device)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return GpuReport(uuid, memory, free, _teraflops(device), _ecc_errors(uuid))


def _teraflops(device: torch.device) -> float:
    """Of bf16 products of square matrices, the first of which is not timed."""
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
    """By nvidia-smi, where it is there and the GPU counts them."""
    query = "--query-gpu=ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", uuid]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(said.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
