"""Run recipes of mergekit, and compare each weight of the checkpoint with the formula of its method."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe
from soak import bases
from soak.case import Case
from soak.method_settings import uniform
from soak.reference import merges

# The parameters with a value for each model, and the parameters of the whole merge.
PRUNED = (["weight", "density"], ["lambda", "normalize", "rescale"])
PARAMETERS: dict[str, tuple[list[str], list[str]]] = {
    "linear": (["weight"], ["normalize"]),
    "task_arithmetic": (["weight"], ["lambda", "normalize"]),
    **dict.fromkeys(["ties", "dare_linear", "dare_ties"], PRUNED),
    **dict.fromkeys(["breadcrumbs", "breadcrumbs_ties"], (["weight", "density", "gamma"], PRUNED[1])),
    **dict.fromkeys(["della", "della_linear"], (["weight", "density", "epsilon"], PRUNED[1])),
    "sce": ([], ["select_topk"]),
    "slerp": ([], ["t"]),
    "nuslerp": (["weight"], []),
    "multislerp": (["weight"], ["normalize_weights"]),
    "karcher": ([], []),
    "model_stock": ([], []),
    "ram": ([], []),
    "ramplus_tl": ([], ["r", "alpha"]),
}
VALUES: dict[str, list[float]] = {
    "weight": [0.25, 0.5, 1.0, 1.5],
    "density": [0.3, 0.5, 0.8],
    "gamma": [0.0, 0.01, 0.1],
    "epsilon": [0.0, 0.05, 0.1],
    "lambda": [0.5, 1.0],
    "t": [0.0, 0.3, 0.5, 1.0],
    "select_topk": [0.1, 0.5, 1.0],
    "r": [0.1, 1.0],
    "alpha": [0.2, 2.0],
}
# Parameters that switch something on or off.
FLAGS = ("normalize", "rescale", "normalize_weights")
REQUIRED = ("weight", "t")
# The defaults of mergekit that differ from method to method.
NORMALISES = ("linear", "ties", "della")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
ON_MODELS = ("linear", "slerp", "karcher")
OURS = {
    **{"linear": "TaskArithmetic", "task_arithmetic": "TaskArithmetic"},
    **{"ties": "TIES", "dare_linear": "DARE", "dare_ties": "DARETIES", "breadcrumbs": "Breadcrumbs"},
    **{"breadcrumbs_ties": "BreadcrumbsTIES", "della": "DELLA", "della_linear": "DELLALinear", "sce": "SCE"},
    **{"ram": "RAM", "ramplus_tl": "RAMPlus", "model_stock": "ModelStock", "karcher": "Karcher"},
    **{"slerp": "SLERP", "nuslerp": "NuSLERP", "multislerp": "MultiSLERP"},
}

Rule = Any
"""A value of a parameter as YAML has it: a number, a list over the layers, or a list of filters."""


def _rule(case: Case, parameter: str, modules: list[str]) -> Rule:
    if parameter in FLAGS:
        return case.random.choice([0.0, 1.0])
    values = VALUES[parameter]
    kind = case.random.choice(["number", "number", "gradient", "filters"])
    if kind == "number":
        return case.random.choice(values)
    if kind == "gradient":
        return [case.random.choice(values) for _ in range(case.random.randint(2, 3))]
    first = {"filter": case.random.choice(modules), "value": case.random.choice(values)}
    return [first, {"value": [case.random.choice(values), case.random.choice(values)]}]


def _value(rule: Rule, name: str, share: float) -> float:
    """Return the value of a parameter for a weight: of the first filter in its name, linear between the layers."""
    if isinstance(rule, list) and isinstance(rule[0], dict):
        rule = next(part["value"] for part in rule if part.get("filter", "") in name)
    numbers = rule if isinstance(rule, list) else [rule]
    place = share * (len(numbers) - 1)
    lower = min(int(place), max(0, len(numbers) - 2))
    upper = min(lower + 1, len(numbers) - 1)
    return numbers[lower] + (place - lower) * (numbers[upper] - numbers[lower])


def _settings(method: str, own: dict[str, list[float]], whole: dict[str, float], size: int) -> dict[str, Any]:
    """Return the reference's settings for values of a recipe; mergekit drops a whole number of entries."""
    settings: dict[str, Any] = {"weights": own["weight"]} if "weight" in own else {}
    normalises = bool(whole.get("normalize", method in NORMALISES))
    if method in ("sce", "slerp", "ramplus_tl"):
        settings |= {{"select_topk": "keep"}.get(name, name): value for name, value in whole.items()}
    if method == "sce":
        settings["zero"] = "positive"
    if method in ("ram", "ramplus_tl"):
        settings["epsilon"] = 1e-5
    if method == "model_stock":
        settings["least"] = -1.0
    if method == "multislerp" and not whole.get("normalize_weights", 1.0):
        settings["scale"] = sum(own["weight"])
    if method in ("linear", "task_arithmetic"):
        settings |= {"scale": whole.get("lambda", 1.0), "normalise": normalises}
    if "density" not in own:
        return settings
    settings |= {"scale": whole.get("lambda", 1.0)}
    settings["rescale"] = "l1" if whole.get("rescale", method in RANDOM) else "none"
    if "ties" in method or method == "della":
        settings |= {"vote": "weighted", "divisor": "weights" if normalises else "none", "zero": "positive"}
    else:
        settings["normalise"] = normalises
    if method == "ties":
        settings["keep"] = [max(int(density * size), 1) / size for density in own["density"]]
    elif "breadcrumbs" in method:
        pairs = zip(own["density"], own["gamma"], strict=True)
        gone = [(size - int(density * size), int(gamma * size)) for density, gamma in pairs]
        settings["beta"] = [max(dropped - largest, 0) / size for dropped, largest in gone]
        settings["gamma"] = [min(dropped, largest) / size for dropped, largest in gone]
    else:
        settings["keep"] = own["density"]
        settings |= {"epsilon": own["epsilon"]} if "epsilon" in own else {}
    return settings


