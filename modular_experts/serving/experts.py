"""Hold the experts of requests in a serving model, each in a slot, and let those go that nobody asked for lately."""

import ctypes
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base.apply import check_shapes
from modular_experts.base.structure import Structure
from modular_experts.deltas import Delta
from modular_experts.experts.site import Site
from modular_experts.injection import find_sites, inject
from modular_experts.injection.routed import oriented_delta
from modular_experts.injection.slices import GatesOfSlice
from modular_experts.library import StoredExpert
from modular_experts.library.compatibility import check_act_alike
from modular_experts.routing.gates import CurrentGates
from modular_experts.routing.mixture import Mixture
from modular_experts.text import bytes_text


class NoRoomError(Exception):
    """The experts that answer now fill the memory for experts."""


@dataclass
class Slot:
    """An expert in the model, which gates name by its number.

    `nbytes` counts its bytes as it is stored. `decoded` counts the further bytes of its decoded form once nobody uses
    it; None where nobody has counted them.
    """

    number: int
    expert: StoredExpert
    nbytes: int = 0
    users: int = 0
    decoded: int | None = None


class HeldExperts:
    """The experts in a model, of which each row of a pass takes those that `gates` name.

    Experts stay encoded as they are stored. Those that are in use are held decoded too, and after that as long as
    there is room. Whoever `take`s an expert must give it back.

    `most` limits the bytes that are held, without the decoded form of those in use. Where they are too many, experts
    that nobody uses lose their decoded form and then leave, the least recently used one first. `pause` keeps the model
    from computing while it gets new layers.
    """

    def __init__(self, model: PreTrainedModel, most: int, pause: Callable[[], AbstractContextManager[None]]) -> None:
        self.most = most
        self.gates = CurrentGates(packs=True)
        self._model = model
        self._pause = pause
        # Read here, because a thread may put mixtures into the layers while a request is checked.
        self._structure = Structure(model)
        _ = self._structure.owners
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # by content hash, the least recently used first
        self._newest: dict[Path, str] = {}  # the content hash that was last asked for at each place
        self._mixtures: dict[str, tuple[Site, Mixture]] = {}
        # transformers computes the head for the last token of a prompt alone, and the gates are made for all.
        head = model.get_output_embeddings()
        self._sites = {
            name: site
            for site in find_sites(model)
            if (not site.parameter or site.number is not None) and site.module is not head
            for name in (site.weight, f"{site.name}.bias")
        }
        # Experts are given back while another one is read, which takes a while.
        self._reading = threading.Lock()
        self._counting = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the experts that are held, as they are stored."""
        return sum(slot.nbytes for slot in tuple(self._slots.values()))

    def __len__(self) -> int:
        return len(self._slots)

    def check(self, experts: Sequence[StoredExpert]) -> None:
        """Raise ValueError for experts that rows of their own cannot take, or that do not fit into `most` together."""
        check_act_alike(experts)
        for expert in experts:
            moved = [name for name in expert if name not in self._sites]
            if not (expert.mergeable or expert.acts_on_answers):
                raise ValueError(f"{expert.name} cannot be served, because {expert.not_mergeable_because}")
            if moved:
                raise ValueError(
                    f"{expert.name} cannot be served, because it moves {moved[0]}, which all rows share; apply it to "
                    "the base, and serve that"
                )
        check_shapes(self._structure, [expert for expert in experts if expert.content_hash not in self._slots])
        if (size := sum(map(_bytes, experts))) > self.most:
            raise ValueError(
                f"{' and '.join(expert.name for expert in experts)} would take {bytes_text(size)}, and "
                f"{bytes_text(self.most)} are for all experts; give more with `expert_bytes=`"
            )

    def take(self, experts: Sequence[StoredExpert]) -> list[Slot]:
        """Return the slots of checked experts, which are read if they are not there yet."""
        slots: list[Slot] = []
        with self._reading:
            self._let_go(0)
            try:
                for expert in experts:
                    self._newest[expert.path] = expert.content_hash
                    slot = self._slots.get(expert.content_hash) or self._read(expert, len(slots))
                    self._slots.move_to_end(expert.content_hash)
                    self._use([slot], 1)
                    slots.append(slot)
            except BaseException:
                self.give_back(slots)
                raise
        return slots

    def give_back(self, slots: Sequence[Slot]) -> None:
        """Tell that a request no longer uses the experts in these slots."""
        self._use(slots, -1)

    def _use(self, slots: Sequence[Slot], change: int) -> None:
        with self._counting:
            for slot in slots:
                slot.users += change
                slot.decoded = None
            if change > 0:
                self.gates.kept = self.gates.kept | {slot.number for slot in slots}

    def _read(self, expert: StoredExpert, own: int) -> Slot:
        size = _bytes(expert)
        self._let_go(size)
        # Experts may take a little more in memory than in their files, by which they were checked; the request holds
        # `own` experts.
        if self.nbytes + size > self.most and sum(slot.users for slot in self._slots.values()) > own:
            raise NoRoomError
        moved = [self._sites[name] for name in expert]
        missing = [site for site in moved if site.weight not in self._mixtures]
        if missing:
            self._equip(missing)
        taken = {slot.number for slot in self._slots.values()}
        slot = Slot(next(number for number in range(len(taken) + 1) if number not in taken), expert)
        for site, mixture in self._mixtures.values():
            bias = f"{site.name}.bias"
            slot.nbytes += mixture.put(slot.number, oriented_delta(site, expert, encoded=True), expert.get(bias))
        # Encoded deltas that are held read the pages of the file again when they are decoded.
        expert.release()
        self._slots[expert.content_hash] = slot
        return slot

    def _let_go(self, size: int) -> None:
        """Let experts leave that nobody uses: those that others have replaced, and more until this size is free.

        The most recently used ones that stay keep their decoded form as long as there is room. The others
        lose it in the next pass with other gates.
        """
        unused = sorted((slot for slot in self._slots.values() if not slot.users), key=self._is_newest)
        before = len(self._slots)
        while unused and (self.nbytes + size > self.most or not self._is_newest(unused[0])):
            slot = unused.pop(0)
            del self._slots[slot.expert.content_hash]
            slot.expert.release()
            for _, mixture in self._mixtures.values():
                mixture.put(slot.number, None)
        if len(self._slots) < before and sys.platform == "linux":
            # glibc does not give memory that was freed between other tensors back to the system by itself.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)
            trim(0)
        room = self.most - self.nbytes - size
        kept = {slot.number for slot in self._slots.values()}
        for slot in reversed(unused):
            if slot.decoded is None:
                deltas = (mixture.deltas[slot.number] for _, mixture in self._mixtures.values())
                slot.decoded = sum(delta.decoded_nbytes for delta in deltas if delta is not None)
            room -= slot.decoded
            # The pass that runs may still decode an expert whose client has left.
            if room < 0 or not slot.decoded:
                kept.remove(slot.number)
        self.gates.kept = kept

    def _is_newest(self, slot: Slot) -> bool:
        return self._newest[slot.expert.path] == slot.expert.content_hash

    def _equip(self, sites: Sequence[Site]) -> None:
        """Give linear layers mixtures, without an expert so far."""

        def make(weight: Tensor, site: Site) -> Mixture:
            gates = self.gates if site.number is None else GatesOfSlice(self.gates, site)
            # Low numbers are free again where experts have left.
            places = 1 + max((slot.number for slot in self._slots.values()), default=0)
            empty: list[Delta | None] = [None for _ in range(places)]
            mixture = Mixture(weight, empty, gates)
            self._mixtures[site.weight] = site, mixture
            return mixture

        with self._pause():
            inject(self._model, lambda _: dict.fromkeys(sites, make))
            self._model.eval()


def _bytes(expert: StoredExpert) -> int:
    return sum(expert.stored_bytes().values())
