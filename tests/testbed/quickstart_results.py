"""A complete results dict of a quickstart that was never run: plausible numbers, no two exact matches alike."""

from __future__ import annotations

from typing import Any

SINGLES = {"sparse": 0.767, "block": 0.693, "lora": 0.79, "full": 0.857}
SHAPES = {"sparse": (0.1, 0.15), "block": (0.1, 0.155), "lora": (0.054, 0.0545), "full": (1.0, 1.0)}
BYTES = {"sparse": 240_123, "block": 190_456, "lora": 58_789, "full": 958_012}
PARAMETERS = {"sparse": 23_952, "block": 23_680, "lora": 15_360, "full": 239_616}
SECONDS = {"sparse": 1.31, "block": 1.12, "lora": 0.93, "full": 0.87}

# Of all experts together: held in and held out at scale 1, the same at the chosen scale, and that scale.
MERGES = {
    "sparse": {
        "Average": (0.287, 0.201, 0.545, 0.462, 3.0),
        "TaskArithmetic": (0.031, 0.022, 0.548, 0.459, 0.15),
        "SparseAverage": (0.549, 0.481, 0.556, 0.484, 0.75),
        "TIES": (0.469, 0.402, 0.541, 0.457, 1.4),
    },
    "block": {
        "Average": (0.251, 0.188, 0.522, 0.441, 3.0),
        "TaskArithmetic": (0.027, 0.018, 0.519, 0.443, 0.15),
        "SparseAverage": (0.536, 0.456, 0.538, 0.461, 0.75),
        "TIES": (0.431, 0.377, 0.509, 0.432, 1.4),
    },
    "lora": {
        "Average": (0.396, 0.281, 0.552, 0.471, 2.0),
        "TaskArithmetic": (0.014, 0.009, 0.546, 0.468, 0.1),
        "TIES": (0.507, 0.431, 0.551, 0.449, 0.75),
    },
    "full": {
        "Average": (0.458, 0.299, 0.568, 0.466, 1.5),
        "TaskArithmetic": (0.008, 0.006, 0.561, 0.464, 0.05),
        "TIES": (0.383, 0.288, 0.435, 0.367, 0.5),
    },
}
GRIDS = {"Average": [1.0, 1.5, 2.0, 3.0, 4.0], "SparseAverage": [0.35, 0.5, 0.75, 1.0, 1.4]} | {
    "TaskArithmetic": [0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0],
    "TIES": [0.35, 0.5, 0.75, 1.0, 1.4],
}
HELD_OUT = ["rotate_right", "next_but_one", "drop_ends", "count_low", "smallest", "has_h", "first_upper", "sort_down"]
HELD_IN = [
    *["reverse", "upper", "first_two", "count_letters", "largest", "has_a", "reverse_upper", "copy", "next"],
    *["last_two", "count_vowels", "ends_alike", "sort", "previous", "drop_first", "rotate_left", "star_vowels"],
    *["drop_last", "swap_ends", "mirror"],
]


def complete_results(
    levels: tuple[int, ...] = (2, 5, 10, 20), kinds: tuple[str, ...] = tuple(SINGLES)
) -> dict[str, Any]:
    """Return the results of a run with as many tasks as the last level."""
    tasks = HELD_IN[: levels[-1]]
    return {
        "format": "modular-experts/quickstart/1",
        "seed": 7,
        "tasks": tasks,
        "held_out": list(HELD_OUT),
        "levels": list(levels),
        "versions": {"modular-experts": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6"},
        "python": "3.11.7",
        "machine": "2 cores, x86_64",
        "plan": {"hidden": 96, "expert_steps": 50, "batch_size": 16, "test_rows": 48, "validation_rows": 16},
        "base": {
            "parameters": 277_728,
            "steps": 1350,
            "seconds": 54.2,
            "plain": {"held_in": scores(0.0104), "held_out": scores(0.0131)},
            "latent": {"held_in": scores(0.801), "held_out": scores(0.745)},
        },
        "multitask": {
            "held_in": scores(0.861),
            "held_out": scores(0.552),
            **{"seconds": 15.2, "bytes": 958_111, "steps": 1000, "kept": 1.0, "ever_trained": 1.0},
        },
        "experts": {kind: _experts(kind, tasks) for kind in kinds},
        "merges": {kind: {method: _merges(kind, method, levels) for method in MERGES[kind]} for kind in kinds},
    }


def scores(exact_match: float) -> dict[str, float]:
    """Return scores that go together."""
    return {
        "exact_match": exact_match,
        "rougeL": round(0.52 + 0.47 * exact_match, 5),
        "loss": round(1.9 * (1 - exact_match) ** 2 + 0.012, 5),
    }


def _experts(kind: str, tasks: list[str]) -> dict[str, Any]:
    """Spread the tasks evenly around the kind's mean, with steps that no other kind has."""
    kept, ever = SHAPES[kind]
    middle, step = (len(tasks) - 1) / 2, 0.0061 + 0.0007 * list(SINGLES).index(kind)
    return {
        task: scores(round(SINGLES[kind] + step * (place * 7 % len(tasks) - middle), 5))
        | {"rows": 48, "kept": kept, "ever_trained": ever, "bytes": BYTES[kind], "seconds": SECONDS[kind]}
        | {"parameters": PARAMETERS[kind]}
        for place, task in enumerate(tasks)
    }


def _merges(kind: str, method: str, levels: tuple[int, ...]) -> dict[str, Any]:
    """At the first level the way down from the single experts has begun, at the last it is over."""
    plain, plain_out, chosen, chosen_out, scale = MERGES[kind][method]
    found = {}
    for number, level in enumerate(levels, start=1):
        way = (number / len(levels)) ** (0.6 if method == "TIES" else 0.7)
        found[str(level)] = {
            "subsets": levels[-1] // level,
            "scale": scale,
            "scales": {str(tried): {"loss": 0.5 + abs(tried - scale)} for tried in GRIDS[method]},
            "chosen": {"held_in": scores(round(SINGLES[kind] + way * (chosen - SINGLES[kind]), 5))},
            "default": {"held_in": scores(round(SINGLES[kind] + way * (plain - SINGLES[kind]), 5))},
            "kept": min(1.0, round(SHAPES[kind][0] * level**0.7, 4)),
            "seconds": 0.09 + 0.01 * level,
        }
    last = found[str(levels[-1])]
    last["chosen"]["held_out"], last["default"]["held_out"] = scores(chosen_out), scores(plain_out)
    last |= {"bytes": 3 * BYTES[kind] + len(method), "name": f"merge-{kind}-{method}"}
    return found


def in_another_order(results: Any) -> Any:
    """Return the same results with every dict turned around, as a run of several processes may leave them."""
    if not isinstance(results, dict):
        return results
    return {name: in_another_order(value) for name, value in reversed(results.items())}
