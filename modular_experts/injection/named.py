"""Use the experts of a library by name on one model, as interactive work does: `experts.use("dates")`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from modular_experts.base.apply import AnyExpert
from modular_experts.injection.attach import attached
from modular_experts.library import Library
from modular_experts.text import did_you_mean

_NAMED = "_modular_experts_named"
"""The attribute of a model that holds the newest `NamedExperts` of it."""


class NamedExperts(AbstractContextManager["NamedExperts"]):
    """Experts by name, of which a model uses none at first.

        with NamedExperts(model, "library") as experts:
            experts.use("dates")
            experts.use("dates", "mood")  # their sum
            experts.use()  # the base alone

    Args:
        model: The experts' base, before anything is injected.
        experts: A library's directory, or a mapping from names to experts, as `attached` takes them.
    """

    def __init__(self, model: nn.Module, experts: str | Path | Mapping[str, AnyExpert]) -> None:
        self.experts = Library(experts) if isinstance(experts, str | Path) else experts
        self.names: tuple[str, ...] = ()
        """Which experts the model uses."""
        self.used: Any = None
        """What `attached` returned for them."""
        self._model = model
        # A cell of a notebook may run twice, and must not add its experts twice.
        if (before := model.__dict__.get(_NAMED)) is not None:
            before.use()
        model.__dict__[_NAMED] = self

    def use(self, *names: str) -> Any:
        """Use these experts, added up, in the place of those before; return what `attached` returns.

        Raises:
            KeyError: There is no such expert; the model stays as it is.
            ValueError: Experts cannot be added up, as one behind a router; the model is the base alone then.
        """
        for name in names:
            if name not in self.experts:
                raise KeyError(f"there is no expert {name!r}{did_you_mean(name, self.experts)}")
        chosen = [self.experts[name] for name in names]
        if self.used:
            self.used.remove()
        self.used, self.names = None, ()
        if chosen:
            self.used, self.names = attached(self._model, chosen), names
        return self.used

    def __exit__(self, *failure: object) -> None:
        self.use()