def _tuned(case: Case, kind: str, folder: Path, share: float) -> dict[str, Tensor]:
    """Write a checkpoint whose weights have moved at a share of their entries, and return its weights."""
    model = AutoModelForCausalLM.from_pretrained(bases.base_of(kind), dtype=torch.float32)
    generator = torch.Generator().manual_seed(case.random.randrange(2**31))
    with torch.no_grad():
        for weight in model.parameters():
            moved = torch.rand(weight.shape, generator=generator) < share
            weight += 0.05 * torch.randn(weight.shape, generator=generator) * moved
    model.save_pretrained(folder)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def recipe_case(case: Case) -> None:
    """Each weight of the merged checkpoint is the formula of its method, with the values of its layer and name."""
    kind = case.random.choice([kind for kind in bases.KINDS if kind != "mixtral"])
    method = case.random.choice(sorted(PARAMETERS))
    count = {"slerp": 1, "nuslerp": 2}.get(method, case.random.choice([2, 3]))
    share = 1.0 if method in ("nuslerp", "model_stock") else case.random.choice([0.05, 0.5, 1.0])
    places = [case.folder / f"m{number}" for number in range(count)]
    weights = [_tuned(case, kind, place, share) for place in places]
    on_deltas = method not in ON_MODELS and (method not in ("nuslerp", "multislerp") or case.chance(0.5))
    each, overall = PARAMETERS[method]
    chosen = {name: _rule(case, name, bases.LINEAR[kind]) for name in overall if name in REQUIRED or case.chance(0.6)}
    own: list[dict[str, Rule]] = [{name: _rule(case, name, bases.LINEAR[kind]) for name in each} for _ in places]
    models = [{"model": str(place), "parameters": rules} for place, rules in zip(places, own, strict=True)]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": chosen}
    if on_deltas or method == "slerp":
        recipe["base_model"] = str(bases.base_of(kind))
    seed = case.random.randrange(5)
    case.note(base=kind, recipe=recipe, seed_of_drops=seed)
    file = case.folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    out = merge_recipe(read_recipe(file), case.folder / "merged", seed)
    start = {name: weight.detach() for name, weight in _loaded(bases.base_of(kind)).items()}
    merged = _loaded(out)
    depths = {name: re.search(r"\.(\d+)\.", name) for name in merged}
    layers = 1 + max(int(block[1]) for block in depths.values() if block)
    for name, weight in merged.items():
        block = depths[name]
        at = 0.0 if block is None else int(block[1]) / (layers - 1) if layers > 1 else 1.0
        parts = [model[name] for model in weights]
        x = torch.stack([part - start[name] for part in parts] if on_deltas else parts).double()
        if method == "slerp":
            x = torch.stack([start[name], *parts]).double()
        values = {parameter: [_value(rules[parameter], name, at) for rules in own] for parameter in each}
        whole = {parameter: _value(rule, name, at) for parameter, rule in chosen.items()}
        settings = _settings(method, values, whole, weight.numel())
        if method in RANDOM:
            settings["seed"] = seed
        known = merges.Weight(x, x != 0, x.flatten(1), partial(uniform, name))
        expected = known.merged(OURS[method], **settings)
        difference = weight.double() - start[name].double() if on_deltas else weight
        # mergekit's iteration ends at a step of 1e-5 radians.
        relative = 1e-4 if method == "karcher" else 2e-5
        case.close(difference, expected, f"{method} {name}", relative, 5e-7)


def _loaded(place: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).named_parameters())


FAMILIES = {"recipe": recipe_case}
