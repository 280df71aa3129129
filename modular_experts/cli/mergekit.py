"""`modular-experts mergekit`: a recipe of mergekit into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.cli.format import progress_bar
from modular_experts.interop.mergekit.deviations import Deviation
from modular_experts.interop.mergekit.parse import read_recipe
from modular_experts.interop.mergekit.run import merge_recipe


def mergekit(recipe: str, out: str, seed: int = 0, overwrite: bool = False) -> None:
    """Run a recipe of mergekit, the YAML file that `mergekit-yaml` takes, and write the merged model as a checkpoint.

    mergekit is not needed. The numbers are those that it gives, up to the last digits; where they may not be, that is
    said before the merge begins. A model may be a checkpoint, checkpoint+adapter (PEFT), or an expert of a library
    whose base is the recipe's base_model. What a recipe asks for and is not supported, or has misspelt, is an error.

    Args:
        recipe: The YAML file.
        out: Directory of the checkpoint.
        seed: Of the methods that drop entries at random (dare, della).
        overwrite: Replace a checkpoint of ours that is there.

    Examples:
        modular-experts mergekit recipe.yaml merged-checkpoint
        modular-experts mergekit recipe.yaml merged-checkpoint --seed 1 --overwrite true
    """
    parsed = read_recipe(recipe)
    merge_recipe(parsed, out, seed, overwrite, progress_bar("merging"), _tell)
    print(f"merged {len(parsed.models)} models with {parsed.name}")
    print(f"{out}: a checkpoint of {', '.join(map(str, parsed.models))}")


def _tell(found: Sequence[Deviation]) -> None:
    if found:
        print("where this recipe is not run as mergekit runs it:")
    for deviation in found:
        print(f"  {deviation.what}:")
        print(f"    mergekit  {deviation.mergekit}")
        print(f"    here      {deviation.here}")
