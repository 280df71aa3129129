"""Draw random settings of merge methods, and the numbers by which they drop entries."""

from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soak.case import Case

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "TIES": {
        "paper": {"scope": "global"},
        "mergekit": {"keep": 1.0, "vote": "weighted", "divisor": "weights", "zero": "positive"},
        "paper-code": {"keep": 0.8, "scope": "global", "zero": "weight_majority"},
        "peft": {"zero": "positive"},
    },
    "Breadcrumbs": {
        "paper": {},
        "mergekit": {"beta": 0.0},
        "paper-code": {"beta": 0.1, "gamma": 0.0, "scope": "global"},
    },
    "BreadcrumbsTIES": {"mergekit": {"beta": 0.0, "vote": "weighted", "divisor": "none", "zero": "positive"}},
    "DARE": {"paper": {}, "mergekit": {"keep": 1.0, "rescale": "l1"}, "peft": {}},
    "DARETIES": {
        "peft": {"zero": "positive"},
        "mergekit": {"keep": 1.0, "rescale": "l1", "vote": "weighted", "divisor": "none", "zero": "positive"},
    },
    "DELLA": {
        "paper": {},
        "mergekit": {"keep": 1.0, "rescale": "l1", "vote": "weighted", "divisor": "weights", "zero": "positive"},
    },
    "DELLALinear": {"mergekit": {"keep": 1.0, "rescale": "l1"}},
    "ModelStock": {"mergekit": {"least": -1.0, "all_count": True}},
    "SCE": {"mergekit": {"floor": 1e-6, "zero": "positive"}},
    "WUDI": {"vit": {"power": 1.0}, "roberta": {"power": 2.0}},
}
"""What each preset fills, by the texts of the methods."""
WITH_PRESETS = ("weights", "scale", "seed", "solver", "learning_rate", "steps")
"""Settings that may stand beside a preset without changing what it fills."""

ELECTIONS = ("TIES", "DARETIES", "DELLA", "BreadcrumbsTIES")
PRUNED_SUMS = ("MagnitudePrune", "DARE", "DELLALinear", "Breadcrumbs")
DROPS = ("DARE", "DARETIES", "DELLA", "DELLALinear")
WEIGHTED = ("Average", "TaskArithmetic", "NuSLERP", "MultiSLERP", "Karcher", *ELECTIONS, *PRUNED_SUMS)
COORDINATES = ("KnOTS", "CoreSpace", "CtM")
WRAPPERS = (*COORDINATES, "SVC", "LiNeS", "Rescaled")
OF_DATA = {"Fisher": "fisher", "RegMean": "gram", "RegMeanPlusPlus": "merged_gram"}
# These compare numbers that are zero but for rounding, or count them, and singular directions have any sign.
NOT_IN_COORDINATES = ("SparseAverage",)
INSIDE = ("TIES", "Average", "TaskArithmetic", "EMR", "DARE", "DELLA", "MagnitudePrune", *NOT_IN_COORDINATES)

