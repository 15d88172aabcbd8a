"""Three accounts of training cost in FLOPs, and the run settings they need.

`6 N, base in full`: 6 times the number of parameters of the current model, per token. This is the
project's account, stored in the run's records and used for sp.

`6 N, base at d / g`: the paper's charge: for a growth by factor g, d tokens of the base cost as
much as d / g tokens of the target (arXiv 2405.15319, footnotes 4 and 5). g is computed for every
operator as the ratio of non-embedding parameters of target and base. With a small vocabulary both
accounts agree; otherwise this one is lower, because embeddings do not grow by g.

`true, base in full`: FLOPs of all matrix products, attention included
(`model.layers.flops.flops_per_token`), stored in the run's records.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.model.layers.flops import non_embedding_parameters, paper_flops_per_token
from megagrow.train.reporting.run_files import CONFIG_FILE

Account = Literal["flops", "flops_true", "flops_charged"]
ACCOUNTS: dict[Account, str] = {
    "flops": "6 N per token, base in full",
    "flops_charged": "6 N per token, base at d / g (the paper's charge)",
    "flops_true": "true, attention included, base in full",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Properties of a run derived from its config.yaml."""

    config_key: str
    """Config as JSON without seed, name and directory, and its changes during the run: equal for
    runs that differ only in these."""
    charges: tuple[float, ...]
    """FLOPs per token of each stage, by the paper's charge."""
    has_full_cost: bool
    """True if the run pretrains from initial weights, so its records contain the full cost."""
    loss_data: str
    """First validation set, tokenizer and sequence length of the last stage: losses of equal ones
    can be compared."""


def read_setting(directory: Path, changes: Sequence[object] = ()) -> Setting | None:
    """Read the setting of the run in `directory`; return None if it has no config.yaml.

    `changes` are those of its configuration at resumes, as JSON values.

    Raises InputError if config.yaml is not a valid run file.
    """
    path = directory / CONFIG_FILE
    return make_setting(load_run(path), changes) if path.is_file() else None


def make_setting(run: RunConfig, changes: Sequence[object] = ()) -> Setting:
    """Derive the setting from a run's config and its changes during the run."""
    target = run.stages[-1].model
    per_parameter = paper_flops_per_token(target) / non_embedding_parameters(target)
    corpora = next(iter(run.data.validation.values()), [])
    measured = [corpus.model_dump(mode="json") for corpus in corpora]
    return Setting(
        config_key=run.model_dump_json(exclude={"seed", "name", "output_dir"})
        + json.dumps(changes),
        charges=tuple(per_parameter * non_embedding_parameters(s.model) for s in run.stages),
        has_full_cost=run.objective == "pretrain" and run.init_from is None,
        loss_data=json.dumps(
            [measured, str(run.data.tokenizer), run.stages[-1].data.sequence_length]
        ),
    )


def cumulative_flops(tokens: int, starts: Sequence[int], charges: Sequence[float]) -> float:
    """Return the FLOPs of the first `tokens` tokens of a run.

    `starts` are the token counts at which the stages start (the first is 0), `charges` the FLOPs
    per token of each stage.
    """
    ends = [*starts[1:], tokens]
    return sum(
        (min(tokens, end) - start) * charge
        for start, end, charge in zip(starts, ends, charges, strict=True)
        if start < tokens
    )
