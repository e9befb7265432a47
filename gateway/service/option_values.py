"""Every option of `sage-moe serve` as a user gives it: name, kind, range and default, in one place.

Options come from the command line, a config file and defaults, in this order of precedence, under the same names,
and are checked by one model. Called by `gateway.service.command`; `gateway.service.options` makes of them what a
service is started with.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from cluster.placement import DEFAULT_OPTIONS, Grouping
from experts.budget import BudgetRequest
from experts.eviction import DEFAULT_EVICTION, EVICTIONS, Eviction
from extraction.errors import one_line
from gateway.byte_sizes import parse_budget, parse_bytes
from gateway.errors import OptionInvalid
from router.effort import EFFORT_CHOICES, EffortChoice
from router.errors import WeightsInvalid
from router.routing_choice import POLICIES, PolicyName
from router.scoring import DEFAULT_PRESET, PRESETS, SnarcWeights, read_weights

MOST_SEQUENCES = 512
"""As many rows the self-test at start proves to be exact with products that are not our own (docs/exactness.md)."""
BATCH_TOKENS, MOST_BATCH_TOKENS = 2048, 8192
DEFAULT_AUDIT_SHARE = 1e-4
"""An actor that is always wrong is found within 46,000 answers, some minutes of decoding, for a ten-thousandth of the
experts' work (docs/serving.md)."""
MAX_SHOWN_CHARS = 80
MAX_ACTORS = 64
DEFAULT_REPLICAS = DEFAULT_OPTIONS.replicas
CapacityMode = Literal["fixed", "auto"]
CAPACITY_MODES: tuple[CapacityMode, ...] = get_args(CapacityMode)
"""Whether the capacity state changes how many experts stay in memory (docs/routing.md)."""
BUDGET_ADVICE = "must be a size such as 2GiB, a percentage such as 25%, or fit"
OWN_MESSAGE = "own_message"
"""Type of validation errors whose text is ready to be shown."""
_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")


def _read_size(value: object) -> int:
    """A number alone would leave its unit to be guessed."""
    if not isinstance(value, str):
        raise PydanticCustomError(OWN_MESSAGE, "must be a size such as 512MiB or 2GiB")
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise PydanticCustomError(OWN_MESSAGE, "{reason}", {"reason": str(error)}) from error


def _read_budget(value: object) -> BudgetRequest:
    if not isinstance(value, str):
        raise PydanticCustomError(OWN_MESSAGE, BUDGET_ADVICE)
    try:
        return parse_budget(value)
    except ValueError as error:
        raise PydanticCustomError(OWN_MESSAGE, "{reason}", {"reason": str(error)}) from error