CHOICES: dict[str, dict[str, list[Any]]] = {
    "SparseAverage": {"count": ["values", "supports"], "exponent": [0.0, 0.5, 1.0]},
    "ConsensusTA": {"threshold": [0.2, 0.4, 0.6], "agreement": [1, 2]},
    "TALLMask": {"threshold": [0.2, 0.4, 0.6]},
    "Intersection": {"agreement": [None, 1, 2]},
    "RAM": {"epsilon": [0.0, 0.01]},
    "RAMPlus": {"epsilon": [0.0, 0.01], "r": [0.1, 1.0], "alpha": [0.2, 2.0]},
    "SCE": {"keep": [1.0, 0.5, 0.1], "zero": ["none", "positive"], "floor": [0.0, 0.001, 0.1]},
    "ModelStock": {"row_wise": [False, True]},
    "SLERP": {"t": [0.0, 0.3, 0.5, 1.0]},
    "NuSLERP": {"row_wise": [False, False, True]},
    "Karcher": {"max_iterations": [0, 1, 3, 200], "tolerance": [1e-9]},
    "TSVMerge": {"share": [0.1, 0.3, 1.0]},
    "IsoCTS": {"common": [0.0, 0.3, 0.5, 0.8, 1.0]},
    "SelfRegMean": {"ridge": [0.01, 0.1, 1.0], "inputs": [0, 1], "flatten": [0.0, 0.0, 0.5, 1.0]},
    "RegMean": {"reduce": [0.0, 0.5, 0.9, 1.0], "ridge": [0.0, 0.0, 0.01, 1.0]},
    "RegMeanPlusPlus": {"reduce": [0.0, 0.5, 0.9, 1.0]},
    "Fisher": {"normalise": [False, True], "floor": [1e-6, 0.01, 1.0]},
    "WUDI": {
        **{"power": [0.0, 1.0, 2.0], "solver": ["adam", "exact"]},
        **{"learning_rate": [1e-5, 1e-3], "steps": [0, 1, 10]},
    },
    "SVC": {"alpha": [0.1, 0.5, 1.0]},
    "LiNeS": {"last": [0.0, 0.75, 1.0, 2.0]},
    "CtM": {"rank": [1, 3, 8, 100]},
    "TIES": {"keep": [0.01, 0.1, 0.5, 1.0], "scope": ["weight", "global"]},
    "MagnitudePrune": {"keep": [0.01, 0.1, 0.5, 1.0]},
    "DARE": {"keep": [0.1, 0.5, 0.9, 1.0]},
    "DARETIES": {"keep": [0.1, 0.5, 0.9, 1.0]},
    "DELLA": {"keep": [0.2, 0.5, 0.8], "epsilon": [0.0, 0.1, 0.15]},
    "DELLALinear": {"keep": [0.2, 0.5, 0.8], "epsilon": [0.0, 0.1, 0.15]},
    "Breadcrumbs": {
        **{"beta": [0.0, 0.1, 0.5, 0.9], "gamma": [0.0, 0.01, 0.05]},
        **{"scope": ["weight", "global"]},
    },
    "BreadcrumbsTIES": {"beta": [0.0, 0.1, 0.5, 0.9], "gamma": [0.0, 0.01, 0.05]},
}
RESCALES = {name: ["probability", "l1", "none"] for name in DROPS}
# One number, or one for each expert.
SHARES = ("keep", "beta", "gamma", "epsilon")
# Their defaults do not suit two experts, or few steps.
ALWAYS = ("agreement", "max_iterations", "tolerance", "steps", "learning_rate", "keep")


def weights_of(case: Case, count: int, negative: bool) -> list[float]:
    """Return a weight for each expert, a multiple of 1/8, so that votes which cancel do so exactly."""
    low = -6 if negative and case.chance(0.3) else 1
    weights = [case.random.randint(low, 16) / 8 for _ in range(count)]
    return weights if abs(sum(weights)) > 0.2 else [1.0] * count


def drawn_settings(case: Case, name: str, count: int, single: bool = False) -> dict[str, Any]:
    """Return random settings of a method for some experts; what is left out takes its default.

    `single` leaves out what holds for all weights of an expert together, or blows up entries that are zero but for
    rounding in other coordinates.
    """
    choices = dict(CHOICES.get(name, {}))
    if name in (*ELECTIONS, *PRUNED_SUMS):
        choices["rescale"] = RESCALES.get(name, ["none", "l1"])
    if name in ELECTIONS:
        choices |= {"vote": ["sum", "weighted", "count"], "divisor": ["count", "weights", "none"]}
        choices["zero"] = ["none", "positive", "weight_majority"]
    if name in PRUNED_SUMS:
        choices["normalise"] = [False, False, True]
    if name in DROPS:
        choices["seed"] = list(range(5))
    if single:
        choices = {key: values for key, values in choices.items() if key not in ("scope", "count", "zero", "rescale")}
    settings: dict[str, Any] = {}
    for key, values in choices.items():
        if key in ALWAYS or case.chance(0.8):
            settings[key] = case.random.choice(values)
            if key in SHARES and name in (*ELECTIONS, *PRUNED_SUMS) and case.chance(0.2):
                settings[key] = [case.random.choice(values) for _ in range(count)]
    if "agreement" in settings and settings["agreement"] is not None:
        settings["agreement"] = min(count, settings["agreement"])
    if name in WEIGHTED and case.chance(0.5):
        settings["weights"] = weights_of(case, count, negative=name not in ("NuSLERP", "MultiSLERP", "Karcher"))
    if name == "NuSLERP" and not settings.get("row_wise") and case.chance(0.3):
        settings["column_wise"] = True
    if case.chance(0.6):
        settings["scale"] = case.random.choice([0.3, 0.5, 2.0, -0.75])
    return settings


def uniform(name: str, seed: int, shape: torch.Size) -> Tensor:
    """Return the numbers in [0, 1) of SplitMix64 by which experts drop entries of a weight, `(experts, *shape)`.

    For each expert, it begins at a hash of the seed, the expert's number and the weight.
    """
    draws = []
    for expert in range(shape[0]):
        digest = blake2b(f"{seed}/{expert}/{name}".encode(), digest_size=8).digest()
        mixed = np.arange(shape[1:].numel(), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed += np.uint64(int.from_bytes(digest, "little"))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        draws.append(torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53))
    return torch.stack(draws).view(shape)
