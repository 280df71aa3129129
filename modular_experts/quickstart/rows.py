"""Read the results of a run as rows, and name its kinds of experts and its methods for readers.

Columns beside those of `Results`: `kind` of the experts, `merge` (the method), `count` (how many experts are in one
model), and `at`: `default` is scale 1, `chosen` the scale that was best on validation words.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from modular_experts.quickstart.plan import METHODS
from modular_experts.reports import Results

KIND_NAMES = {"sparse": "sparse entries", "block": "sparse tiles", "lora": "LoRA", "full": "full"}
LATENT = "base, own format"
SCORES = ("exact_match", "rougeL", "loss")
COSTS = ("bytes", "ever_trained", "kept", "parameters", "seconds")


def as_results(found: Mapping[str, Any]) -> Results:
    """Return the rows of a complete run's `results.json`, in the same order whatever was finished first."""
    rows: list[dict[str, Any]] = []

    def add(model: str, metrics: Mapping[str, Any], names: tuple[str, ...], **where: Any) -> None:
        same = {"model": model, "experts": [], "task": None, "role": None, **where}
        rows.extend(same | {"metric": name, "value": metrics[name]} for name in names if name in metrics)

    def add_roles(model: str, roles: Mapping[str, Any], **where: Any) -> None:
        for role in ("held_in", "held_out"):
            add(model, roles.get(role, {}), SCORES, role=role, **where)

    add("base", found["base"], COSTS)
    add_roles("base", found["base"]["plain"])
    add_roles(LATENT, found["base"]["latent"])
    add("multitask", found["multitask"], COSTS, experts=["multitask"])
    add_roles("multitask", found["multitask"], experts=["multitask"])
    for kind in [kind for kind in KIND_NAMES if kind in found["experts"]]:
        for task in found["tasks"]:
            expert = found["experts"][kind][task]
            about = {"experts": [f"{kind}-{task}"], "kind": kind, "count": 1}
            add(f"{kind}-{task}", expert, COSTS, **about)
            add(f"{kind}-{task}", expert, SCORES, **about, task=task, role="held_in", rows=expert["rows"])
        for method in [method for method in METHODS if method in found["merges"][kind]]:
            for count in found["levels"]:
                merge = found["merges"][kind][method][str(count)]
                model = f"{count} {KIND_NAMES[kind]} experts, {method}"
                about = {"kind": kind, "merge": method, "count": count}
                add(model, merge, ("scale", *COSTS), **about)
                add_roles(f"{model}, scale 1", merge["default"], **about, at="default")
                add_roles(f"{model}, chosen scale", merge["chosen"], **about, at="chosen")
    facts = ("seed", "python", "machine", "versions", "tasks", "held_out", "levels", "base")
    return Results(rows, {name: found[name] for name in facts} | {"date": found.get("date")})


def roles_of(*groups: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores of each role that was tested, as means over the scores of groups of equally many tasks."""
    roles = [role for role in ("held_in", "held_out") if groups[0][role]]
    return {role: {name: fmean(group[role][name] for group in groups) for name in SCORES} for role in roles}
