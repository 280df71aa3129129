"""`modular-experts search`: how much of each expert a merge takes, found on validation rows."""

from __future__ import annotations

from collections.abc import Sequence

import modular_experts.suite  # noqa: F401 - so that a config names its tasks by their class alone
from modular_experts.cli.command import run_tool
from modular_experts.cli.format import call_text, progress_bar, summary
from modular_experts.data import TaskMixture, TaskSource
from modular_experts.methods import MergeMethod
from modular_experts.tuning import CoefficientSearch
from modular_experts.tuning import search as search_experts
from modular_experts.tuning.objective import mean_loss

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
    done = search_experts(experts, algorithm, data, out, merges or (), rows, base, overwrite, progress_bar("searching"))
    found = done.found
    print(f"searched with {call_text(type(algorithm).__name__, vars(algorithm))}")
    for expert, values in zip(done.experts, found.coefficients.T, strict=True):
        low, high = values.min().item(), values.max().item()
        spread = f", from {low:.3f} to {high:.3f} by weight" if low < high else ""
        print(f"  {values.mean().item():.3f} of {expert}{spread}")
    if not found.coefficients.any():
        print(
            "the search ended at the base, where it began, so the merge moves nothing; take more steps, or a smaller "
            "penalty"
        )
    print(f"validation loss {mean_loss(found.losses):.4f}, and {mean_loss(done.base):.4f} of the base alone")
    print(f"the recipe is {done.recipe}, the trials are in {done.trials}")
    print(f"{out}: {summary(done.expert)}")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(search, argv, EXAMPLES, class_bases=[CoefficientSearch, MergeMethod, TaskMixture, TaskSource])
