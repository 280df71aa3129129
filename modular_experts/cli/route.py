"""Run `modular-experts route`, which puts experts of a library behind a router."""

from __future__ import annotations

# So that a config names the generated tasks by their class alone.
from modular_experts.cli.format import call_text, counted, progress_bar
from modular_experts.data import TaskMixture
from modular_experts.injection.attach import describe_router
from modular_experts.routing import Centroid, Router
from modular_experts.training.route import route as route_experts


def route(
    experts: list[str],
    out: str,
    router: Router | None = None,
    fallback: str | None = None,
    data: TaskMixture | None = None,
    rows: int = 256,
    overwrite: bool = False,
) -> None:
    """Put experts behind a router, which chooses by the prompt or the token, and write both as one routed expert.

    A merge keeps part of its experts' skill; a router keeps each whole, and costs the memory of all of them. The
    result is an expert for test, predict, generate, evaluate, show, verify and push. It needs the experts, which lie
    beside it in the library.

    Args:
        experts: Directories of the experts.
        out: Directory of the routed expert, in the library of the experts.
        router: For each prompt, Centroid (the expert whose prompts are most alike), Classifier (trained on whose a
            prompt is) or Oracle (the expert of the row's task); for each token at each layer, Arrow, GenKnowSub and
            Energy (by the deltas alone) or Phatgoose (by gates trained after the experts); for every input the same,
            Constant (a weighted sum, which `merge` takes); or the dotted path of a class of your own. Default:
            Centroid.
        fallback: Directory of an expert, such as a merge, for prompts that are unlike the prompts of all experts.
            Centroid, Classifier and Oracle find such prompts; other routers take no fallback. Default: the base alone.
        data: The experts' tasks, whose rows Centroid, Classifier and Phatgoose learn from; not needed if `statistics`
            took what they need.
        rows: The most rows of one task.
        overwrite: Replace an expert of this name.

    Examples:
        modular-experts route --experts library/a library/b --data.tasks a.jsonl b.jsonl --out library/routed
        modular-experts route --experts library/a library/b --fallback library/ab --out library/routed
        modular-experts evaluate --experts library/routed --tasks a.jsonl b.jsonl --out runs/routed
    """
    chosen = router or Centroid()
    bar = progress_bar(f"taking {chosen.needs}")
    made = route_experts(experts, out, chosen, fallback, data, rows, overwrite, bar)
    count = len(made.record["parents"]) - (fallback is not None)
    settings = {
        name: value for name, value in describe_router(chosen).items() if name not in ("router", "select", "tasks")
    }
    behind = f", and {fallback} for what it rejects" if fallback else ""
    print(f"{call_text(type(chosen).__name__, settings)} chooses among {counted(count, 'expert')}{behind}")
    print(f"{out}: routed, {made.size_on_disk:,} bytes beside its experts")
