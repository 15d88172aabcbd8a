"""Run simulations in a process of their own."""

import gc
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from megagrow.errors import InputError

MODULES = (
    "megagrow.simulation.rank",
    "torch._dynamo",  # by the first step
    "deepspeed.runtime.zero.muon.original_muon",  # by DeepSpeed's optimizers
)
"""Modules that the server imports for all simulations."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def isolated(
    function: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """Call a function in a new process and return its result, or raise its error.

    The device type of a simulation cannot be removed from a process, and autograd takes a new one
    only before its first backward pass. The process is therefore a fork of a server that has
    imported the modules, which takes most of the time otherwise, and has done nothing else. The
    function must be importable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    with ProcessPoolExecutor(1, context, initializer=_begin) as pool:
        return pool.submit(_call, partial(function, *args, **options)).result()


def _begin() -> None:
    torch.set_num_threads(1)  # a fork has no threads of OpenMP
    gc.freeze()  # a collection would copy the memory that is shared with the parent


def _call(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except InputError:
        raise
    except Exception as error:  # as text, since not every exception can be pickled
        raise RuntimeError("".join(traceback.format_exception(error))) from None
