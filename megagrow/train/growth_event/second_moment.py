"""Measured second moment of Adam for new entries: the `estimate_second_moment` policy.

With exp_avg_sq at zero the first updates of new entries would be too large where beta2 is near 1
(docs/reference/operators.md). What Adam would have gathered is measured instead, by steps that
change no
weight.
"""

import math
from collections.abc import Sequence

from megagrow.data.batches import Batch
from megagrow.errors import ConfigError
from megagrow.model.masks import Masks
from megagrow.train.stage import Stage
from megagrow.train.step import train_step


def measure_second_moment(
    stage: Stage, steps: Sequence[Sequence[Batch]], masks: Masks | None
) -> None:
    """Sets exp_avg_sq to the mean of g^2 over some steps' batches; all ranks together.

    The engine must hold its weights, and moments of zero. Each of `steps` is what `train_step`
    takes: this rank's micro batches of one step; `masks` are those of the stage's first step. The
    gradients are those that Adam is given, reduced and clipped; later steps weigh more, as in
    Adam's own mean, whose bias is taken out (v = sum of (1 - b) b^(n-k) g_k^2 over k / (1 - b^n),
    b = beta2). Gradients that are not finite are passed over. Weights and Adam's step stay as they
    are, exp_avg is zero. InputError if no gradient is finite.
    """
    engine = stage.engine
    adam_step = engine.adam_step
    engine.set_update_factors()
    norms = [train_step(stage, batches, lr=0.0, masks=masks)[1] for batches in steps]
    finite = sum(map(math.isfinite, norms))
    if not finite:
        raise ConfigError(
            f"growth of stage {stage.index}: no gradient of its estimate_second_moment is finite"
        )
    bias = 1.0 - stage.config.optimizer.betas[1] ** finite
    for kinds in engine.storage().values():
        kinds["exp_avg"].zero_()
        kinds["exp_avg_sq"].div_(bias)
    engine.ready(adam_step)
