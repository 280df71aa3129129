"""Run `import`, `mergekit`, `apply` and `export`, which read and write the formats of other programs."""

from collections.abc import Iterator

from modular_experts.base import DType
from modular_experts.base.apply import apply as apply_experts
from modular_experts.cli.format import print_check, progress_bar, share_text, summary
from modular_experts.interop.import_expert import import_expert
from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe
from modular_experts.interop.peft import export as export_expert
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


def apply(
    experts: list[str],
    out: str,
    base: str | None = None,
    dtype: DType | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    check: bool = True,
) -> None:
    """Add experts to their base and write a full Hugging Face checkpoint that needs nothing of this package.

    The deltas of several experts are added up; to average them, merge first. Before the checkpoint takes its place,
    plain transformers loads it again, and its logits are compared with the logits of the model in memory. Causal
    language models only.

    Args:
        experts: Directories of the experts.
        out: Directory of the checkpoint.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the checkpoint; the base's by default.
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded one.
        overwrite: Replace a checkpoint of ours.
        check: Load the result again and compare; with --check false, no more than one weight is in memory.

    Examples:
        modular-experts apply --base runs/base --experts library/ab --out merged-checkpoint
    """
    found = apply_experts(experts, out, base, None, dtype, tolerance, overwrite, progress_bar("applying"), check)
    print_check(found)
    print(f"{out}: a checkpoint of the base and {', '.join(experts)}")


def export(
    expert: str,
    out: str,
    form: str = "lora",
    rank: int | None = None,
    base: str | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
) -> None:
    """Write an expert as a PEFT adapter, which PEFT and programs that build on it load without this package.

    A low-rank expert is a LoRA exactly; any other expert is approximated at a rank, and the error is printed. A sparse
    expert is carried exactly by supertuning (PEFT 0.21 or newer) or, if its modules allow it, by shira. Before the
    adapter takes its place, PEFT loads it, and its logits are compared with base plus deltas. Use `apply` for
    weights that adapters cannot carry, such as norms.

    Args:
        expert: Directory of the expert.
        form: Kind of the adapter: lora, supertuning, shira, the form of a related system, or the dotted path of a
            PeftFormat of your own.
        out: Directory of the adapter.
        rank: Largest rank of a LoRA; without it only low-rank experts can be written as one.
        base: The base's directory or hub id; the one in the expert's record by default.
        tolerance: Largest accepted difference of a logit between the reloaded adapter and the deltas that it carries.
        overwrite: Replace an adapter of ours.

    Examples:
        modular-experts export --expert library/a --form supertuning --out adapter
        modular-experts export --expert library/ab --form lora --rank 16 --out adapter
    """
    written = export_expert(expert, out, form, rank, base, tolerance, overwrite, progress_bar("exporting"))
    check = written.check
    lossy = sorted((-weight.relative_error, name) for name, weight in written.weights.items() if weight.lost)
    if lossy:
        print(f"{len(lossy)} of {len(written.weights)} weights are approximated; these lose most:")
        for error, name in lossy[:5]:
            print(f"  {name}: relative error {-error:.3g}")
        print(
            f"in all: relative error {written.relative_error:.3g}; a logit differs from the expert's by up to "
            f"{check.largest_approximation:.3g}, {check.mean_approximation:.3g} on average"
        )
    if written.padding:
        print(f"padded with {written.padding} entries, because the format asks for fixed numbers of them")
    print(
        f"loaded again with {check.loaded_with}: a logit differs by up to {check.largest_difference:.3g}, "
        f"{check.mean_difference:.3g} on average (tolerance {check.tolerance:g})"
    )
    print(f"{out}: a {form} adapter of {expert}, {len(written.weights)} weights")
