"""Run `modular-experts import` and `mergekit`, which take the fine-tunings and the recipes of other programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from modular_experts.cli.format import progress_bar, share_text, summary
from modular_experts.interop.adapter import Compression, KeepLargest, Truncated
from modular_experts.interop.import_expert import import_expert
from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe
from modular_experts.library import StoredExpert


def import_(
    source: str,
    out: str,
    base: str | None = None,
    revision: str | None = None,
    keep_ratio: float | None = None,
    rank: int | None = None,
    vocab: Literal["error", "intersect"] = "error",
    tasks: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Bring a fine-tuning from elsewhere into a library, where it can be merged, applied and measured like any expert.

    The format is found from the files: a PEFT adapter (adapter_config.json), or a full checkpoint (config.json and
    safetensors), which is compared with its base weight by weight. A plain LoRA needs nothing else; any other type
    that moves weights needs PEFT, which loads the adapter onto its base. A full checkpoint is stored exactly unless
    keep_ratio or rank is given. Causal language models only; no code from a file is run.

    Args:
        source: Directory or hub id of the fine-tuning.
        out: Directory of the expert; its last part is the name.
        base: Directory or hub id of the model that was fine-tuned; the one that an adapter names by default.
        revision: Branch, tag or commit of the base on the hub.
        keep_ratio: For a full checkpoint: keep only this share of each weight's entries: those that moved farthest.
        rank: For a full checkpoint: keep only the best approximation of this rank of each matrix.
        vocab: With intersect, a full checkpoint may have a resized vocabulary; the rows in common are compared.
        tasks: Names of the tasks that the fine-tuning was trained on.
        overwrite: Replace an expert.

    Examples:
        modular-experts import --source downloads/lora --out library/lora
        modular-experts import --source runs/tuned --base runs/base --out library/tuned
        modular-experts import --source runs/tuned --base runs/base --out library/short --keep_ratio 0.05
    """
    if keep_ratio is not None and rank is not None:
        raise ValueError(f"keep_ratio={keep_ratio} and rank={rank} are two ways to shorten a checkpoint; give one")
    compression: Compression | None = None if keep_ratio is None else KeepLargest(keep_ratio)
    compression = compression if rank is None else Truncated(rank)
    bar = progress_bar("importing")
    expert = import_expert(source, out, base, revision, compression, vocab, tasks or (), overwrite, bar)
    origin = expert.record["source"]
    for line in _report(expert, compression) if "account" in origin else ():
        print(line)
    if "read_with" in origin:
        print(
            f"{origin['read_with']} states {origin['stated_weights']} of the deltas; {origin['measured_weights']} are "
            f"merged weight minus base; logits differ from PEFT's by at most {origin['largest_difference']:.1e}"
        )
    print(f"{out}: {summary(expert)}")


def _report(expert: StoredExpert, compression: Compression | None) -> Iterator[str]:
    origin = expert.record["source"]
    account = origin["account"]
    yield (
        f"{len(expert)} weights moved, in {account['moved']:,} of their {account['entries']:,} entries; "
        f"{account['same_weights']} are the base's"
    )
    if account["rounded"]:
        yield f"{account['rounded']:,} entries are the base's but for rounding to a narrower dtype: not moved"
    sparse = Counter(expert.forms().values())["Sparse"]
    if compression is None and sparse:
        yield f"{sparse} of them are stored as the entries that moved, which is smaller and loses nothing"
    if compression is not None:
        errors = sorted(account["relative_errors"].items(), key=lambda item: -item[1])
        kept = share_text(account["energy_kept"])
        yield f"relative error {account['relative_error']:.3g}, {kept} of the energy kept; the largest errors:"
        yield from (f"  {name}: {error:.3g}" for name, error in errors[:3])
    elif account["missed"]:
        share = share_text(account["missed"] / account["entries"])
        yield (
            f"base plus delta misses {account['missed']:,} entries of the checkpoint ({share}) by rounding, "
            f"by at most {account['farthest']:.3g}"
        )
    else:
        yield "exact: base plus delta is the checkpoint in every entry"
    for name, (theirs, ours) in origin["vocabularies"].items():
        yield f"{name}: {min(theirs, ours)} rows compared; the checkpoint has {theirs} and the base {ours}"
    for name, twins in origin["tied"].items():
        yield f"{name}: one tensor with {' and '.join(twin for twin in twins if twin != name)} (tied); both move"
    if origin["wider_dtypes"]:
        wider = " and ".join(origin["wider_dtypes"])
        yield f"the checkpoint is in {wider}, wider than its base: apply it with --dtype to keep that"


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
