"""Who is who: ranks, process groups, devices. Passed as a value, never kept in a global.

world = data parallel x tensor parallel, and tensor-parallel ranks are neighbours:
rank = dp_rank * tp + tp_rank. Only this file reads the launcher's environment.
"""

import atexit
import gc
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megagrow.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What the launcher (deepspeed, torchrun, or nobody) says of this process."""

    rank: int
    world_size: int
    local_rank: int


def read_launch() -> Launch:
    """The launcher's rank variables; a process started without a launcher is a world of one."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    given = {name: os.environ[name] for name in alone if name in os.environ}
    if given and len(given) < len(alone):
        missing = ", ".join(alone.keys() - given.keys())
        raise InputError(f"the launcher set {', '.join(given)} but not {missing}")
    return Launch(*map(int, (alone | given).values()))


def launcher_kills_all_ranks() -> bool:
    """Whether the launcher ends all ranks as soon as one has failed: torchrun and deepspeed do."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


SHARED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "CUBLAS_", "OMP_")
"""How the names of variables begin that decide how ranks compute and talk to each other."""

OWN_VARIABLES = ("NCCL_IB_HCA", "NCCL_HOSTID", "TRITON_CACHE_DIR")
"""Those among them that hosts may well set each for itself, as all that end in _IFNAME."""


def shared_variables() -> dict[str, str]:
    """Environment variables of this process that should have one value on all ranks."""
    names = [name for name in os.environ if name.startswith(SHARED_VARIABLES)]
    names += [name for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE") if name in os.environ]
    own = {name for name in names if name in OWN_VARIABLES or name.endswith("_IFNAME")}
    return {name: os.environ[name] for name in sorted({*names} - own)}


def choose_accelerator() -> None:
    """Tells DeepSpeed what to run on. It asks when it is imported, and warns if nobody says."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def tune_process() -> None:
    """Call once, when everything is imported and no large tensor has been made.

    On CPUs most of a growth is the first touch of new memory. torch asks for huge pages (2 MiB
    instead of 4 KiB, so 512 times fewer faults) only if this variable is set before its first
    large tensor. And what the imports made is never garbage: without it a collection takes
    milliseconds. torch itself imports its compiler, half of all objects, only in the first step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind calls what triton has made leaks


def init_process_group(launch: Launch, timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Joins the ranks (nccl on GPUs, gloo on CPUs) and returns this rank's device."""
    tune_process()
    # DeepSpeed reads it, also where the process was started without a launcher.
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    return join_ranks(launch, _meeting_place(launch, timeout), timeout)


def join_ranks(launch: Launch, store: Any, timeout: timedelta) -> torch.device:
    """Makes the process group of all ranks, who meet in `store`; returns this rank's device."""
    device = own_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    return device


def own_device(launch: Launch) -> torch.device:
    """What a rank computes on: a GPU of its own where there are any."""
    if torch.cuda.is_available():
        return torch.device("cuda", launch.local_rank)
    return torch.device("cpu")


def first_host() -> str:
    """Where rank 0 runs, as the launcher says."""
    return os.environ.get("MASTER_ADDR", "localhost")


def _meeting_place(launch: Launch, timeout: timedelta) -> Any:
    """The store through which the ranks find each other, when all of them have come."""
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    meetings = rendezvous("env://", launch.rank, launch.world_size, timeout=timeout)
    store, *_ = next(meetings)
    store.set_timeout(timeout)
    return _own_part(store)


def open_store(launch: Launch, timeout: timedelta) -> Any:
    """The same store, which waits for nobody but whoever keeps it: rank 0, or torchrun.

    RuntimeError where that one does not answer in time.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    port = os.environ.get("MASTER_PORT")
    if port is None:
        raise InputError("the launcher did not set MASTER_PORT")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *(first_host(), int(port), launch.world_size, launch.rank == 0 and not kept, timeout),
        wait_for_workers=False,
    )
    return _own_part(store)


def _own_part(store: Any) -> Any:
    """Ranks that torchrun has started again get the store of those before them: without a part of
    their own in it they would wait for the addresses of the dead."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start-{start}", store)  # type: ignore[attr-defined]


def leave_process_group() -> None:
    """Ends the job on all ranks together: none leaves while another still talks to it."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Topology:
    """The ranks of one stage as a grid, with this rank's two process groups.

    It is also the `mpu` that DeepSpeed asks for (Megatron-LM's names for the same grid).
    """

    rank: int
    dp: int
    tp: int
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group


def make_topology(tp: int, device: torch.device) -> Topology:
    """The grid for a tensor-parallel size; all ranks call this together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dp = world // tp
    tp_groups = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
    dp_groups = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
    return Topology(rank, dp, tp, dp_groups[rank % tp], tp_groups[rank // tp], device)


def destroy_topology(topology: Topology) -> None:
    """Gives the two process groups back."""
    dist.destroy_process_group(topology.tp_group)
    dist.destroy_process_group(topology.dp_group)


def any_across_ranks(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank; all ranks together."""
    vote = torch.tensor([float(flag)], device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return vote.item() > 0


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0 alone, on all ranks; if it fails there, all raise the same."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = action()
        except (InputError, OSError) as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    result, problem = found
    if problem is not None:
        raise InputError(problem)
    return result


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; if it fails on one, the same error is raised on all.

    For whatever may go wrong on a single rank (a full disk, a damaged file): without this, the
    others would wait in their next collective for ever.
    """
    results: list[T] = []
    problem = None
    try:
        results.append(action())
    except (InputError, OSError) as error:
        problem = str(error)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if found:
        rank, text = found[0]
        raise InputError(text if len(found) == len(problems) else f"rank {rank}: {text}")
    return results[0]
