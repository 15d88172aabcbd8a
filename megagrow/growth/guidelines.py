"""What the paper advises and measured, as numbers: Du et al. 2024, "Stacking Your Transformers".

When to grow is in `config/timing.py`, since a run file may ask for it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

MOST_FACTOR = 4
"""The largest growth factor that the paper advises; the optimum lay between 2 and 4 (sec. 4.2)."""

LEAST_LAYERS = 2
"""A base of one layer was worse than training from scratch (section 4.2, appendix G.2)."""

SPEEDUPS = (0.41, 0.55)
"""FLOPs from scratch / FLOPs with Gstack - 1 at equal training loss, as the paper measured it at
growth factor 4: the range of its 7B run from 160B to 300B tokens (section 4.1). Of its other sizes
1.1B and 3B lie between 39% and 54.5%; 410M falls to 31% at 700B tokens. One seed each."""

RATES = (
    (373_867_520, 6e-4),
    (1_364_297_728, 3e-4),
    (2_397_473_280, 1.6e-4),
    (5_933_109_248, 1e-4),
)
"""Parameters in all of the paper's models (410M, 1.1B, 3B and 7B by name) and the peak learning
rate at which each was trained (appendix B.3, Table 1)."""


LARGE_BATCH = 4
"""Beyond so many times `best_batch` a batch is called too large. The optimum is broad; the paper's
batch is 3.6 times that for the base of its 1.1B, 5.6 times for that of its 410M."""


def best_batch(parameters: float, tokens: float) -> float:
    """Tokens of a batch that trains best: 0.2920 C^0.3271 (DeepSeek LLM, arXiv 2401.02954, sec. 3).

    C = 6 N D, `parameters` N being those outside the embeddings. Fitted for C of 1e17 to 2e19.
    """
    return float(0.2920 * (6 * parameters * tokens) ** 0.3271)


def connection_rate(layers: Sequence[int]) -> float:
    """Rc: the share of neighbours in the grown model that were neighbours in its source.

    `layers` names for each new layer the one that it copies, -1 for none; 1.0 where there are no
    two layers (appendix H: of equally large partial stacks, those of higher Rc were better).
    """
    pairs = list(pairwise(layers))
    kept = sum(below >= 0 and above == below + 1 for below, above in pairs)
    return kept / len(pairs) if pairs else 1.0


def rate_for_size(parameters: int) -> float:
    """The peak learning rate for a model of so many parameters in all, by the paper's Table 1.

    Between its sizes log rate is linear in log size; beyond them the outer segments go on.
    """
    sizes = [size for size, _ in RATES]
    right = min(max(bisect_right(sizes, parameters), 1), len(RATES) - 1)
    (low, low_rate), (high, high_rate) = RATES[right - 1 : right + 1]
    way = math.log(parameters / low) / math.log(high / low)
    return float(low_rate * (high_rate / low_rate) ** way)
