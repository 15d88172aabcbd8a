"""Evaluation on lm-eval's tasks while a run trains: every key of `evaluation`."""

from pathlib import Path

from pydantic import Field

from megagrow.config.sections import Count, Section


class EvaluationConfig(Section):
    """When the model is evaluated, and on what (docs/guides/evaluation.md). The end of a stage and
    of the
    run always are. Needs lm-eval, `pip install megagrow[eval]`, and `data.tokenizer`."""

    interval: Count = 1000
    """Steps from one evaluation to the next."""
    tasks: list[str] = Field(default=["gstack"], min_length=1)
    """Of lm-eval; `gstack` stands for the paper's eight."""
    data_dir: Path | None = None
    """Local files of the tasks; null is the hub."""
    limit: Count | None = None
    """Documents of each task; null is all of them."""
    batch_size: Count = 16
    """Sequences in a pass of one data-parallel rank."""
