"""Whether lm-eval is here: an optional part, of which only evaluation knows."""

import importlib.util

from megagrow.errors import InputError


def need_lm_eval() -> None:
    """InputError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("evaluation needs lm-eval: pip install megagrow[eval]")
