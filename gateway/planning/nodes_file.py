"""`--nodes FILE`: the machines that a plan is made for, as YAML. Checked before anything is planned.

Every field is explained in docs/placement.md. Called by `gateway.planning.command`; what the values come to for a model
is `gateway.planning.nodes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gateway.byte_sizes import parse_bytes
from gateway.errors import OptionInvalid
from gateway.rates import parse_rate, parse_time
from gateway.service.config_file import read_config
from gateway.service.option_values import MAX_SHOWN_CHARS, OWN_MESSAGE

T = TypeVar("T")
MAX_NODES = 64


def _reader(parse: Callable[[str], T], example: str) -> BeforeValidator:
    """Of a text with a unit: a number alone would leave it to be guessed."""

    def read(value: object) -> T:
        if not isinstance(value, str):
            raise PydanticCustomError(
                OWN_MESSAGE, "must be a text with a unit, such as {example}", {"example": example}
            )
        try:
            return parse(value)
        except ValueError as error:
            raise PydanticCustomError(OWN_MESSAGE, "{reason}", {"reason": str(error)}) from error

    return BeforeValidator(read)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[int, _reader(parse_bytes, "24GiB")]
Rate = Annotated[float, _reader(parse_rate, "10Gb/s")]
Seconds = Annotated[float, _reader(parse_time, "0.2ms")]
NodeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-")
    )


class NodeEntry(_Strict):
    """One machine. A field's description completes "must be"."""

    name: NodeName = Field(description="a name of letters, digits, dots, dashes and underscores")
    memory: Size = Field(description="a size such as 64GiB: host memory that is free for the service")
    cores: int = Field(4, ge=1, le=4096, description="a whole number of cores from 1 to 4096")
    gpus: Annotated[tuple[Size, ...], BeforeValidator(_as_tuple)] = Field(
        (), max_length=16, description="a list of at most 16 sizes: the free memory of each GPU"
    )
    bandwidth: Rate = Field(
        10**9 / 8, description="a rate such as 10Gb/s: between it and the router's machine"
    )
    round_trip: Seconds = Field(0.5e-3, description="a time such as 0.2ms: from a call to its answer")
    speed: Rate | None = Field(
        None, description="a rate such as 40GB/s: expert bytes multiplied with one row"
    )
    disk: Size | None = Field(None, description="a size such as 200GiB: disk that is free for expert records")
    disk_speed: Rate = Field(1e9, description="a rate such as 2GB/s: of reading expert records")
    has_store: bool | None = Field(None, description="true or false: whether the whole store is on its disk")


class NodesFile(_Strict):
    """All machines."""

    router: NodeName | None = Field(None, description="the name of the machine that runs the router")
    nodes: Annotated[tuple[NodeEntry, ...], BeforeValidator(_as_tuple)] = Field(
        min_length=1, max_length=MAX_NODES, description=f"a list of 1 to {MAX_NODES} machines"
    )

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [node.name for node in self.nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PydanticCustomError(OWN_MESSAGE, "nodes: {name} comes twice", {"name": twice[0]})
        if self.router is not None and self.router not in names:
            raise PydanticCustomError(OWN_MESSAGE, "router: {name} is no node", {"name": self.router})
        return self

    @property
    def router_name(self) -> str:
        return self.router or self.nodes[0].name


def read_nodes(path: Path) -> NodesFile:
    """Raises FileUnusable or OptionInvalid, which names the field and what it must be."""
    value = read_config(path)
    try:
        return NodesFile.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(first["loc"])
        raise OptionInvalid(f"{path}: {place}".removesuffix(": "), _what_it_must_be(first)) from error


def _place(location: tuple[int | str, ...]) -> str:
    """`nodes[1].round-trip`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:MAX_SHOWN_CHARS]


def _what_it_must_be(first: Any) -> str:
    shown = str(first["input"])[:MAX_SHOWN_CHARS]
    if first["type"] == "extra_forbidden":
        known = ", ".join(str(field.alias) for field in NodeEntry.model_fields.values())
        return f"is no field of a node; they are {known}"
    if first["type"] == "missing":
        return "is missing"
    if first["type"] == OWN_MESSAGE:
        return str(first["msg"]) if len(first["loc"]) == 0 else f"{first['msg']}, not {shown!r}"
    name = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "")
    fields = (*NodeEntry.model_fields.values(), *NodesFile.model_fields.values())
    described = next((field.description for field in fields if field.alias == name), None)
    return f"must be {described}, not {shown!r}" if described else f"{first['msg']}, not {shown!r}"
