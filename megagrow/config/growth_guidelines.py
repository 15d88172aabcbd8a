"""Published guidelines for growth, from Du et al. 2024, "Stacking Your Transformers".

Equation 2 gives the tokens to train before a growth (section 4.2, appendix G.1); the constants
below are the limits and measurements of the paper. Run files refer to them by `tokens: auto`.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from megagrow.config.schema import RunConfig
from megagrow.model.layers.flops import non_embedding_parameters

A, B, C = 0.88, 163.27, -5.74
"""Coefficients of log10 d = A log10 N + B / log10 C + C, as in the paper and its code."""

FITTED_PARAMETERS = (0.3e9, 3e9)
"""Range of the fit in parameters without embeddings: the paper's 410M model has 0.31B, its 3B model
2.2B (N = 3B by its name)."""

FITTED_FLOPS = 1.2e21
"""Largest FLOP budget of the fit; the budgets of the paper's Table 4 are 70 to 700 times larger."""


def growth_tokens(target_parameters: float, target_tokens: float) -> float:
    """Return the tokens d to train the base model before the growth, by equation 2.

    `target_parameters` (N) are the parameters of the grown model without embeddings,
    `target_tokens` (D) the tokens after the growth. The budget is C = 6 N D FLOPs. All runs of the
    fit had growth factor 4.
    """
    flops = training_flops(target_parameters, target_tokens)
    return float(10 ** (A * math.log10(target_parameters) + B / math.log10(flops) + C))


def training_flops(target_parameters: float, target_tokens: float) -> float:
    """Return C = 6 N D of equation 2."""
    return 6 * target_parameters * target_tokens


def outside_fit(target_parameters: float, target_tokens: float) -> str | None:
    """Describe which of N and C is outside the range of the fit of equation 2; None if neither is.

    The runs of the fit had N of 410M, 1.1B and 3B by name, and C up to 1.2e21.
    """
    low, high = FITTED_PARAMETERS
    flops = training_flops(target_parameters, target_tokens)
    outside = []
    if not low <= target_parameters <= high:
        outside.append(f"N = {target_parameters:.3g} (fitted: {low:.2g} to {high:.2g})")
    if flops > FITTED_FLOPS:
        outside.append(f"C = 6ND = {flops:.3g} (fitted: up to {FITTED_FLOPS:.2g})")
    return " and ".join(outside) or None


def timing_warnings(run: RunConfig) -> list[str]:
    """Return warnings about `tokens: auto` outside the range of equation 2's fit, and about growths
    that change nothing."""
    warnings = [
        f"stages.{index}: the model is that of the previous stage, so its growth adds no parameter"
        for index in range(1, len(run.stages))
        if run.stages[index].growth and run.stages[index].model == run.stages[index - 1].model
    ]
    for index, stage in enumerate(run.stages):
        if stage.tokens_auto:
            after = run.stages[index + 1]
            outside = outside_fit(non_embedding_parameters(after.model), after.tokens)
            if outside:
                warnings.append(
                    f"stages.{index}.tokens = auto: equation 2 gives {stage.tokens:,} tokens, "
                    f"outside the range of its fit: {outside}"
                )
    return warnings


MOST_FACTOR = 4
"""Largest growth factor that the paper recommends; the optimum is 2 to 4 (section 4.2)."""


LEAST_LAYERS = 2
"""Fewest layers of a base; one layer was worse than training from scratch (section 4.2, appendix
G.2)."""


LATE_SHARE = 0.8
"""Share of the tokens before the growth of a base of 0 or 1 layers under WSD in Bu et al. 2025
(arXiv 2511.04981), who report a loss within 0.2% of that of the model of fixed size."""


EARLY, LATE = 1 / 10, 5
"""Ratios to equation 2 beyond which a base is reported as short or long: those of the shortest and
the longest base of the fit, 1B and 50B tokens, to the 10B of the paper's large runs (section 4)."""


FACTOR_OF_WARM_STARTS = 2
"""Most reliable growth factor in a study of warm starts (arXiv 2605.13405)."""


TOKENS_OF_WARM_STARTS = 20
"""Tokens per parameter below which that study found the largest gains; they shrink with more."""


