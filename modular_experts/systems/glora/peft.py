"""Encode a GLoRA as PEFT's adapter of that name, which holds the trained numbers of its five parts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.injection.inject import state_by_place
from modular_experts.interop.peft.formats import EncodedWeight, PeftFormat
from modular_experts.library import StoredExpert
from modular_experts.systems.glora.expert import KINDS, GLoRAExpert


@dataclass(frozen=True)
class GloraFormat(PeftFormat):
    """A GLoRA adapter, for any paths of a `GLoRAExpert`, exactly.

    PEFT has one kind for A and B of all layers, one for C, one for D and E, and one rank. So each part is written as
    the largest kind that occurs, with zeros or ones where it keeps less.
    """

    _experts: Mapping[str, GLoRAExpert] = field(default_factory=dict)
    _kinds: Mapping[str, str] = field(default_factory=dict)
    _rank: int = 1

    peft_type = "GLORA"
    modules = "Linear"
    parameters = ("weight", "bias")

    def supports(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear  # PEFT's own rule

    def fit_to(self, expert: StoredExpert, names: Iterable[str]) -> "GloraFormat":
        kind = expert.record["kind"]
        state = expert.state()
        if kind != "GLoRAExpert" or not state:
            raise ValueError(
                f"{expert.name} is of kind {kind}, and a GLORA adapter needs the trained numbers of a GLoRAExpert; "
                "export it as lora, with a rank, or apply it if it moves biases"
            )
        if parents := [str(parent["name"]) for parent in expert.record["parents"]]:
            raise ValueError(
                f"{expert.name} was trained on top of {', '.join(parents)}, whose weights its parts multiply, and a "
                "GLORA adapter multiplies the base's weights; export it as lora, with a rank, or apply it with them"
            )
        experts = {}
        by_weight = state_by_place(state)
        for name in names:
            if name.endswith(".weight"):
                own = by_weight.get(name, {})
                experts[name] = GLoRAExpert.of_state(torch.zeros(()).expand(expert[name].shape), own)
                experts[name].load_state_dict(own)
        # For A and B of kind none PEFT would store two zeros for each entry of the weight.
        least = {"ab": "constant", "c": "none", "de": "none"}
        kinds: dict[str, str] = {}
        for parts, smallest in least.items():
            held = (getattr(layer.path, part) for layer in experts.values() for part in parts)
            kinds |= dict.fromkeys(parts, max((smallest, *held), key=KINDS[parts[0]].index))
        return replace(self, _experts=experts, _kinds=kinds, _rank=max(layer.rank for layer in experts.values()))

    def encode(self, name: str, module: nn.Module, delta: Delta) -> EncodedWeight:
        energy = delta.norm() ** 2
        if name.endswith(".bias"):
            return EncodedWeight(delta, {}, energy)
        expert = self._experts[name]
        rows, columns = delta.shape
        tensors: dict[str, Tensor] = {}
        for part, kind in self._kinds.items():
            high = columns if part == "c" else rows
            wide = columns if part in "ab" else 1
            if part in "cde" and module.bias is None:
                kind = "none"
            stored = self._part(expert, part, kind, high, wide)
            # PEFT's D and E have one axis.
            tensors |= {f"glora_{part.upper()}.{n}": t.flatten() if part in "de" else t for n, t in stored.items()}
        padding = sum(tensor.numel() for tensor in tensors.values()) - expert.numbers(expert.path)
        return EncodedWeight(delta, tensors, energy, padding=padding)

    def _part(self, expert: GLoRAExpert, part: str, kind: str, high: int, wide: int) -> dict[str, Tensor]:
        """Return the tensors of one part of a layer, by PEFT's names, as a kind at least as large as its own."""
        up, down = (getattr(expert, f"{part}_{half}", None) for half in ("up", "down"))
        if kind == "none":
            return {"zeros": torch.zeros(high, wide)}
        up = torch.zeros(1, 1) if up is None else up.detach().float()
        if kind == "constant":
            return {"X": up[0]}
        up = up.expand(high, -1)
        if kind == "vector":
            return {"X": up}
        down = torch.ones(1, wide) if down is None else down.detach().float()
        missing = self._rank - len(down)
        return {"Xd": F.pad(up, (0, missing)), "Xu": F.pad(down, (0, 0, 0, missing))}

    def configuration(self, modules: Mapping[str, nn.Module], encoded: Mapping[str, EncodedWeight]) -> dict[str, Any]:
        kinds = {"config_A_B": self._kinds["a"], "config_C": self._kinds["c"], "config_D_E": self._kinds["d"]}
        return {"r": self._rank, "bias": "none", "init_weights": True, **kinds}
