"""Initial weights that do not depend on the layout.

Element i of a tensor is a pure function of (seed, tensor name, i): a counter-based generator gives
any range of it without drawing the rest, so every rank draws exactly what it holds.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from megagrow.parallel.sharding import ParamSpec


def initial_rows(spec: ParamSpec, seed: int, rows: range) -> Tensor:
    """Rows of a parameter at the start of training: (len(rows), spec.cols), fp32, on the CPU.

    Norm gains are 1; all else is normal with mean 0 and the standard deviation of the plan.
    """
    if spec.init_std == 0:
        return torch.ones(len(rows), spec.cols)
    first, count = rows.start * spec.cols, len(rows) * spec.cols
    return normal(f"{seed}/{spec.name}", first, count).mul_(spec.init_std).view(-1, spec.cols)


def normal(stream: str, first: int, count: int) -> Tensor:
    """Elements first..first+count of the named stream of standard normals, fp32.

    Philox (Salmon et al. 2011) counted from the stream's start, mapped by the normal quantile.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    # One step of the counter gives four 64-bit numbers.
    generator = np.random.Philox(key=key, counter=first // 4)
    # 52 bits and a half fill fp64's 53: never rounded up to 1, whose quantile is infinite.
    bits = generator.random_raw(first % 4 + count)[first % 4 :] >> np.uint64(12)
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
    return torch.special.ndtri(uniform).float()
