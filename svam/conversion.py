"""The section `convert` of `params.yaml`, and the types in which it, the store and a policy's checkpoint say what was done to a
data set's actions. The arithmetic is `svam.actions` and `svam.episodes.changes`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from svam.errors import describe
from svam.sections import Count, Name, Positive, Section


def _increasing(columns: list[int]) -> list[int]:
    if columns[0] >= columns[1]:
        raise ValueError(f"columns {columns} must be [first, end], of which the end is left out")
    return columns


Columns = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2), AfterValidator(_increasing)]
"""[first, end]: columns of a vector, the end left out."""
COLUMNS_OF = r"^(actions|expert_actions|state|proprioception)(?:\[(\d{1,6})(?::(\d{1,6}))?\])?$"
"""A vector, one of its columns, or some that follow one another: `actions`, `state[6]`, `actions[0:6]`."""
ROTATION_COLUMNS = {
    "rotation_vector": 3, "euler_xyz": 3, "euler_XYZ": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4, "rotation_6d": 6,
}  # fmt: skip
"""How many columns a rotation has, see `svam.actions`."""


class Interval(Section):
    """A range of values, of some columns of the actions."""

    columns: Columns
    low: float
    high: float

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be smaller than high ({self.high:g})")
        return self


class Difference(Section):
    """Columns of the actions that are stored as the way to them from where the robot is, which columns of the proprioception
    say. kind: "linear" for positions or joints, any number of them; else how a rotation is written, of three columns of the
    position and the rotation's, or of the rotation's alone. frame: in which the way is stated. See `svam.actions`."""

    columns: Columns
    proprioception: Columns
    kind: Literal["linear", "rotation_vector", "euler_xyz", "euler_XYZ", "quaternion_xyzw", "quaternion_wxyz", "rotation_6d"]
    frame: Literal["fixed", "tool"]

    @model_validator(mode="after")
    def _widths_agree(self) -> Self:
        width, base = (end - first for first, end in (self.columns, self.proprioception))
        rotation = ROTATION_COLUMNS.get(self.kind, width)
        if width != base or width not in (rotation, rotation + 3):
            expected = (
                "as many" if self.kind == "linear" else f"{rotation}, or {rotation + 3} with a position before it, and as many"
            )
            raise ValueError(
                f"{self.kind} needs {expected} columns of the actions and of the proprioception, found {self.columns} and "
                f"{self.proprioception}"
            )
        if self.kind == "linear" and self.frame == "tool":
            raise ValueError("a linear difference is in the fixed frame; in the tool's, name position and rotation together")
        return self


def overlap(ranges: list[list[int]]) -> list[int]:
    """The columns that several ranges have."""
    columns = [column for first, end in ranges for column in range(first, end)]
    return sorted({column for column in columns if columns.count(column) > 1})


class ChosenColumns(Section):
    """For each vector the columns that are joined to it, in their order, as `COLUMNS_OF` says; none: as the source has it."""

    actions: list[Annotated[str, Field(pattern=COLUMNS_OF)]]
    expert_actions: list[Annotated[str, Field(pattern=COLUMNS_OF)]]
    state: list[Annotated[str, Field(pattern=COLUMNS_OF)]]
    proprioception: list[Annotated[str, Field(pattern=COLUMNS_OF)]]


class DataSet(Section):
    """One of several data sets that a model learns from. weight: its share of what training draws, among the weights of all.
    policy: whether the policy learns from it. convert: keys of the section `convert` that it has of its own."""

    name: Name
    weight: Positive
    policy: bool
    convert: dict[str, Any]


class Convert(Section):
    """Any supported dataset to one Zarr store, or several."""

    sets: list[DataSet]
    manifest: str
    source: str
    path: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    depends_on: str
    options: dict[str, Any]
    cameras: list[str]
    foreseen: Count
    episodes: list[int | str]
    drop: list[int | str]
    tasks: list[str]
    success: bool | None
    rate_hz: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    instruction: Annotated[str, Field(pattern=r"\S")] | None
    missing_instruction: Annotated[str, Field(pattern=r"\S")] | None
    captions: str | None
    segments: bool
    columns: ChosenColumns
    unwrap: list[Interval]
    resample_hz: Positive | None
    shift: Annotated[int, Field(ge=0)]
    differences: list[Difference]
    image_size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None
    crop: Literal["none", "centre"]
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)]
    binary_dimensions: list[Annotated[int, Field(ge=0)]]
    binary_values: Annotated[list[float], Field(min_length=2, max_length=2)]
    limits: list[Interval]
    normalisation: Literal["minmax", "quantile", "meanstd"]
    vector_dtype: Literal["float32", "float16"]
    compression: Literal["zstd", "lz4", "blosc", "jpegxl", "webp"]
    quality: Annotated[int, Field(ge=1, le=100)]
    chunk_frames: Annotated[int, Field(ge=1, le=65534)]
    shard_megabytes: Annotated[float, Field(gt=0.0, le=64.0)]

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _sets_are_whole(self) -> Self:
        names = [one.name for one in self.sets]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sets name {repeated} more than once")
        for one in self.sets:
            if of_all := sorted({"sets", "manifest", "depends_on"} & one.convert.keys()):
                raise ValueError(f"sets, {one.name}: {of_all} can only stand beside sets, for all")
            try:
                self.of_set(one)
            except ValidationError as error:
                said = describe(error, f"sets, {one.name}", "convert.")
                raise ValueError("; ".join(said.splitlines())) from None
        return self

    def of_set(self, one: DataSet) -> Convert:
        """The section as a set has it."""
        values = self.model_dump() | one.convert | {"sets": []}
        if isinstance(columns := one.convert.get("columns"), dict):
            values["columns"] = self.columns.model_dump() | columns
        return Convert.model_validate(values)

    @property
    def parts(self) -> list[Convert]:
        """The section of each set; this one where there are none."""
        return [self.of_set(one) for one in self.sets] or [self]

    @model_validator(mode="after")
    def _changes_agree(self) -> Self:
        binary = [[d, d + 1] for d in self.binary_dimensions]
        changed = [d.columns for d in self.differences]
        for names, ranges in (
            ("differences and binary_dimensions", [*changed, *binary]),
            ("unwrap and binary_dimensions", [*(u.columns for u in self.unwrap), *binary]),
            ("limits and binary_dimensions", [*(u.columns for u in self.limits), *binary]),
            ("differences and unwrap", [*changed, *(u.columns for u in self.unwrap)]),
        ):
            if twice := overlap(ranges):
                raise ValueError(f"{names} both change column {twice[0]} of the actions, or one of them twice")
        if self.binary_values[0] == self.binary_values[1]:
            raise ValueError(f"binary_values are {self.binary_values}, expected two different values")
        if self.cameras and self.foreseen > len(self.cameras):
            raise ValueError(f"foreseen is {self.foreseen}, but cameras are {self.cameras}: name as many, or lower foreseen")
        if self.captions and self.instruction:
            raise ValueError("captions and instruction are both set; set one of them to null")
        return self
