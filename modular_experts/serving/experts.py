"""Hold the experts of requests in a serving model, each in a slot, and let those go that nobody asked for lately."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modular_experts.base.apply import check_fit
from modular_experts.deltas import Delta
from modular_experts.experts.site import Site
from modular_experts.injection import eject, find_sites, inject
from modular_experts.injection.routed import oriented
from modular_experts.injection.slices import GatesOfSlice
from modular_experts.library import StoredExpert
from modular_experts.routing.gates import CurrentGates
from modular_experts.routing.mixture import Mixture
from modular_experts.text import bytes_text


class NoRoomError(Exception):
    """The experts that answer now fill the memory for experts."""


@dataclass
class Slot:
    """An expert in the model.

    Attributes:
        number: What gates name it by.
        expert: What is held.
        nbytes: What it takes in memory while nobody uses it.
        users: How many requests use it.
    """

    number: int
    expert: StoredExpert
    nbytes: int = 0
    users: int = 0

    def let_go(self) -> None:
        """Drop the pages of the expert's file; encoded deltas that are held read them again when they are decoded."""
        for name in self.expert:
            self.expert.release(name)


class HeldExperts:
    """The experts in a model, of which each row of a pass takes those that `gates` name.

    Experts stay encoded as they are stored, and those that are in use are held decoded too. Whoever `take`s an expert
    must give it back.

    Args:
        model: The base, with nothing injected.
        most: The most bytes of experts that are held; those that nobody uses leave first, the least recently used one
            before the others.
        pause: Keeps the model from computing while it gets new layers.
    """

    def __init__(self, model: nn.Module, most: int, pause: Callable[[], AbstractContextManager[Any]]) -> None:
        self.most, self.gates = most, CurrentGates(packs=True)
        self._model, self._pause = model, pause
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # by content hash, the least recently used first
        self._mixtures: dict[str, tuple[Site, Mixture]] = {}
        self._sites = {
            name: site
            for site in find_sites(model)
            if not site.parameter or site.number is not None
            for name in (site.weight, f"{site.name}.bias")
        }
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the experts that are held, without what is decoded for a while."""
        return sum(slot.nbytes for slot in self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def check(self, expert: StoredExpert) -> None:
        """Raise ValueError if rows of their own cannot take an expert."""
        moved = [name for name in expert if name not in self._sites]
        if not expert.mergeable:
            raise ValueError(f"{expert.name} cannot be served, because {expert.not_mergeable_because}")
        if moved:
            raise ValueError(
                f"{expert.name} cannot be served, because it moves {moved[0]}, which all rows share; apply it to the "
                "base, and serve that"
            )
        check_fit(self._model, [expert])

    def take(self, experts: Sequence[StoredExpert]) -> list[int]:
        """Return the slots of experts, which are read if they are not there yet.

        Raises:
            NoRoomError: Together with the experts in use they take more than `most`.
            ValueError: One cannot be served, or the files of one are damaged.
        """
        with self._lock:
            numbers = []
            try:
                for expert in experts:
                    slot = self._slots.get(expert.content_hash) or self._read(expert)
                    self._slots.move_to_end(expert.content_hash)
                    slot.users += 1
                    numbers.append(slot.number)
            except BaseException:
                self._give_back(numbers)
                raise
            self._note_users()
            return numbers

    def give_back(self, numbers: Iterable[int]) -> None:
        """Tell that a request no longer uses the experts in these slots."""
        with self._lock:
            self._give_back(numbers)
            self._note_users()

    def remove(self) -> None:
        """Take all experts out of the model."""
        if self._mixtures:
            eject(self._model)
        self._slots.clear()
        self._mixtures.clear()

    def _give_back(self, numbers: Iterable[int]) -> None:
        by_number = {slot.number: slot for slot in self._slots.values()}
        for number in numbers:
            by_number[number].users -= 1

    def _note_users(self) -> None:
        self.gates.kept = frozenset(slot.number for slot in self._slots.values() if slot.users)

    def _read(self, expert: StoredExpert) -> Slot:
        self.check(expert)
        size = sum(expert.stored_bytes().values())
        self._make_room(size, expert.name)
        if missing := [site for name in expert if (site := self._sites[name]).weight not in self._mixtures]:
            self._equip(missing)
        taken = {slot.number for slot in self._slots.values()}
        slot = Slot(next(number for number in range(len(taken) + 1) if number not in taken), expert)
        for site, mixture in self._mixtures.values():
            bias = f"{site.name}.bias"
            slot.nbytes += mixture.put(slot.number, oriented(site, expert, encoded=True), expert.get(bias))
        slot.let_go()
        self._slots[expert.content_hash] = slot
        return slot

    def _make_room(self, size: int, name: str) -> None:
        if size > self.most:
            raise ValueError(
                f"{name} takes {bytes_text(size)}, and {bytes_text(self.most)} are for all experts; give more with "
                "--expert_bytes"
            )
        unused = [key for key, slot in self._slots.items() if not slot.users]
        while self.nbytes + size > self.most:
            if not unused:
                raise NoRoomError
            slot = self._slots.pop(unused.pop(0))
            slot.let_go()
            for _, mixture in self._mixtures.values():
                mixture.put(slot.number, None)

    def _equip(self, sites: Sequence[Site]) -> None:
        """Give linear layers mixtures, without an expert so far."""

        def make(weight: Tensor, site: Site) -> Mixture:
            gates = self.gates if site.number is None else GatesOfSlice(self.gates, site)
            none: list[Delta | None] = [None] * (len(self._slots) + 1)
            mixture = Mixture(weight, none, gates)
            self._mixtures[site.weight] = site, mixture
            return mixture

        with self._pause():
            inject(self._model, lambda _: dict.fromkeys(sites, make))
            self._model.eval()
