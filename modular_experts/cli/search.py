"""`modular-experts search`: how much of each expert a merge takes, found on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import modular_experts.suite  # noqa: F401 - so that a config names its tasks by their class alone
from modular_experts.cli.command import run_tool
from modular_experts.cli.format import call_text, progress_bar, summary
from modular_experts.cli.tuning import search_notes
from modular_experts.data import TaskMixture, TaskSource
from modular_experts.library import check_target, open_experts, write_expert
from modular_experts.merger.merged import Merged, merge
from modular_experts.methods import MergeMethod
from modular_experts.tuning import CoefficientSearch, Combination, Found, objective_on_base
from modular_experts.tuning.objective import mean_loss
from modular_experts.tuning.recipe import (
    as_methods,
    check_files_beside,
    recipe_file,
    trials_file,
    write_recipe,
    write_trials,
)

EXAMPLES = """\
  modular-experts search --experts '[library/a, library/b]' --algorithm LoRAHub --out library/ab \\
      --data.tasks '[{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]'
  modular-experts search --experts '[library/a, library/b]' --merges '[SparseAverage]' \\
      --algorithm ATLAS --out library/ab \\
      --data.tasks '[{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]'
  modular-experts merge --config library/ab.recipe.yaml --out library/again
  modular-experts search --algorithm.help AdaMerging"""


def search(
    experts: list[str],
    algorithm: CoefficientSearch,
    data: TaskMixture,
    out: str,
    rows: int = 64,
    base: str | None = None,
    overwrite: bool = False,
    merges: list[MergeMethod] | None = None,
) -> None:
    """Find how much of each expert a merge takes, on validation rows, and merge.

    The base is loaded once, and the experts are added to it in place; merges are held in memory until they are written.
    Written are the merged expert, and beside it its recipe, which `merge --config` takes, and the trials.

    Args:
        experts: Directories of the experts, written '[library/a, library/b]'.
        algorithm: ATLAS or AdaMerging (by gradients; for each expert and weight), LoRAHub (without; for each expert),
            or the dotted path of a class of your own.
        data: Tasks whose validation rows are measured, and how their rows are read: what you gave to `fit`.
        out: Directory of the merged expert; its last part is the name.
        rows: The most rows of one task, spread evenly over its validation rows.
        base: The base's directory or hub id; as the experts' records say if not given.
        overwrite: Replace an expert, a recipe and trials that are there.
        merges: Methods whose merges of the experts are combined with them, as the first of them, such as '[RegMean,
            SparseAverage]'; each is written as an expert, too, named after `out` and the method.
    """
    algorithm.check(len(merges or []) + len(experts))
    places = _places(out, merges or [], experts)
    for place in [out, *places]:
        check_target(place, overwrite)
    check_files_beside([recipe_file(out), trials_file(out)], overwrite)
    opened = open_experts(experts)
    first = [Merged(opened, method) for method in merges or []]
    objective = objective_on_base(opened, data, rows, base)
    before = mean_loss(objective.losses())
    held = [{name: one[name] for name in progress_bar("merging")(list(one))} for one in first]
    with Combination(objective.model, [*held, *opened], len(held)) as combination:
        found = algorithm.search(combination, objective, progress_bar("searching"))
    for place, deltas, one in zip(places, held, first, strict=True):
        write_expert(place, deltas, one.record(), overwrite)
    experts = [*places, *experts]
    method, per_weight = as_methods(combination.names, found.coefficients)
    settings = {"search": type(algorithm).__name__, **vars(algorithm), "rows": rows}
    notes = search_notes(settings, found.losses)
    merged = merge(experts, method, out, overwrite, progress_bar("merging"), per_weight, notes=notes)
    recipe, trials = write_recipe(out, experts, method, per_weight), write_trials(out, found.trials)
    print(f"searched with {call_text(type(algorithm).__name__, vars(algorithm))}")
    _print_coefficients(experts, found)
    if not found.coefficients.any():
        print(
            "the search ended at the base, where it began, so nothing is moved; take more steps, or a smaller penalty"
        )
    print(f"validation loss {mean_loss(found.losses):.4f}, and {before:.4f} of the base alone")
    print(f"the recipe is {recipe}, the trials are in {trials}")
    print(f"{out}: {summary(merged)}")


def _places(out: str, merges: Sequence[MergeMethod], experts: Sequence[str]) -> list[str]:
    """Return where each merge is written, beside `out`; a second of one class gets a number."""
    names = [type(method).__name__ for method in merges]
    counts = [names[:place].count(name) + 1 for place, name in enumerate(names)]
    numbered = [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]
    places = [Path(out).with_name(f"{Path(out).name}-{name}") for name in numbered]
    inputs = {Path(expert).resolve(): expert for expert in experts}
    if taken := [inputs[place.resolve()] for place in places if place.resolve() in inputs]:
        raise ValueError(
            f"one of the merges would be written to {taken[0]}, which is among the experts; give another out, or leave "
            "that expert out"
        )
    return [str(place) for place in places]


def _print_coefficients(experts: Sequence[str], found: Found) -> None:
    for expert, values in zip(experts, found.coefficients.T, strict=True):
        low, high = values.min().item(), values.max().item()
        spread = f", from {low:.3f} to {high:.3f} by weight" if low < high else ""
        print(f"  {values.mean().item():.3f} of {expert}{spread}")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(search, argv, EXAMPLES, class_bases=[CoefficientSearch, MergeMethod, TaskMixture, TaskSource])