def _read_texts(value: object) -> object:
    """One text, or a list of them."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _check_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    for origin in value:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise PydanticCustomError(
                OWN_MESSAGE, "must be * or origins such as https://chat.example.com:8443"
            )
    return value


def _whole(low: int, high: int, default: int) -> Any:
    return Field(default, ge=low, le=high, description=f"a whole number from {low} to {high}")


def _read_list(value: object) -> object:
    """Words separated by commas, or a list of such."""
    texts = _read_texts(value)
    if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
        return texts
    return tuple(word.strip() for text in texts for word in text.split(","))


def _read_snarc(value: object) -> SnarcWeights:
    if not isinstance(value, str):
        raise PydanticCustomError(OWN_MESSAGE, "must be a preset or NAME=VALUE pairs separated by commas")
    try:
        return read_weights(value)
    except WeightsInvalid as error:
        raise PydanticCustomError(OWN_MESSAGE, "{reason}", {"reason": error.reason}) from error


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


Size = Annotated[int, BeforeValidator(_read_size)]
Budget = Annotated[BudgetRequest, BeforeValidator(_read_budget)]
Text = Annotated[str, Field(max_length=512, pattern=r"^[^\p{C}]+$")]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_read_texts)]
_TEXTS = "a text or a list of texts, each of 1 to 512 printable characters"


class OptionValues(BaseModel):
    """The options with their defaults. A field's description completes "must be"."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-")
    )

    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="an address or host name")
    port: int = _whole(1, 65535, 8000)
    address: Text | None = Field(None, description="auto, or HOST:PORT of a Ray cluster's head")
    actors: int | None = Field(
        None, ge=0, le=MAX_ACTORS, description=f"a whole number from 0 to {MAX_ACTORS}"
    )
    replicas: int = _whole(1, 8, DEFAULT_REPLICAS)
    grouping: Grouping = Field("expert", description="expert or layer")
    demand: Text | None = Field(None, description="a routing trace's path of 1 to 512 printable characters")
    autoscale: bool = Field(False, description="true or false")
    min_actors: int | None = Field(
        None, ge=0, le=MAX_ACTORS, description=f"a whole number from 0 to {MAX_ACTORS}"
    )
    max_actors: int | None = Field(
        None, ge=1, le=MAX_ACTORS, description=f"a whole number from 1 to {MAX_ACTORS}"
    )
    routers: int = _whole(1, 16, 1)
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="float32 or bfloat16")
    served_model_name: Texts = Field((), description=_TEXTS)
    max_model_len: int | None = Field(
        None, ge=2, le=2**31 - 1, description="a whole number of tokens from 2 to the model's context"
    )
    max_num_seqs: int = _whole(1, MOST_SEQUENCES, 64)
    max_queue: int = _whole(0, 65536, 256)
    max_batch_tokens: int = _whole(1, MOST_BATCH_TOKENS, BATCH_TOKENS)
    kv_budget: Size = Field(2**30, description="a size such as 512MiB or 2GiB")
    eviction: Eviction = Field(DEFAULT_EVICTION, description="lfu, lru or trust")
    prefetch: bool = Field(False, description="true or false")
    capacity: CapacityMode = Field("fixed", description=_one_of(CAPACITY_MODES))
    audit_share: float = Field(
        DEFAULT_AUDIT_SHARE, ge=0.0, le=1.0, allow_inf_nan=False, description="a number from 0 to 1"
    )
    device: str = Field(
        "cpu", pattern=r"^(cpu|auto|cuda(:[0-9]{1,3})?)$", description="cpu, cuda, cuda:N or auto"
    )
    expert_device: str = Field("cpu", pattern=r"^(cpu|auto|cuda)$", description="cpu, cuda or auto")
    expert_budget: Budget | None = Field(None, description=BUDGET_ADVICE.removeprefix("must be "))
    host_budget: Budget | None = Field(None, description=BUDGET_ADVICE.removeprefix("must be "))
    node_budgets: dict[Text, Budget] = Field(
        default_factory=dict,
        max_length=1024,
        description="a mapping of node names or addresses to budgets, such as 'node-7: 2GiB'",
    )
    store_copy: Texts = Field((), description=_TEXTS)
    store_cache: Text | None = Field(None, description="a folder's path of 1 to 512 printable characters")
    store_cache_limit: Size | None = Field(None, description="a size such as 40GiB")
    api_key: Texts = Field((), description=_TEXTS)
    api_key_file: Texts = Field((), description=_TEXTS)
    cors_origin: Annotated[Texts, AfterValidator(_check_origins)] = Field((), description=_TEXTS)
    trace: Text | None = Field(None, description="a folder's path of 1 to 512 printable characters")
    trace_tokens: bool = Field(False, description="true or false")
    policy: PolicyName = Field("native", description=_one_of(POLICIES))
    effort: EffortChoice = Field("focus", description=_one_of(EFFORT_CHOICES))
    allow_policy: Annotated[tuple[PolicyName, ...], BeforeValidator(_read_list)] = Field(
        (), description=_one_of(POLICIES)
    )
    allow_effort: Annotated[tuple[EffortChoice, ...], BeforeValidator(_read_list)] = Field(
        (), description=f"of {_one_of(EFFORT_CHOICES)}, with commas between"
    )
    snarc: Annotated[SnarcWeights, BeforeValidator(_read_snarc)] = Field(
        PRESETS[DEFAULT_PRESET], description="a preset or NAME=VALUE pairs separated by commas"
    )
    trust: bool = Field(True, description="true or false")
    prefix_cache: bool = Field(True, description="true or false")
    media: bool = Field(True, description="true or false")
    speech: bool = Field(True, description="true or false")
    speech_budget: Budget | None = Field(None, description=BUDGET_ADVICE.removeprefix("must be "))
    resume_timeout: int = _whole(0, 3600, 60)
    state_dir: Text | None = Field(None, description="a folder's name of 1 to 512 printable characters")


def merge_values(command_line: Mapping[str, Any], file: Mapping[str, Any], file_name: str) -> OptionValues:
    """Values by option name; the command line's go before the file's, whole.

    Raises OptionInvalid naming the option, where it stands, and what it must be.
    """
    for name in file:
        if name not in option_names():
            raise OptionInvalid(f"{file_name}: {name[:MAX_SHOWN_CHARS]}", f"is no option{_nearest(name)}")
    given = {name: value for name, value in command_line.items() if value is not None}
    try:
        return OptionValues.model_validate({**file, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        label = f"--{name}" if name in given else f"{file_name}: {name}"
        if name == "node-budgets":
            label += _entry(first["loc"])
        raise OptionInvalid(label, _what_it_must_be(name, first)) from error


def option_names() -> tuple[str, ...]:
    return tuple(str(field.alias) for field in OptionValues.model_fields.values())


def parse_eviction(word: str) -> Eviction:
    """Raises OptionInvalid."""
    for eviction in EVICTIONS:
        if word == eviction:
            return eviction
    raise OptionInvalid("--eviction", f"must be lfu, lru or trust, not {word[:MAX_SHOWN_CHARS]!r}")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), option_names(), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; options are {', '.join(option_names())}"


def _entry(place: Sequence[str | int]) -> str:
    """Of a mapping, where one value of it is wrong."""
    return f": {one_line(str(place[1]))[:MAX_SHOWN_CHARS]}" if len(place) == 2 else ""


def _what_it_must_be(name: str, first: Any) -> str:
    """A key's value is left out: it may be a secret in the wrong place."""
    if first["type"] == OWN_MESSAGE:
        reason = str(first["msg"])
    else:
        field = next(field for field in OptionValues.model_fields.values() if field.alias == name)
        reason = f"must be {field.description}"
    if name.startswith("api-key"):
        return reason
    return f"{reason}, not {str(first['input'])[:MAX_SHOWN_CHARS]!r}"
