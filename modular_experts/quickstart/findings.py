"""State what a run shows: one sentence with its numbers for each question, as sure as one seed allows.

A difference below the noise of one seed is called level. Which question stands where is decided in `report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from modular_experts.quickstart.rows import KIND_NAMES, LATENT, METHOD_NAMES
from modular_experts.reports import Results
from modular_experts.reports.tables import listed, percent, points, times

__all__ = [
    *("about_base", "about_certainty", "about_edges", "about_held_out", "about_merging", "about_methods"),
    *("about_multitask", "about_singles", "best_merge", "leading", "noise"),
]

# The paired difference that counts as noise on one seed, at this number of test words: 20 tasks of 48.
NOISE, NOISE_WORDS = 0.02, 960

# How a sentence names the experts of a kind.
EXPERTS = {"sparse": "sparse-entry", "block": "sparse-tile", "lora": "LoRA", "full": "full"}
COUNTS = {2: "two", 3: "three"}


def noise(run: Results, role: str = "held_in") -> float:
    """Return the difference below which exact matches are level: 0.02, and more where fewer words are tested."""
    return NOISE * max(1.0, math.sqrt(NOISE_WORDS / _words(run, role)))


def about_base(run: Results) -> str:
    """State what the base answers as it is, and in its own format."""
    plain, latent = _exact(run, model="base", role="held_in"), _exact(run, model=LATENT, role="held_in")
    text = f"The base answers {percent(plain)} % of the held-in test words, and {percent(latent)} % in its own format."
    missed = not run.facts["base"].get("target_reached", True)
    return f"{text} It ran out of steps before it reached its target." if missed else text


def about_singles(run: Results) -> str:
    """Rank the kinds of single experts."""
    singles = {KIND_NAMES[kind]: _exact(run, kind=kind, count=1) for kind in run.values("kind")}
    return f"Alone, each on its own task: {_ranking(singles, noise(run))}."


def about_merging(run: Results) -> str:
    """State what merging a few and all experts of the first kind costs."""
    kind = run.values("kind")[0]
    method = leading(run, kind)
    merges = run.where(kind=kind, merge=method, at="chosen", role="held_in")
    *few, everything = run.facts["levels"]
    steps = [f"{percent(_exact(merges, count=count))} % with {count}" for count in few]
    steps.append(f"{percent(_exact(merges, count=everything))} % with all {everything}")
    alone = percent(_exact(run, kind=kind, count=1))
    return _sentence(
        f"{EXPERTS[kind]} experts answer {alone} % alone, and merged into one model {listed(steps)} "
        f"({METHOD_NAMES[method]})."
    )


def about_methods(run: Results) -> str:
    """Rank the methods on the first kind, untuned and tuned. Task arithmetic is the average at another scale."""
    kind = run.values("kind")[0]
    ranks = []
    for at in ("default", "chosen"):
        methods = [method for method in _methods(run, kind) if method != "TaskArithmetic"]
        values = {METHOD_NAMES[method]: _all(run, kind, method, at=at) for method in methods}
        ranks.append(_ranking(values, noise(run)))
    merges = f"All {run.facts['levels'][-1]} {EXPERTS[kind]} experts in one model"
    return f"{merges}, with nothing tuned: {ranks[0]}. With the scale chosen: {ranks[1]}."


def about_held_out(run: Results) -> str:
    """State what the merge does on tasks that no expert was trained on."""
    kind = run.values("kind")[0]
    merged = _all(run, kind, leading(run, kind), role="held_out")
    base = _exact(run, model="base", role="held_out")
    gain = merged - base
    if gain >= noise(run, "held_out"):
        so = f"{points(gain)} above the base: the answers' format, which all experts share, carries over"
    else:
        so = f"no better than the base ({percent(base)} %) within the noise"
    return f"On tasks that no expert was trained on, the same merge answers {percent(merged)} %, {so}."


def about_multitask(run: Results) -> str:
    """Compare one training on all tasks with the best merge."""
    kind, method = best_merge(run)
    parts = []
    for role, words in (("held_in", "held-in"), ("held_out", "held-out")):
        tuned = _exact(run, model="multitask", role=role)
        parts.append(f"{percent(tuned)} % {words} (the best merge: {percent(_all(run, kind, method, role=role))} %)")
    return f"One full fine-tune on all tasks together answers {listed(parts)}; it needs all rows in one place."


def about_certainty(run: Results) -> str:
    """State how small a difference one seed can show."""
    return (
        f"This is one seed ({run.facts['seed']}): differences under {points(noise(run))} held in and "
        f"{points(noise(run, 'held_out'))} held out are noise."
    )


def about_edges(run: Results) -> str:
    """Name the merges of all experts whose chosen scale is the first or last of those tried; empty if none is."""
    edges = []
    for kind in run.values("kind"):
        for method in _methods(run, kind):
            merge = run.where(kind=kind, merge=method, count=run.facts["levels"][-1])
            scale, tried = merge.mean("scale"), merge.values("scale")
            if scale is not None and scale in (min(tried), max(tried)):
                edges.append(f"{KIND_NAMES[kind]} ({METHOD_NAMES[method]}, {times(scale)})")
    return f"A better scale may lie beyond those tried for {listed(edges)}." if edges else ""


def leading(run: Results, kind: str) -> str:
    """Return the method to look at first: overlap-aware where it is its own method, else the best at scale 1."""
    methods = _methods(run, kind)
    if "SparseAverage" in methods:
        return "SparseAverage"
    return max(methods, key=lambda method: _all(run, kind, method, at="default"))


def best_merge(run: Results, kind: str | None = None) -> tuple[str, str]:
    """Return kind and method of the merge of all experts that is best held in, at its chosen scale; ties go first.

    Args:
        run: The run.
        kind: Look only at merges of this kind.
    """
    merges = [(k, method) for k in run.values("kind") if kind in (None, k) for method in _methods(run, k)]
    return max(merges, key=lambda merge: _all(run, *merge))


def _methods(run: Results, kind: str) -> list[str]:
    return run.where(kind=kind).values("merge")


def _exact(run: Results, **where: object) -> float:
    value = run.mean("exact_match", **where)
    return math.nan if value is None else value


def _all(run: Results, kind: str, method: str, role: str = "held_in", at: str = "chosen") -> float:
    """Return the exact match of the merge of all experts of a kind."""
    return _exact(run, kind=kind, merge=method, count=run.facts["levels"][-1], role=role, at=at)


def _words(run: Results, role: str) -> int:
    tasks = run.facts["tasks" if role == "held_in" else "held_out"]
    return len(tasks) * next(row["rows"] for row in run if row.get("rows"))


def _ranking(values: Mapping[str, float], margin: float) -> str:
    """List values from the best on, and how many of them are level with the best."""
    order = sorted(values, key=lambda name: -values[name])
    level = sum(round(values[order[0]] - value, 9) < margin for value in values.values())
    text = listed([f"{name} {percent(values[name])} %" for name in order])
    if level == 1:
        return text
    return f"{text}; " + ("all are level" if level == len(order) else f"the first {COUNTS.get(level, level)} are level")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
