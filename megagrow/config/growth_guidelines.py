"""When to grow: equation 2 of Du et al. 2024 (section 4.2, appendix G.1)."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from megagrow.config.flops import non_embedding_parameters
from megagrow.config.schema import RunConfig

A, B, C = 0.88, 163.27, -5.74
"""The fit: log10 d = A log10 N + B / log10 C + C, as the paper and its code print it."""

FITTED_PARAMETERS = (0.3e9, 3e9)
"""Sizes that were fitted, outside the embeddings: the paper's 410M has 0.31B of them, its 3B 2.2B
(an N of 3B by its name)."""

FITTED_FLOPS = 1.2e21
"""The largest budget that was fitted; all of the paper's Table 4 lies 70 to 700 times beyond it."""


def growth_tokens(target_parameters: float, target_tokens: float) -> float:
    """Tokens d that the base is to train before it grows.

    `target_parameters` are those of the grown model outside its embeddings (N), `target_tokens`
    what that model trains on after the growth (D); the budget is C = 6 N D FLOPs, and the growth
    factor was 4 in every run of the fit.
    """
    flops = training_flops(target_parameters, target_tokens)
    return float(10 ** (A * math.log10(target_parameters) + B / math.log10(flops) + C))


def training_flops(target_parameters: float, target_tokens: float) -> float:
    """C of equation 2: 6 N D."""
    return 6 * target_parameters * target_tokens


def outside_fit(target_parameters: float, target_tokens: float) -> str | None:
    """What of N and C lies outside the range that equation 2 was fitted in; None if nothing does.

    The runs of the fit had N of 410M, 1.1B and 3B by name, and C of up to 1.2e21.
    """
    low, high = FITTED_PARAMETERS
    flops = training_flops(target_parameters, target_tokens)
    found = []
    if not low <= target_parameters <= high:
        found.append(f"N = {target_parameters:.3g} (fitted: {low:.2g} to {high:.2g})")
    if flops > FITTED_FLOPS:
        found.append(f"C = 6ND = {flops:.3g} (fitted: up to {FITTED_FLOPS:.2g})")
    return " and ".join(found) or None


def timing_warnings(run: RunConfig) -> list[str]:
    """What there is to say against stages whose `tokens` is auto: equation 2 is used beyond the
    range that it was fitted in."""
    warnings = []
    for index, stage in enumerate(run.stages):
        if stage.tokens_auto:
            after = run.stages[index + 1]
            found = outside_fit(non_embedding_parameters(after.model), after.tokens)
            if found:
                warnings.append(
                    f"stages.{index}.tokens = auto: equation 2 gave {stage.tokens:,} tokens, but "
                    f"beyond the range that it was fitted in: {found}"
                )
    return warnings


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
