"""Public Python API: prepare data, load and train runs, grow, convert and evaluate checkpoints.

Each function does the same as the command of that name and validates its arguments in the same
way: invalid input raises a subclass of `megagrow.errors.InputError` with a one-line message.
Importing this module imports neither torch nor DeepSpeed.

`train` and `evaluate` are collective: under torchrun or the deepspeed launcher all ranks call
them; without a launcher they run on one process. All other functions run on one process.
"""

from megagrow.api.checkpoints import (
    LayoutOptions,
    export_hugging_face,
    grow,
    import_hugging_face,
    reshard,
    text_loss,
)
from megagrow.api.runs import evaluate, load_run, prepare, read_metrics, train, verify_corpus

__all__ = [
    "LayoutOptions",
    "evaluate",
    "export_hugging_face",
    "grow",
    "import_hugging_face",
    "load_run",
    "prepare",
    "read_metrics",
    "reshard",
    "text_loss",
    "train",
    "verify_corpus",
]
