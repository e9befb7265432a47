"""Who may be asked for which expert, found once and kept while roster and connections stay as they are.

Used by `experts.remote_directory`; the order itself is decided by `experts.replicas`.
"""

from __future__ import annotations

from collections.abc import Sequence

from experts.exchange import Exchange
from experts.links import View
from experts.replicas import Reach, Tiers, rank
from experts.shares import Place
from extraction.manifest import ExpertKey


class Ranks:
    """Who may be asked for each expert while roster and connections stay as they are."""

    def __init__(self, view: View, reach: Reach, before: Ranks | None = None) -> None:
        """before: whose findings are kept where they still hold."""
        self.view, self.reach = view, reach
        self.links = tuple(view.links[name] for name in reach.present)
        """The ranks are good while these are open: a connection that is closed stays so."""
        self._layers: dict[tuple[str, int], LayerRanks] = {}
        self.exchanges: dict[tuple[str, tuple[int, ...], int], Exchange | None] = {}
        if before is not None and before.reach == reach:
            old = before.view
            if old.owners is view.owners and old.fallbacks is view.fallbacks:
                self._layers = before._layers
                if before.links == self.links:
                    self.exchanges = before.exchanges

    def of(self, component: str, layer: int) -> LayerRanks:
        found = self._layers.get((component, layer))
        if found is None:
            self._layers[component, layer] = found = LayerRanks(component, layer, self.view, self.reach)
        return found

    def sole_names(self, component: str, layers: Sequence[int], num_experts: int) -> list[list[str]] | None:
        """For each of the layers' experts the actor that is asked first; None where there is a choice for some expert,
        or this process would compute it."""
        found = []
        for of_layer in (self.of(component, layer) for layer in layers):
            for expert in range(num_experts):
                of_layer.of(expert)
            places = of_layer.without_choice(range(num_experts)) or []
            names = [name for name in places if name is not None]
            if len(names) < num_experts:
                return None
            found.append(names)
        return found


class LayerRanks:
    """Of one layer's experts, by number."""

    def __init__(self, component: str, layer: int, view: View, reach: Reach) -> None:
        self._component, self._layer, self._reach = component, layer, reach
        self._owners, self._fallbacks = view.owners, view.fallbacks
        self._tiers: dict[int, Tiers] = {}
        self._alone: dict[int, Place] = {}
        """Where there is no choice, who is asked first."""

    def of(self, expert: int) -> Tiers:
        tiers = self._tiers.get(expert)
        if tiers is None:
            key = ExpertKey(self._component, self._layer, expert)
            tiers = rank(self._owners.get(key, ()), self._fallbacks.get(key, ()), self._reach)
            self._tiers[expert] = tiers
            if len(tiers[0]) == 1:
                self._alone[expert] = tiers[0][0]
        return tiers

    def without_choice(self, experts: Sequence[int]) -> list[Place] | None:
        """Who is asked first for each of these; None where there is a choice, or not yet known whether there is."""
        alone = self._alone
        try:
            return [alone[expert] for expert in experts]
        except KeyError:
            return None
