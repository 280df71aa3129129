"""Run `modular-experts import` and `mergekit`, which take the fine-tunings and the recipes of other programs."""

from collections.abc import Iterator

from modular_experts.cli.format import progress_bar, share_text, summary
from modular_experts.interop.import_expert import import_expert
from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe
from modular_experts.library import StoredExpert


def import_(
    source: str,
    out: str,
    base: str | None = None,
    revision: str | None = None,
    tasks: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Bring a fine-tuning from elsewhere into a library, where it can be merged, applied and measured like any expert.

    The format is found from the files: a PEFT adapter (adapter_config.json), or a full checkpoint (config.json and
    safetensors), which is compared with its base weight by weight and stored exactly. A plain LoRA needs nothing else;
    any other type that moves weights needs PEFT, which loads the adapter onto its base. Causal language models only.

    Args:
        source: Directory or hub id of the fine-tuning.
        out: Directory of the expert; its last part is the name.
        base: Directory or hub id of the model that was fine-tuned; the one that an adapter names by default.
        revision: Branch, tag or commit of the base on the hub.
        tasks: Names of the tasks that the fine-tuning was trained on.
        overwrite: Replace an expert.

    Examples:
        modular-experts import --source downloads/lora --out library/lora
        modular-experts import --source runs/tuned --base runs/base --out library/tuned
    """
    bar = progress_bar("importing")
    expert = import_expert(source, out, base, revision, tasks or (), overwrite, bar)
    origin = expert.record["source"]
    for line in _report(expert) if "account" in origin else ():
        print(line)
    if "read_with" in origin:
        print(
            f"{origin['read_with']} states {origin['stated_weights']} of the deltas; {origin['measured_weights']} are "
            f"merged weight minus base; logits differ from PEFT's by at most {origin['largest_difference']:.1e}"
        )
    print(f"{out}: {summary(expert)}")


def _report(expert: StoredExpert) -> Iterator[str]:
    origin = expert.record["source"]
    account = origin["account"]
    yield (
        f"{len(expert)} weights moved, in {account['moved']:,} of their {account['entries']:,} entries; "
        f"{account['same_weights']} are the base's"
    )
    if account["missed"]:
        share = share_text(account["missed"] / account["entries"])
        yield (
            f"base plus delta misses {account['missed']:,} entries of the checkpoint ({share}) by rounding, "
            f"by at most {account['farthest']:.3g}"
        )
    else:
        yield "exact: base plus delta is the checkpoint in every entry"
    for name, twins in origin["tied"].items():
        yield f"{name}: one tensor with {' and '.join(twin for twin in twins if twin != name)} (tied); both move"


def mergekit(recipe: str, out: str, seed: int = 0, overwrite: bool = False) -> None:
    """Run a recipe of mergekit, the YAML file that `mergekit-yaml` takes, and write the merged model as a checkpoint.

    The numbers are mergekit's, up to the last digits, but for random draws and for entries of equal magnitude; mergekit
    itself is not needed. Recipes merge whole checkpoints; a key that is not supported, or misspelt, is an error.

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
    merge_recipe(parsed, out, seed, overwrite, progress_bar("merging"))
    print(f"{out}: a checkpoint of {', '.join(parsed.models)}, merged with {parsed.name}")
