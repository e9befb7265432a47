"""Which part of a checkpoint is extracted: `--layers`, `--components`, `--groups`. Pure; see `extraction.extract`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from extraction.errors import OptionRefused
from extraction.manifest import MAX_GROUPS, GroupShare, LeftOut
from extraction.plan import ExtractionPlan, PlannedComponent

MAX_LAYER = 99_999
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_IN_LAYER = re.compile(r"layers\.([0-9]{1,5})\.")


@dataclass(frozen=True)
class Selection:
    """What is asked for; None means all."""

    layers: frozenset[int] | None = None
    """Of every component that has experts; the others have no layers that could be told from anything else."""
    components: frozenset[str] | None = None
    groups: GroupShare | None = None
    """Of the experts of what is chosen by the other two."""


def parse_layers(text: str) -> frozenset[int]:
    """`0-7`, `3`, `0-3,8`. Raises OptionRefused."""
    layers = _numbers(text)
    if layers is None:
        raise OptionRefused("--layers", f"{text[:100]!r} is no list of layers such as 0-7 or 0-3,8")
    return layers


def parse_groups(text: str) -> GroupShare | None:
    """`1/4`, `0-1/8`, `0,3/4`: numbers from 0, and how many groups there are. None for all. Raises OptionRefused."""
    numbers, _, total = text.partition("/")
    kept = _numbers(numbers)
    if kept is None or not re.fullmatch("[0-9]{1,5}", total):
        raise OptionRefused("--groups", f"{text[:100]!r} is no share of groups such as 1/4 or 0-1/8")
    if not 1 <= int(total) <= MAX_GROUPS:
        raise OptionRefused("--groups", f"{total} is not from 1 to {MAX_GROUPS} groups")
    if max(kept) >= int(total):
        raise OptionRefused("--groups", f"of {total} groups the last is {int(total) - 1}")
    return None if len(kept) == int(total) else GroupShare(total=int(total), kept=tuple(sorted(kept)))


def _numbers(text: str) -> frozenset[int] | None:
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            return None
        numbers |= set(range(first, last + 1))
    return frozenset(numbers)


def parse_components(text: str) -> frozenset[str]:
    """Names separated by commas."""
    return frozenset(part.strip() for part in text.split(","))


def select(plan: ExtractionPlan, selection: Selection) -> tuple[ExtractionPlan, LeftOut | None]:
    """The plan of what is asked for, and what it leaves out; None when that is nothing. Raises OptionRefused."""
    components = _chosen(plan, selection.components)
    left_out = {component.name for component in plan.components} - {part.name for part in components}
    experts = {key: parts for key, parts in plan.experts.items() if key.component not in left_out}
    have_experts = {key.component for key in experts}
    if not have_experts:
        raise OptionRefused("--components", f"{_list(left_out)} left out, nothing with experts is kept")
    layers = {
        part.name: _layers_of(part, (key.layer for key in experts if key.component == part.name))
        for part in components
        if part.name in have_experts
    }
    wanted = selection.layers
    if wanted is not None:
        unknown = wanted - frozenset().union(*layers.values())
        if unknown:
            raise OptionRefused("--layers", f"there is no layer {min(unknown)}")
        experts = {key: parts for key, parts in experts.items() if key.layer in wanted}
        if not experts:
            raise OptionRefused("--layers", "none of these layers has experts")
        components = [
            _keep_layers(part, wanted) if part.name in have_experts else part for part in components
        ]
        layers = {name: present - wanted for name, present in layers.items() if present - wanted}
    else:
        layers = {}
    groups = selection.groups
    if groups is not None:
        experts = {key: parts for key, parts in experts.items() if groups.holds(key)}
        if not experts:
            raise OptionRefused("--groups", f"there are fewer experts than {groups.total} groups")
    kept = replace(plan, components=tuple(components), experts=experts)
    if not left_out and not layers and groups is None:
        return kept, None
    omitted = {name: tuple(sorted(absent)) for name, absent in sorted(layers.items())}
    return kept, LeftOut(components=tuple(sorted(left_out)), layers=omitted, groups=groups)


def without(plan: ExtractionPlan, left_out: LeftOut | None) -> ExtractionPlan:
    """The plan without what a store says it leaves out. Raises OptionRefused when the plan has no such parts."""
    if left_out is None:
        return plan
    known = {part.name for part in plan.components}
    unknown = (set(left_out.components) | set(left_out.layers)) - known
    if unknown:
        raise OptionRefused("the store", f"leaves out {_list(unknown)}, which the checkpoint does not have")
    absent: Mapping[str, tuple[int, ...]] = left_out.layers
    experts = {
        key: parts
        for key, parts in plan.experts.items()
        if key.component not in left_out.components
        and key.layer not in absent.get(key.component, ())
        and (left_out.groups is None or left_out.groups.holds(key))
    }
    components = []
    for part in plan.components:
        if part.name not in left_out.components:
            present = _layers_of(part, (key.layer for key in plan.experts if key.component == part.name))
            dropped = frozenset(absent.get(part.name, ()))
            components.append(_keep_layers(part, present - dropped) if dropped else part)
    return replace(plan, components=tuple(components), experts=experts)


def _chosen(plan: ExtractionPlan, names: frozenset[str] | None) -> list[PlannedComponent]:
    known = [part.name for part in plan.components]
    unknown = (names or frozenset()) - set(known)
    if unknown:
        raise OptionRefused(
            "--components", f"there is no {_list(unknown)}; this checkpoint has {_list(known)}"
        )
    return [part for part in plan.components if names is None or part.name in names]


def _layers_of(component: PlannedComponent, with_experts: Iterable[int]) -> frozenset[int]:
    layers = set(with_experts)
    layers |= {int(match[1]) for name in component.backbone if (match := _IN_LAYER.match(name))}
    return frozenset(layers)


def _keep_layers(component: PlannedComponent, layers: frozenset[int]) -> PlannedComponent:
    backbone = {}
    for name, tensor in component.backbone.items():
        match = _IN_LAYER.match(name)
        if match is None or int(match[1]) in layers:
            backbone[name] = tensor
    return replace(component, backbone=backbone)


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
