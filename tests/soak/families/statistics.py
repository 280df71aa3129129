"""Take statistics of experts' data, and compute them anew."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modular_experts.merging.statistics import take_statistics
from soak.case import Case
from soak.reference import merges
from soak.reference.model import Reference, Text, negative_log_likelihood
from soak.validation import Setup


def statistics_case(case: Case) -> None:
    """Gram matrices are means of `x x^T` over tokens, Fisher information means of squared gradients over rows; along a
    merge by RegMean++ each block's inputs come from the merged blocks before it.
    """
    setup = Setup(case, case.random.choice([1, 2]))
    kind: Any = case.random.choice(["gram", "fisher", "merged_gram"])
    case.note(kind=kind)
    take_statistics(setup.places, kind, setup.mixture())
    inputs = 0 if setup.kind == "gpt2" else 1
    rows = [setup.rows[task.name] for task in setup.tasks]
    if kind == "merged_gram":
        expected = _merged_grams(setup, rows, inputs)
    else:
        measure = _grams if kind == "gram" else _squares
        expected = [
            measure(setup.reference(deltas), own, setup.names) for deltas, own in zip(setup.read, rows, strict=True)
        ]
    for place, own in zip(setup.places, expected, strict=True):
        ours = _stored(place / "statistics" / f"{kind}.safetensors")
        for name, values in own.items():
            case.close(ours[name], values, f"{kind} of {name} of {place.name}", 2e-3 if kind == "fisher" else 2e-4)


def _stored(file: Path) -> dict[str, Tensor]:
    """Return the statistics of each weight that has some."""
    with safe_open(file, "pt") as opened:
        table = json.loads(opened.metadata()["modular_experts"])["weights"]
        return {name: opened.get_tensor(entry["tensor"]).double() for name, entry in table.items() if entry}


def _grams(reference: Reference, rows: Sequence[Text], names: Sequence[str]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def add(_: Any, arguments: tuple[Any, ...], name: str = name) -> None:
            x = arguments[0].detach().double().reshape(-1, arguments[0].shape[-1])
            totals[name] = totals.get(name, 0) + x.T @ x

        module = reference.model.get_submodule(name.rpartition(".")[0])
        hooks.append(module.register_forward_pre_hook(add))
    for row in rows:
        reference.loss(row)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(row.ids) for row in rows)
    return {name: total / tokens for name, total in totals.items()}


def _squares(reference: Reference, rows: Sequence[Text], names: Sequence[str]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = dict.fromkeys(names, torch.zeros(()))
    for row in rows:
        reference.model.zero_grad()
        negative_log_likelihood(reference.logits, row).backward()
        for name in names:
            totals[name] = totals[name] + reference.weight(name, "grad").double() ** 2 / len(rows)
    return totals


def _merged_grams(setup: Setup, rows: Sequence[Sequence[Text]], inputs: int) -> list[dict[str, Tensor]]:
    blocks: dict[str, list[str]] = {}
    for name in setup.names:
        block = re.match(r".*?\.\d+\.", name)
        assert block is not None
        blocks.setdefault(block[0], []).append(name)
    grams_of: list[dict[str, Tensor]] = [{} for _ in setup.places]
    behind: dict[str, Tensor] = {}
    for _, names in sorted(blocks.items()):
        for own, expert, texts in zip(grams_of, setup.read, rows, strict=True):
            inside = {name: expert[name] for name in names if name in expert}
            own |= _grams(setup.reference(behind | inside), texts, names)
        for name in names:
            grams = torch.stack([own[name] for own in grams_of])
            x = setup.stacked(name)
            known = merges.Weight(x, x != 0, x.flatten(1), statistics=grams)
            behind[name] = known.merged("RegMeanPlusPlus", inputs=inputs)
    return grams_of


FAMILIES = {"statistics": statistics_case}
