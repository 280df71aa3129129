"""Turn what the study of a quickstart found into its `results.json`, which `rows.py` reads."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.expert import DELTA_FILE
from modular_experts.quickstart.plan import METHODS, Plan, untuned
from modular_experts.quickstart.rows import SCORES, roles_of
from modular_experts.study.run import State
from modular_experts.study.settings import BASE, MULTITASK

EXAMPLES = 2  # test words of each task whose answers are kept


def results_of(plan: Plan, library: Path, base: Mapping[str, Any], state: State) -> dict[str, Any]:
    """Return the results of a finished study: `base`, `multitask`, `experts` and `merges`.

    Args:
        plan: The plan of the study.
        library: Its library.
        base: How the base was trained.
        state: The study, with every piece done.
    """
    tests = [found for found in state.done.values() if "scores" in found]
    models = {found["model"]: found for found in tests if not found.get("merge")}
    trained = {found["expert"]["name"]: found for key, found in state.done.items() if key[0] == "experts"}
    chosen = {key[1:4]: found for key, found in state.done.items() if key[0] == "settings"}
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for found in sorted((found for found in tests if found.get("merge")), key=itemgetter("group")):
        groups.setdefault((found["kind"], found["merge"], found["count"]), []).append(found)

    def cost(name: str) -> dict[str, Any]:
        stored = open_expert(library / name)
        shares = {share: stored.record["hyperparameters"].get(share, 1.0) for share in ("kept", "ever_trained")}
        # Adam keeps two numbers of four bytes for each that is trained.
        numbers = stored.record["costs"]["optimizer_bytes"] // 8
        facts = {"name": name, "seconds": trained[name]["seconds"], "bytes": _bytes(stored), "parameters": numbers}
        return facts | shares

    def single(name: str, task: str) -> dict[str, Any]:
        scores = models[name]["scores"]["tasks"][task]
        answers = models[name]["answers"][task][:EXAMPLES]
        return {score: scores[score] for score in (*SCORES, "rows")} | cost(name) | {"answers": answers}

    def merge(kind: str, method: str, count: int) -> dict[str, Any]:
        defaults, tuned = groups[kind, untuned(method), count], groups[kind, method, count]
        choice = chosen[kind, method, count]
        found = {
            "subsets": len(tuned),
            "scale": choice["settings"]["scale"],
            "scales": {str(trial["scale"]): {"loss": trial["loss"]} for trial in choice["trials"]},
            "default": roles_of(*[one["scores"] for one in defaults]),
            "chosen": roles_of(*[one["scores"] for one in tuned]),
            "seconds": sum(one["merge_seconds"] for one in defaults) / len(defaults),
        }
        if count < plan.tasks:
            return found
        stored = open_expert(library / tuned[0]["expert"]["name"])
        found |= {"name": stored.name, "bytes": _bytes(stored), "kept": stored.kept_share}
        return found | _by_task(tuned[0])

    merges = {
        kind: {
            method: {str(count): merge(kind, method, count) for count in plan.levels}
            for method in METHODS
            if (kind, method, plan.tasks) in groups
        }
        for kind in plan.kinds
    }
    steps = open_expert(library / MULTITASK).record["hyperparameters"]["steps"]
    whole = roles_of(models[MULTITASK]["scores"]) | cost(MULTITASK) | _by_task(models[MULTITASK])
    return {
        "base": {**base, "plain": roles_of(models[BASE]["scores"]), **_by_task(models[BASE])},
        "multitask": whole | {"steps": steps},
        "experts": {kind: {task: single(f"{kind}-{task}", task) for task in plan.held_in} for kind in plan.kinds},
        "merges": merges,
    }


def _by_task(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return each task's exact match, and the answers to its first test words."""
    return {
        "exact_match": {task: scores["exact_match"] for task, scores in found["scores"]["tasks"].items()},
        "answers": {task: answers[:EXAMPLES] for task, answers in found["answers"].items()},
    }


def _bytes(expert: StoredExpert) -> int:
    """Return the size of the deltas; the record beside them holds paths, whose lengths depend on the machine."""
    return (expert.path / DELTA_FILE).stat().st_size
