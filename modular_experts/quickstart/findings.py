"""State what a run shows: one sentence with its numbers for each question, as sure as one seed allows.

The sentences call a difference below the noise of one seed level. `report.py` puts them in their places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from modular_experts.quickstart.rows import KIND_NAMES, LATENT
from modular_experts.reports import Results
from modular_experts.reports.tables import listed, percent, points

# The paired difference that counts as noise on one seed, at this number of test words: 20 tasks of 48.
NOISE, NOISE_WORDS = 0.02, 960

# How a sentence names the experts of a kind.
EXPERTS = {"sparse": "sparse-entry", "block": "sparse-tile", "lora": "LoRA", "full": "full"}


def noise(run: Results, role: str = "held_in") -> float:
    """Return the difference below which exact matches are level: 0.02, and more where fewer words are tested."""
    tasks = run.facts["tasks" if role == "held_in" else "held_out"]
    words = len(tasks) * run.values("rows")[0]
    return NOISE * max(1.0, math.sqrt(NOISE_WORDS / words))


def about_base(run: Results) -> str:
    """State what the base answers as it is, and in its own format."""
    plain, latent = exact(run, model="base", role="held_in"), exact(run, model=LATENT, role="held_in")
    text = f"The base answers {percent(plain)} % of the held-in test words, and {percent(latent)} % in its own format."
    reached = run.facts["base"].get("target_reached", True)
    return text if reached else f"{text} It ran out of steps before it reached its target."


def about_singles(run: Results) -> str:
    """State which kinds of single experts answer best."""
    singles = {KIND_NAMES[kind]: exact(run, kind=kind, count=1) for kind in run.values("kind")}
    return f"Alone, each on its own task, {_lead(singles, noise(run))}"


def about_merging(run: Results) -> str:
    """State what merging all experts of the first kind costs."""
    kind, everything = run.values("kind")[0], run.facts["levels"][-1]
    alone, merged = exact(run, kind=kind, count=1), _all(run, kind, leading(run, kind))
    name = EXPERTS[kind][0].upper() + EXPERTS[kind][1:]
    return f"{name} experts answer {percent(alone)} % alone, and {percent(merged)} % as all {everything} in one model"


def about_methods(run: Results) -> str:
    """State which methods are best on the first kind, untuned and tuned."""
    untuned, tuned = (_best_methods(run, at) for at in ("default", "chosen"))
    return f"With nothing tuned, {untuned}; with the scale chosen, {tuned}"


def about_untuned(run: Results) -> str:
    """State which methods are best on the first kind with nothing tuned, in a sentence that stands alone."""
    experts = f"{run.facts['levels'][-1]} {EXPERTS[run.values('kind')[0]]} experts in one model"
    return f"{experts}, untuned: {_best_methods(run, 'default')}"


def _best_methods(run: Results, at: str) -> str:
    kind = run.values("kind")[0]
    # Task arithmetic is the average at another scale.
    methods = [method for method in run.where(kind=kind).values("merge") if method != "TaskArithmetic"]
    return _lead({method: _all(run, kind, method, at=at) for method in methods}, noise(run))


def about_held_out(run: Results) -> str:
    """State what the merge does on tasks that no expert was trained on."""
    kind = run.values("kind")[0]
    merged = _all(run, kind, leading(run, kind), role="held_out")
    base = exact(run, model="base", role="held_out")
    numbers = f"{percent(merged)} %, the base {percent(base)} %"
    if merged - base >= noise(run, "held_out"):
        return f"On tasks that no expert saw, the merge answers {numbers}: the experts' shared format carries over"
    return f"On tasks that no expert saw, the merge answers {numbers}, which is level within the noise"


def about_tasks(alone: Mapping[str, float], merged: Mapping[str, float]) -> str:
    """State on which task merging costs most, or without the merge's scores, which task is hardest."""
    if not merged:
        hardest = min(alone, key=lambda task: alone[task])
        return f"Alone, {hardest} is the hardest task ({percent(alone[hardest])} %)"
    most, least = (choose(alone, key=lambda task: alone[task] - merged[task]) for choose in (max, min))
    falls = [f"{task} ({percent(alone[task])} % to {percent(merged[task])} %)" for task in (most, least)]
    return f"Merging costs most on {falls[0]}, and least on {falls[1]}"


def about_certainty(run: Results) -> str:
    """State how small a difference one seed can show."""
    return (
        f"This is one seed ({run.facts['seed']}): differences under {points(noise(run))} held in and "
        f"{points(noise(run, 'held_out'))} held out are noise"
    )


def leading(run: Results, kind: str) -> str:
    """Return the method to look at first: `SparseAverage` where it was used, else the best at scale 1."""
    methods = run.where(kind=kind).values("merge")
    if "SparseAverage" in methods:
        return "SparseAverage"
    return max(methods, key=lambda method: _all(run, kind, method, at="default"))


def best_merge(run: Results, kind: str | None = None) -> tuple[str, str]:
    """Return kind and method of the merge of all experts (of a kind) that is best held in; of equals, the first."""
    kinds = [kind] if kind else run.values("kind")
    merges = [(kind, method) for kind in kinds for method in run.where(kind=kind).values("merge")]
    return max(merges, key=lambda merge: _all(run, *merge))


def exact(run: Results, **where: object) -> float:
    """Return the mean exact match of the rows that match."""
    value = run.mean("exact_match", **where)
    return math.nan if value is None else value


def _all(run: Results, kind: str, method: str, role: str = "held_in", at: str = "chosen") -> float:
    return exact(run, kind=kind, merge=method, count=run.facts["levels"][-1], role=role, at=at)


def _lead(values: Mapping[str, float], margin: float) -> str:
    """Name the best and its value, and whatever is level with it within a margin."""
    order = sorted(values, key=lambda name: -values[name])
    level = [name for name in order if round(values[order[0]] - values[name], 9) < margin]
    if len(level) == 1:
        second = f" ({order[1]} {percent(values[order[1]])} %)" if order[1:] else ""
        return f"{order[0]} is best with {percent(values[order[0]])} %{second}"
    names = "all" if len(level) == len(order) > 2 else listed(level)
    low, high = percent(values[level[-1]]), percent(values[level[0]])
    return f"{names} are level at {low}{f' to {high}' if low != high else ''} %"
