"""When to grow: equation 2 of Du et al. 2024 (section 4.2, appendix G.1)."""

import math

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
