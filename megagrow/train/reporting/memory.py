"""Peak memory of this rank: the GPU allocator's, or the process's on a CPU."""

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """Return the highest use since the process started, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
