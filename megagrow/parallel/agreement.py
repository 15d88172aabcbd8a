"""Errors and decisions shared by all ranks.

Without these functions, if one rank failed alone (disk full, damaged file), the others would hang
in their next collective.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megagrow.errors import InputError, ResourceError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """An error of one rank, in a form that can be sent to the others."""

    kind: type[InputError]
    message: str

    @classmethod
    def of(cls, error: InputError | OSError) -> "_Failure":
        kind = type(error) if isinstance(error, InputError) else ResourceError
        return cls(kind, str(error))


def any_across_ranks(flag: bool, device: torch.device) -> bool:
    """Return True if `flag` is set on at least one rank. Collective."""
    return any_flags_across_ranks([flag], device)[0]


def any_flags_across_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on at least one rank. Collective."""
    return share_values_and_flags(torch.empty(0, dtype=torch.float64, device=device), flags)[1]


def share_values_and_flags(
    values: torch.Tensor, flags: Sequence[bool]
) -> tuple[list[float], list[bool]]:
    """Return rank 0's values, and for each flag whether it is set on at least one rank. Collective.

    One all-reduce, and one synchronization with the device.

    Args:
        values: (n,) fp64, on the device of this rank.
        flags: as many on every rank.
    """
    # Adding zeros to rank 0's values is exact. `full` writes a flag to a GPU without a copy.
    own = values if dist.get_rank() == 0 else torch.zeros_like(values)
    votes = [values.new_full((1,), float(flag)) for flag in flags]
    shared = torch.cat([own, *votes])
    dist.all_reduce(shared)
    numbers = shared.tolist()
    return numbers[: len(values)], [count > 0 for count in numbers[len(values) :]]


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on all ranks. Collective.

    If it raises InputError or OSError, all ranks raise the same error.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (InputError, OSError) as error:
            outcome[1] = _Failure.of(error)
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure.kind(failure.message)
    return result


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result on this one. Collective.

    If it raises InputError or OSError on any rank, all ranks raise the error of the first such
    rank, prefixed with `rank N: ` unless all ranks failed.
    """
    results: list[T] = []
    failure = None
    try:
        results.append(action())
    except (InputError, OSError) as error:
        failure = _Failure.of(error)
    failures: list[_Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failed = [(rank, item) for rank, item in enumerate(failures) if item is not None]
    if failed:
        rank, first = failed[0]
        prefix = "" if len(failed) == len(failures) else f"rank {rank}: "
        raise first.kind(f"{prefix}{first.message}")
    return results[0]
