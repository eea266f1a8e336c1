"""What the sections of `params.yaml` are made of: their base class, and types of values that several of them have."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _distinct(values: list[Any]) -> list[Any]:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"names {repeated} more than once")
    return values


Distinct = AfterValidator(_distinct)


def _words(value: str) -> str:
    try:
        if shlex.split(value):
            return value
        raise ValueError("it is empty")
    except ValueError as error:
        raise ValueError(f"is {value!r}, which is no beginning of a command line: {error}") from None


Words = Annotated[str, AfterValidator(_words)]
"""The beginning of a command line, as a shell splits it."""


class Section(BaseModel):
    """Base of all sections: immutable; an unknown key, or a value of another type (`"5"`, `yes`), is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Attention(Section):
    """Base of what attends: `heads` of equal size share `width` channels."""

    width: Count
    heads: Count

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class NoiseLevels(Section):
    """Base of what denoises: from `sigma_max` down to `sigma_min`, in units of the data's standard deviation."""

    sigma_max: Positive
    sigma_min: Positive

    @model_validator(mode="after")
    def _sigmas_are_ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) must be smaller than sigma_max ({self.sigma_max})")
        return self
