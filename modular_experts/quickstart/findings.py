"""State what a run shows: one sentence with its numbers for each question, as sure as one seed allows.

The sentences call a difference below the noise of one seed level. `report.py` puts them in their places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from modular_experts.quickstart.rows import KIND_NAMES, LATENT, METHOD_NAMES
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
    """Rank the kinds of single experts."""
    singles = {KIND_NAMES[kind]: exact(run, kind=kind, count=1) for kind in run.values("kind")}
    return f"Alone, each on its own task: {_ranking(singles, noise(run))}."


def about_merging(run: Results) -> str:
    """State what merging a few and all experts of the first kind costs."""
    kind = run.values("kind")[0]
    method = leading(run, kind)
    merges = run.where(kind=kind, merge=method, at="chosen", role="held_in")
    *few, everything = run.facts["levels"]
    steps = [f"{percent(exact(merges, count=count))} % with {count}" for count in few]
    steps.append(f"{percent(exact(merges, count=everything))} % with all {everything}")
    alone = percent(exact(run, kind=kind, count=1))
    name = EXPERTS[kind][0].upper() + EXPERTS[kind][1:]
    return f"{name} experts answer {alone} % alone, and merged into one model {listed(steps)} ({METHOD_NAMES[method]})."


def about_methods(run: Results) -> str:
    """Rank the methods on the first kind, untuned and tuned. Task arithmetic is the average at another scale."""
    kind = run.values("kind")[0]
    ranks = []
    for at in ("default", "chosen"):
        methods = [method for method in run.where(kind=kind).values("merge") if method != "TaskArithmetic"]
        values = {METHOD_NAMES[method]: _all(run, kind, method, at=at) for method in methods}
        ranks.append(_ranking(values, noise(run)))
    merges = f"All {run.facts['levels'][-1]} {EXPERTS[kind]} experts in one model"
    return f"{merges}, with nothing tuned: {ranks[0]}. With the scale chosen: {ranks[1]}."


def about_held_out(run: Results) -> str:
    """State what the merge does on tasks that no expert was trained on."""
    kind = run.values("kind")[0]
    merged = _all(run, kind, leading(run, kind), role="held_out")
    base = exact(run, model="base", role="held_out")
    if merged - base >= noise(run, "held_out"):
        so = f"{points(merged - base)} above the base: the answers' format, which all experts share, carries over"
    else:
        so = f"no better than the base ({percent(base)} %) within the noise"
    return f"On tasks that no expert was trained on, the same merge answers {percent(merged)} %, {so}."


def about_certainty(run: Results) -> str:
    """State how small a difference one seed can show."""
    return (
        f"This is one seed ({run.facts['seed']}): differences under {points(noise(run))} held in and "
        f"{points(noise(run, 'held_out'))} held out are noise."
    )


def leading(run: Results, kind: str) -> str:
    """Return the method to look at first: overlap-aware where it is its own method, else the best at scale 1."""
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


def _ranking(values: Mapping[str, float], margin: float) -> str:
    """List values from the best on, and how many of them are level with the best."""
    order = sorted(values, key=lambda name: -values[name])
    level = sum(round(values[order[0]] - value, 9) < margin for value in values.values())
    text = listed([f"{name} {percent(values[name])} %" for name in order])
    if level == 1:
        return text
    return f"{text}; " + ("all are level" if level == len(order) else f"the first {level} are level")