def findings(run: RunConfig, index: int, factor: float) -> list[str]:
    """Return warnings where the growth of a stage deviates from published findings on size and time
    of a growth, which contradict each other.

    `factor` is the ratio of parameters without embeddings, after over before the growth.
    """
    warnings, layers = [], run.stages[index - 1].model.num_hidden_layers
    if layers < LEAST_LAYERS:
        warnings.append(
            f"stages.{index - 1}.model.num_hidden_layers = {layers}: findings contradict each "
            "other. In Du et al. 2024 (section 4.2) a base of one layer was worse than no base; in "
            f"arXiv 2511.04981 a base of 0 or 1 layers was not, with a growth at {LATE_SHARE:.0%} "
            f"of the tokens, under WSD, without a second warm-up. {_compared(run, index)}"
        )
    elif size := _unusual_length(run, index):
        warnings.append(size)
    if factor > MOST_FACTOR:
        warnings.append(
            f"stages.{index}: the growth factor is {factor:.1f}; the paper recommends 2 to "
            f"{MOST_FACTOR}, and arXiv 2605.13405 found {FACTOR_OF_WARM_STARTS} the most reliable"
        )
    return warnings


def _share(run: RunConfig, index: int) -> float:
    """Return the share of a run's tokens before the growth of a stage."""
    tokens = [stage.tokens for stage in run.stages]
    return sum(tokens[:index]) / sum(tokens)


def _compared(run: RunConfig, index: int) -> str:
    """Compare the growth of a small base with arXiv 2511.04981."""
    stage, share = run.stages[index], _share(run, index)
    others = [f"grows at {share:.0%} of its tokens"] if abs(share - LATE_SHARE) > 0.1 else []
    if stage.schedule.type != "wsd":
        others.append(f"has schedule.type = {stage.schedule.type}")
    if stage.growth is not None and stage.growth.lr_schedule == "rewarm":
        others.append("has growth.lr_schedule = rewarm")
    return f"This run {' and '.join(others)}" if others else "This run is like the latter"


def _unusual_length(run: RunConfig, index: int) -> str | None:
    """Compare the length of a base with equation 2, within the range of its fit."""
    stage, before = run.stages[index], sum(each.tokens for each in run.stages[:index])
    size = non_embedding_parameters(stage.model)
    if outside_fit(size, stage.tokens):
        return None
    advised = growth_tokens(size, stage.tokens)
    if EARLY <= before / advised <= LATE:
        return None
    return (
        f"stages.{index}: the growth is after {before:.3g} tokens ({_share(run, index):.0%} of the "
        f"run), where equation 2 gives {advised:.3g}. Growths at {LATE_SHARE:.0%} are published "
        "for bases of 0 or 1 layers only (arXiv 2511.04981)"
    )


SPEEDUPS = (0.41, 0.55)
"""FLOPs from scratch / FLOPs with Gstack - 1 at equal training loss and growth factor 4, in the
paper: the range of its 7B run from 160B to 300B tokens (section 4.1). Its 1.1B and 3B models
are between 39% and 54.5%; 410M falls to 31% at 700B tokens. One seed each."""


RATES = (
    (373_867_520, 6e-4),
    (1_364_297_728, 3e-4),
    (2_397_473_280, 1.6e-4),
    (5_933_109_248, 1e-4),
)
"""Total parameters of the paper's models (410M, 1.1B, 3B and 7B by name) with their peak learning
rates (appendix B.3, Table 1)."""


LARGE_BATCH = 4
"""Ratio to `best_batch` above which a batch is reported as too large. The optimum is broad; the
paper's batch has a ratio of 3.6 for the base of its 1.1B model and 5.6 for that of its 410M."""


def best_batch(parameters: float, tokens: float) -> float:
    """Return the optimal batch in tokens: 0.2920 C^0.3271 (DeepSeek LLM, arXiv 2401.02954, sec. 3).

    C = 6 N D, with N = `parameters` without embeddings. Fitted for C from 1e17 to 2e19.
    """
    return float(0.2920 * (6 * parameters * tokens) ** 0.3271)


def connection_rate(layers: Sequence[int]) -> float:
    """Return Rc: the share of adjacent layers in the grown model that were adjacent in its source.

    `layers` has the source of each layer, -1 for none. 1.0 for fewer than two layers. Of partial
    stacks of equal size, those with higher Rc were better (appendix H).
    """
    pairs = list(pairwise(layers))
    kept = sum(below >= 0 and above == below + 1 for below, above in pairs)
    return kept / len(pairs) if pairs else 1.0


def rate_for_size(parameters: int) -> float:
    """Return the peak learning rate for a model with this many parameters, by the paper's Table 1.

    Log rate is interpolated linearly in log size, and extrapolated beyond the table.
    """
    sizes = [size for size, _ in RATES]
    right = min(max(bisect_right(sizes, parameters), 1), len(RATES) - 1)
    (low, low_rate), (high, high_rate) = RATES[right - 1 : right + 1]
    way = math.log(parameters / low) / math.log(high / low)
    return float(low_rate * (high_rate / low_rate) ** way)
