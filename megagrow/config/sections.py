"""What all sections of a run file have in common."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megagrow.common.sizes import parse_count

Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
"""A positive whole number, written for people: `2048`, `2M`, `10B`."""


class Section(BaseModel):
    """A part of a run file: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
