"""What becomes of the optimizer's state at a growth, by policy.

`transport` moves m and v by the lifts of their weights (v by the squares). `asymmetric` does so for
old entries and lets new ones start at zero, which lets copies grow apart (SPARKLING, arXiv
2602.02472, section 4.2). `keep_v` moves v and drops m. `probe_v` is `asymmetric` with the v of new
entries measured on a few batches. `reset` drops everything and Adam's step with it.
"""

import numpy as np

from megagrow.config.growth import StatePolicy
from megagrow.growth.map import Axis, Dense, Fresh, Gather, Kind, Term


def kinds_of(policy: StatePolicy) -> tuple[Kind, ...]:
    """The kinds of state that move."""
    match policy:
        case "reset":
            return ("fp32",)
        case "keep_v":
            return ("fp32", "exp_avg_sq")
        case _:
            return ("fp32", "exp_avg", "exp_avg_sq")


def without_fresh(terms: tuple[Term, ...], fresh: Fresh) -> tuple[Term, ...]:
    """The terms of a parameter's moments for its old entries only."""
    if fresh.whole:
        return ()
    return tuple(term if isinstance(term, Dense) else _old_part(term, fresh) for term in terms)


def _old_part(term: Gather, fresh: Fresh) -> Gather:
    return Gather(term.source, _old(term.rows, fresh.rows), _old(term.cols, fresh.cols))


def _old(along: Axis, fresh: np.ndarray | None) -> Axis:
    if fresh is None:
        return along
    index = np.arange(len(fresh)) if along.index is None else along.index
    return Axis(np.where(fresh, -1, index), along.scale)
