"""What all sections of a run file have in common."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megagrow.config.sizes import parse_count

LARGEST_COUNT = 10**30
"""More FLOPs than there will be. Beyond it products of counts would not fit into a float."""

Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0, le=LARGEST_COUNT)]
"""A positive whole number, written for people: `2048`, `2M`, `10B`."""


class Section(BaseModel):
    """A part of a run file: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
