"""Peak memory of this rank: of the GPU's allocator, or of the process on a CPU."""

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes; the highest use since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
