"""One weight's view of a recipe: the values of the parameters for it, and the counts of entries that follow from them.

Counts are whole numbers, rounded down, as mergekit takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from modular_experts.interop.mergekit.configuration import Configuration
from modular_experts.interop.mergekit.places import Place
from modular_experts.interop.mergekit.references import Reference

__all__ = ["Weight"]


@dataclass(frozen=True)
class Weight:
    """A weight of a model, as a recipe sees it.

    Attributes:
        configuration: The recipe.
        name: Its name.
        place: Where in the layers it is.
        entries: Its number of entries.
        seed: Of what is dropped at random.
    """

    configuration: Configuration
    name: str
    place: Place
    entries: int
    seed: int

    @property
    def models(self) -> tuple[Reference, ...]:
        """What is merged, in the order of a method's settings: deltas of the models but the base, or the models."""
        if self.configuration.on_deltas:
            return self.configuration.experts
        if self.configuration.name == "slerp":
            assert self.configuration.base is not None
            return (self.configuration.base, *self.configuration.experts)
        return self.configuration.models

    def each(self, parameter: str) -> list[float]:
        """Return a parameter of each model, in their order."""
        return [self.configuration.each(parameter, self.name, self.place, model) for model in self.models]

    def overall(self, parameter: str) -> float:
        """Return a parameter of the whole merge."""
        return self.configuration.overall(parameter, self.name, self.place)

    def densities(self) -> list[float]:
        """Return each model's share of entries that are kept, in (0, 1]."""
        found = self.each("density")
        for model, density in zip(self.models, found, strict=True):
            if density <= 0:
                raise ValueError(
                    f"density of {model} is {density} for {self.name} and must be above 0; give the model weight 0 to "
                    "leave it out there"
                )
        return [min(density, 1.0) for density in found]

    def bands(self) -> list[tuple[int, int]]:
        """Return how many of the smallest and of the largest entries of each model go, as `breadcrumbs` counts them."""
        found = []
        for density, gamma in zip(self.densities(), self.each("gamma"), strict=True):
            smallest = self.entries - int(density * self.entries) - int(gamma * self.entries)
            largest = int(gamma * self.entries) + min(smallest, 0)
            found.append((0, 0) if density == 1 else (max(smallest, 0), largest))
        return found

    def silent(self) -> frozenset[int]:
        """Return the models of which `breadcrumbs` keeps nothing: it drops no outlier, and then all that is left."""
        if self.configuration.name not in ("breadcrumbs", "breadcrumbs_ties"):
            return frozenset()
        pruned = zip(self.densities(), self.bands(), strict=True)
        return frozenset(
            place
            for place, (density, (smallest, largest)) in enumerate(pruned)
            if density < 1 and (largest <= 0 or smallest + largest >= self.entries)
        )
