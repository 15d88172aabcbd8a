"""Three accounts of what training has cost, in FLOPs, and what they need to know of a run.

`6 N, base in full`: 6 times all parameters of the model of the moment, for each token. The account
of this project, as the run's records keep it, and what sp is measured by.

`6 N, base at d / g`: as the paper charges it: a growth by g makes d tokens of the base cost what
d / g tokens of the target do (arXiv 2405.15319, footnotes 4 and 5). The base has 1 / g of the
target's parameters outside the embeddings, which is how g is found here for every operator. On
small vocabularies both agree; the embeddings, which do not grow by g, make this one the cheaper.

`true, base in full`: the matrix products that are really done, attention included
(`config.flops.flops_per_token`), as the run's records keep it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagrow.config.flops import non_embedding_parameters, paper_flops_per_token
from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig

CONFIG_FILE = "config.yaml"
Account = Literal["flops", "flops_true", "flops_charged"]
ACCOUNTS: dict[Account, str] = {
    "flops": "6 N per token, base in full",
    "flops_charged": "6 N per token, base at d / g (the paper's charge)",
    "flops_true": "true, attention included, base in full",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run's config.yaml tells."""

    alike: str
    """The same text for runs that differ by their seed, name and directory only."""
    charges: tuple[float, ...]
    """FLOPs per token of each stage, by the paper's charge."""
    whole: bool
    """Whether it pretrains from initial weights: all that its model has cost is in its records."""


def read_setting(directory: Path) -> Setting | None:
    """The setting of the run in `directory`, None where it has no config.yaml.

    Raises InputError for one that is not a run file.
    """
    path = directory / CONFIG_FILE
    return setting_of(load_run(path)) if path.is_file() else None


def setting_of(run: RunConfig) -> Setting:
    """What matters of a run here."""
    target = run.stages[-1].model
    whole = paper_flops_per_token(target) / non_embedding_parameters(target)
    return Setting(
        alike=run.model_dump_json(exclude={"seed", "name", "output_dir"}),
        charges=tuple(whole * non_embedding_parameters(stage.model) for stage in run.stages),
        whole=run.stage == "pretrain" and run.init_from is None,
    )


def charged(tokens: int, starts: Sequence[int], charges: Sequence[float]) -> float:
    """FLOPs of the first `tokens` of a run whose stages begin at the tokens `starts`, the first
    one at 0, by what a token of each stage is charged."""
    ends = [*starts[1:], tokens]
    return sum(
        (min(tokens, end) - start) * charge
        for start, end, charge in zip(starts, ends, charges, strict=True)
        if start < tokens
    )
