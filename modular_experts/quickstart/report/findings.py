"""Findings: what a run's numbers say, in sentences. Every number and every direction word comes from the results.

A difference under the noise of one seed is called level, whatever its sign. Where the sentences stand is said in
`page.py` and `summary.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from modular_experts.quickstart.report.reading import (
    EXPERT_WORDS,
    KIND_NAMES,
    METHOD_NAMES,
    METHOD_WORDS,
    ROLE_NAMES,
    At,
    Reading,
    Role,
    listed,
    percent,
    points,
    size,
    times,
)

__all__ = [
    *("about_base", "about_certainty", "about_edges", "about_held_out", "about_kinds", "about_merging"),
    *("about_methods", "about_multitask", "about_scales", "about_singles", "about_size", "about_sum"),
]

COUNTS = {2: "two", 3: "three"}
PLACES: dict[At, str] = {"default": "at scale 1", "chosen": "at the chosen scale"}


def about_base(reading: Reading) -> str:
    """Say what the base answers as it is, and what it has in it."""
    plain, latent = reading.other("plain"), reading.other("latent")
    has_it = latent - plain >= reading.noise()
    so = "it has the skill and lacks the format" if has_it else "it has no more in it than it shows"
    found = (
        f"As it is, the base answers {percent(plain)} % of the held-in test words; asked in its own format, "
        f"{percent(latent)} %: {so}."
    )
    missed = not reading.results["base"].get("target_reached", True)
    return f"{found} It was to be trained further but ran out of steps." if missed else found


def about_singles(reading: Reading) -> str:
    """Say how good single experts of each kind are."""
    singles = {KIND_NAMES[kind]: reading.single(kind) for kind in reading.kinds}
    return f"Single experts, each on its own task: {ranking(singles, reading.noise())}."


def about_size(reading: Reading) -> str:
    """Say which kind of expert is small on disk, and by how much."""
    sizes = {kind: reading.single(kind, "bytes") for kind in reading.kinds}
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    smallest = f"On disk an expert takes {size(sizes[small])} ({KIND_NAMES[small]})"
    if small == large:
        return f"{smallest}."
    return f"{smallest} to {size(sizes[large])} ({KIND_NAMES[large]}, {sizes[large] / sizes[small]:.1f} times as much)."


def about_merging(reading: Reading, kind: str) -> str:
    """Say what merging a few and all experts of a kind costs, at the chosen scale."""
    method, everything = leading(reading, kind), reading.everything
    course = {1: reading.single(kind)} | {n: reading.merged(kind, method, level=n) for n in reading.levels}
    few = [f"{percent(value)} % with {n}" for n, value in course.items() if 1 < n < everything]
    steps = listed([*few, f"{percent(course[everything])} % with all {everything}"])
    return (
        f"Merging {EXPERT_WORDS[kind]} experts into one ({METHOD_NAMES[method]}, chosen scale): {percent(course[1])} % "
        f"apart, {steps}; {trend(course, reading.noise())}."
    )


def about_kinds(reading: Reading, at: At, role: Role = "held_in") -> str:
    """Compare the kinds by the best merge of all their experts."""
    best = {kind: reading.best(kind, role, at) for kind in reading.kinds}
    merged = {f"{KIND_NAMES[k]} ({METHOD_NAMES[m]})": reading.merged(k, m, role, at) for k, m in best.items()}
    order = ranking(merged, reading.noise(role))
    return f"The best merge of each kind {PLACES[at]}, on {ROLE_NAMES[role]} tasks: {order}."


def about_methods(reading: Reading, kind: str) -> str:
    """Compare the leading method with the others, at scale 1 and at the chosen scale."""
    who = f"{METHOD_WORDS[leading(reading, kind)]} of all {EXPERT_WORDS[kind]} experts"
    return (
        f"At scale 1 {who} gets {_compared(reading, kind, 'default')}. "
        f"At the chosen scale it gets {_compared(reading, kind, 'chosen')}."
    )


def _compared(reading: Reading, kind: str, at: At) -> str:
    """Compare with all but task arithmetic, which is another scale of the average."""
    method, noise = leading(reading, kind), reading.noise()
    value = reading.merged(kind, method, at=at)
    others = [name for name in reading.methods(kind) if name not in (method, "TaskArithmetic")]
    return f"{percent(value)} %, " + listed(
        [against(value, reading.merged(kind, other, at=at), noise, METHOD_WORDS[other]) for other in others]
    )


def about_scales(reading: Reading) -> str:
    """Say where choosing the scale changes most, and where least."""
    gains = {
        f"{KIND_NAMES[kind]} ({METHOD_NAMES[method]})": reading.merged(kind, method)
        - reading.merged(kind, method, at="default")
        for kind in reading.kinds
        for method in reading.methods(kind)
        if method != "TaskArithmetic"
    }
    most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    return (
        f"Choosing the scale does most for {most}, {100 * gains[most]:+.1f} points, and least for {least}, "
        f"{100 * gains[least]:+.1f} points."
    )


def about_sum(reading: Reading) -> str:
    """Say how task arithmetic belongs to the average, and what the plain sum does."""
    sums = [reading.merged(kind, "TaskArithmetic", at="default") for kind in reading.kinds]
    return (
        f"Task arithmetic is the average at {reading.everything} times its scale; at scale 1 it is the plain sum of "
        f"all deltas, which gets {percent(min(sums))} to {percent(max(sums))} %."
    )


def about_edges(reading: Reading) -> str:
    """Name the merges of all experts whose chosen scale is the first or last of those tried, or say that none is."""
    edges = []
    for kind in reading.kinds:
        for method in reading.methods(kind):
            merge = reading.merge(kind, method)
            tried = [float(scale) for scale in merge["scales"]]
            if merge["scale"] in (min(tried), max(tried)):
                edges.append(f"{KIND_NAMES[kind]} ({METHOD_NAMES[method]}, {times(merge['scale'])})")
    if not edges:
        return "No chosen scale is at the edge of those tried."
    return f"A better scale may lie beyond those tried for {listed(edges)}."


def about_held_out(reading: Reading, kind: str) -> str:
    """Say what the merge of all experts of a kind does on tasks that no expert was trained on."""
    method, noise = leading(reading, kind), reading.noise("held_out")
    merged, base = reading.merged(kind, method, "held_out"), reading.other("plain", "held_out")
    if merged - base >= noise:
        so = "what the experts share, above all the format, reaches tasks that none of them was trained on"
    else:
        so = "nothing of what the experts share reaches tasks that none of them was trained on"
    inside = reading.merged(kind, method)
    return (
        f"On the {len(reading.tasks('held_out'))} held-out tasks the merge of all {EXPERT_WORDS[kind]} experts "
        f"({METHOD_NAMES[method]}, chosen scale) gets {percent(merged)} %, {against(merged, base, noise, 'the base')}: "
        f"{so}. Held in it gets {percent(inside)} %, {against(inside, merged, noise, 'held out')}."
    )


def about_multitask(reading: Reading) -> str:
    """Compare one training on all tasks with the best merges."""
    parts = []
    for role, words in ROLE_NAMES.items():
        kind, method, merged = reading.best_of_all(role)
        value = reading.other("multitask", role)
        name = f"the best merge, {METHOD_WORDS[method]} of the {EXPERT_WORDS[kind]} experts"
        parts.append(f"{percent(value)} % {words}, {against(value, merged, reading.noise(role), name)}")
    return f"One full fine-tune on all {len(reading.tasks())} tasks together gets {'; and '.join(parts)}."


def about_certainty(reading: Reading) -> str:
    """Say what is noise, and why one run is not the last word."""
    words = {role: len(reading.tasks(role)) * reading.words_per_task for role in ROLE_NAMES}
    return (
        f"This is seed {reading.results['seed']}, and one seed is one seed: differences under "
        f"{points(reading.noise())} held in ({words['held_in']} test words) and {points(reading.noise('held_out'))} "
        f"held out ({words['held_out']}) are noise, and called level."
    )


def leading(reading: Reading, kind: str) -> str:
    """Return the method that is looked at first: overlap-aware where it is its own method, else the best at scale 1."""
    return "SparseAverage" if "SparseAverage" in reading.methods(kind) else reading.best(kind, at="default")


def against(value: float, other: float, noise: float, name: str) -> str:
    """Say where a value is against another: `2.1 points above the average (28.7 %)`."""
    difference = round(value - other, 9)
    if abs(difference) < noise:
        return f"level with {name} ({percent(other)} %)"
    return f"{points(difference)} {'above' if difference > 0 else 'below'} {name} ({percent(other)} %)"


def ranking(values: Mapping[str, float], noise: float) -> str:
    """List values from the best on, and say whether the first is ahead of the next."""
    order = sorted(values, key=lambda name: -values[name])
    level = sum(round(values[order[0]] - value, 9) < noise for value in values.values())
    if len(order) == 1:
        so = ""
    elif level == 1:
        so = f"; the first is ahead by {points(values[order[0]] - values[order[1]])}"
    else:
        so = "; all are level" if level == len(order) else f"; the first {COUNTS.get(level, level)} are level"
    return listed([f"{name} {percent(values[name])} %" for name in order]) + so


def trend(course: Mapping[int, float], noise: float) -> str:
    """Say at which steps of a course something is lost or gained."""
    changes = {(a, b): round(course[b] - course[a], 9) for a, b in pairwise(course)}
    lost, gained = _steps(changes, lambda change: change <= -noise), _steps(changes, lambda change: change >= noise)
    if not lost and not gained:
        return "no step changes more than the noise"
    if len(lost) == len(changes):
        return "each step costs more than the noise" if len(lost) > 1 else "that costs more than the noise"
    loses = f"it loses from {listed(lost)}" if lost else ""
    gains = f"it gains from {listed(gained)}" if gained else ""
    return " and ".join(filter(None, [loses, gains]))


def _steps(changes: Mapping[tuple[int, int], float], which: Callable[[float], bool]) -> list[str]:
    return [f"{first} to {second}" for (first, second), change in changes.items() if which(change)]
