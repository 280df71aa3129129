"""Run `modular-experts mergekit`, which makes a checkpoint by a recipe of mergekit."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.cli.format import progress_bar
from modular_experts.interop.mergekit.deviations import Deviation
from modular_experts.interop.mergekit.parse import read_recipe
from modular_experts.interop.mergekit.run import merge_recipe


def mergekit(recipe: str, out: str, seed: int = 0, overwrite: bool = False) -> None:
    """Run a recipe of mergekit, the YAML file that `mergekit-yaml` takes, and write the merged model as a checkpoint.

    The numbers are mergekit's, up to the last digits; known exceptions are printed before the merge begins. mergekit
    itself is not needed. A model may be a checkpoint, checkpoint+adapter (PEFT), or an expert of a library
    whose base is the recipe's base_model. An unsupported or misspelt key of a recipe is an error.

    Args:
        recipe: The YAML file.
        out: Directory of the checkpoint.
        seed: Seed of the methods that drop entries at random (dare, della).
        overwrite: Replace a checkpoint of ours.

    Examples:
        modular-experts mergekit recipe.yaml merged-checkpoint
        modular-experts mergekit recipe.yaml merged-checkpoint --seed 1 --overwrite
    """
    parsed = read_recipe(recipe)
    merge_recipe(parsed, out, seed, overwrite, progress_bar("merging"), _print_deviations)
    print(f"merged {len(parsed.models)} models with {parsed.name}")
    print(f"{out}: a checkpoint of {', '.join(map(str, parsed.models))}")


def _print_deviations(found: Sequence[Deviation]) -> None:
    if found:
        print("where this recipe is not run as mergekit runs it:")
    for deviation in found:
        print(f"  {deviation.what}:")
        print(f"    mergekit  {deviation.mergekit}")
        print(f"    here      {deviation.here}")
