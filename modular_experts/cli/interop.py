"""Run `import`, `mergekit`, `apply`, `export`, `push` and `pull`: to and from other programs, and the hub."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from modular_experts.base import DType
from modular_experts.base.apply import apply as apply_experts
from modular_experts.cli.format import counted, expert_line, print_check, share_text
from modular_experts.interop.import_expert import found_sources, import_expert, import_experts
from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe
from modular_experts.interop.peft import export as export_expert
from modular_experts.interop.servers import ServedAdapters, export_for, export_patch
from modular_experts.library import StoredExpert
from modular_experts.library.card import CARD_FILE
from modular_experts.library.kept_inputs import INPUTS_FILE
from modular_experts.library.pull import pull as pull_experts
from modular_experts.library.push import push as push_experts
from modular_experts.library.record import RECORD_FILE
from modular_experts.reports.progress import progress_bar
from modular_experts.study.options import UsageError
from modular_experts.text import bytes_text


def import_(
    source: list[str],
    out: str,
    base: str | None = None,
    revision: str | None = None,
    tasks: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Bring fine-tunings from elsewhere into a library, where they are merged, applied and measured like any expert.

    The format is found from the files: a PEFT adapter (adapter_config.json), or a full checkpoint (config.json and
    safetensors), which is compared with its base weight by weight and stored exactly. A plain LoRA needs nothing else;
    any other type that moves weights needs PEFT, which loads the adapter onto its base. Causal language models only.

    Args:
        source: Directories or hub ids of the fine-tunings, or patterns such as 'peft/*'; one that fails stops no other.
        out: Directory of the one expert, such as library/lora; or, with several sources or a pattern, or where experts
            lie already, of the library, in which each expert gets the name of its source.
        base: Directory or hub id of the model that was fine-tuned; the one that an adapter names by default.
        revision: Branch, tag or commit of the base on the hub.
        tasks: Names of the tasks that the one fine-tuning was trained on; by default the expert's name.

    Examples:
        modular-experts import --source downloads/lora --out library/lora
        modular-experts import --source runs/tuned --base runs/base --out library/tuned
        modular-experts import peft/* --out library
    """
    if len(source) > 1 or found_sources(source) != source or any(Path(out).expanduser().glob(f"[!.]*/{RECORD_FILE}")):
        if tasks:
            raise UsageError("--tasks is for one fine-tuning; several count as trained on tasks of their names")
        return _import_several(source, out, base, revision, overwrite)
    expert = import_expert(source[0], out, base, revision, tasks or (), overwrite, progress_bar("importing"))
    origin = expert.record["source"]
    for line in _report(expert) if "account" in origin else ():
        print(line)
    if "read_with" in origin:
        print(
            f"{origin['read_with']} states {origin['stated_weights']} of the deltas; {origin['measured_weights']} are "
            f"merged weight minus base; logits differ from PEFT's by at most {origin['largest_difference']:.1e}"
        )
    print(f"{out}: {expert_line(expert)}")


def _import_several(sources: list[str], out: str, base: str | None, revision: str | None, overwrite: bool) -> None:
    def told(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for number, (place, name) in enumerate(pairs, 1):
            print(f"importing {place} ({number} of {len(pairs)})", file=sys.stderr, flush=True)
            yield place, name

    done = import_experts(sources, out, base, revision, overwrite, told)
    for expert in done.experts:
        there = "there already, of the same files, left alone" if expert.name in done.present else expert_line(expert)
        print(f"{Path(out, expert.name)}: {there}")
    count = len(done.experts) + len(done.failed)
    if done.failed:
        raise ValueError(f"{len(done.failed)} of {count} sources did not become experts: {', '.join(done.failed)}")
    print(f"imported {counted(count - len(done.present), 'expert')} into {out}")


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
        out: Directory of the checkpoint.
        dtype: Data type of the checkpoint; the base's by default.
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded one.
        overwrite: Replace a checkpoint of ours.
        check: Load the result again and compare; with --check false, no more than one weight is in memory.

    Examples:
        modular-experts apply --base runs/base --experts library/ab --out merged-checkpoint
    """
    reloaded = apply_experts(experts, out, base, None, dtype, tolerance, overwrite, progress_bar("applying"), check)
    print_check(reloaded)
    print(f"{out}: a checkpoint of the base and {', '.join(experts)}")


def export(
    experts: list[str],
    out: str,
    form: str = "lora",
    rank: int | None = None,
    for_: Literal["vllm", "sglang", "llama.cpp"] | None = None,
    keep: float = 0.7,
    base: str | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    wrapper: bool = False,
) -> None:
    """Write an expert as a PEFT adapter, which PEFT and programs that build on it load without this package.

    A low-rank expert is a LoRA exactly; any other expert is approximated at a rank, and the error is printed. A sparse
    expert is carried exactly by supertuning (PEFT 0.21 or newer) or, if its modules allow it, by shira. Before the
    adapter takes its place, PEFT loads it, and its logits are compared with base plus deltas. Use `apply` for
    weights that adapters cannot carry, such as norms.

    With --for, each expert becomes a LoRA by the rules of a server, in a folder of its name in --out, and the command
    that starts the server with all of them is printed.

    Args:
        experts: Directories of the experts; several with --for alone.
        form: Kind of the adapter: lora, supertuning, shira, vllm-patch (new values for a base that vLLM runs),
            the form of a related system, or the dotted path of a PeftFormat of your own.
        out: Directory of the adapter.
        rank: Largest rank of a LoRA; without it only low-rank experts can be written as one.
        for_: Server whose rules the LoRAs follow; it fixes their ranks.
        keep: With --for, the least share of an expert's squared norm that its LoRA keeps, from 0 to 1.
        base: The base's directory or hub id; the one in the expert's record by default.
        tolerance: Largest accepted difference of a logit between the reloaded adapter and the deltas that it carries.
        overwrite: Replace an adapter of ours.
        wrapper: Name layers as the base's whole model does, with its vision tower, not as its language model alone;
            --for vllm and --for sglang do so by themselves.

    Examples:
        modular-experts export --experts library/a --form supertuning --out adapter
        modular-experts export --experts library/a library/b --for vllm --out adapters
        modular-experts export --experts library/ab --form lora --rank 16 --out adapter
    """
    bar = progress_bar("exporting")
    if for_ is not None:
        if form != "lora" or rank is not None or wrapper:
            raise UsageError("--for chooses form, rank and names; leave out --form, --rank and --wrapper")
        return _print_served(export_for(experts, out, for_, keep, base, tolerance, overwrite, bar))
    if len(experts) > 1:
        raise UsageError(f"--form {form} takes one expert, and {len(experts)} are named; several are for --for SERVER")
    if keep != 0.7 or (form == "vllm-patch" and (rank is not None or wrapper)):
        raise UsageError("--keep belongs to --for SERVER, --rank to --form lora, and --wrapper to PEFT's forms")
    if form == "vllm-patch":
        patch = export_patch(experts[0], out, base, overwrite, bar)
        return print(f"{out}: a patch of {patch.tensors} tensors, which replaces {patch.changed:,} values")
    written = export_expert(experts[0], out, form, rank, base, tolerance, overwrite, bar, wrapper=wrapper)
    _print_loss(written)
    if written.padding:
        print(f"padded with {written.padding} entries, because the format asks for fixed numbers of them")
    check: Any = written.check
    print(
        f"loaded again with {check.loaded_with}: a logit differs by up to {check.largest_difference:.3g}, "
        f"{check.mean_difference:.3g} on average (tolerance {check.tolerance:g})"
    )
    print(f"{out}: a {form} adapter of {experts[0]}, {len(written.weights)} weights")


def _print_loss(written: Any) -> None:
    lossy = sorted((-weight.relative_error, name) for name, weight in written.weights.items() if weight.lost)
    if lossy:
        print(f"{len(lossy)} of {len(written.weights)} weights are approximated; these lose most:")
        for error, name in lossy[:5]:
            print(f"  {name}: relative error {-error:.3g}")
        print(
            f"in all: relative error {written.relative_error:.3g}; a logit differs from the expert's by up to "
            f"{written.check.largest_approximation:.3g}, {written.check.mean_approximation:.3g} on average"
        )


def _print_served(served: ServedAdapters) -> None:
    for name, written in served.adapters.items():
        least = 1 - max(weight.relative_error for weight in written.weights.values()) ** 2
        kept = f"{1 - written.relative_error**2:.1%} of the expert's squared norm, at least {least:.1%} of a weight's"
        print(f"{name}: rank {written.rank}, {kept if written.relative_error else 'exactly the expert'}")
    print(f"start the server:\n{served.start}")


def push(
    experts: list[str],
    repo: str,
    private: bool = False,
    overwrite: bool = False,
    statistics: bool = False,
    dry_run: bool = False,
    inputs: bool = False,
    license: str | None = None,
    sign: str | None = None,
) -> None:
    """Push experts, and a card about them, into a model repository of the Hugging Face hub, in one commit.

    Every expert is read and checked first. It becomes a folder of the repository, beside the folders that exist; an
    expert that the repository already has is left alone. `expert.json` names the tasks as you named them, and so base
    and source, but for an absolute path, of which the last part is published.

    Args:
        experts: Directories of experts, such as library/*, which the shell expands.
        repo: The repository, written owner/name; it is created if necessary. Log in with `hf auth login` first.
        private: Make the repository private; an existing one must be private already.
        overwrite: Replace experts of the same name.
        statistics: Push the experts' statistics too.
        dry_run: Print the card and the files, and write nothing; this needs no network.
        inputs: Push the inputs that experts keep too. Everybody who has the base's tokenizer can read them.
        license: Licence of the experts, as the hub names it: apache-2.0, mit, other. By default the one in their
            records, or the one that all their parents have.
        sign: File of a private key, with which each expert is signed for `verify --key`.

    Examples:
        modular-experts push --experts library/a library/b --repo owner/name --license apache-2.0 --dry-run
        modular-experts push --experts library/* --repo owner/name --license mit
    """
    bar = progress_bar("checking")
    pushed = push_experts(experts, repo, private, overwrite, statistics, dry_run, inputs, license, sign, bar)
    if pushed.card is None:
        print(f"{CARD_FILE} of {repo} has a text of its own and stays as it is")
    elif dry_run:
        print(pushed.card)
    for path, size in pushed.sizes.items():
        print(f"{path}: {bytes_text(size)}")
    kept = [name for name in experts if not inputs and (Path(name) / INPUTS_FILE).exists()]
    if kept:
        print(f"the inputs that {', '.join(kept)} keep stay here; --inputs pushes them")
    for path in pushed.removed:
        print(f"{path}: {'would be ' if dry_run else ''}removed, because it belongs to a replaced expert")
    for name in pushed.present:
        print(f"{name}: there already with the same content hash and record, left alone")
    count = counted(len(pushed.experts), "expert")
    if dry_run:
        print(f"nothing was written; without --dry-run, {count} would be pushed to {pushed.address}")
    elif pushed.commit is None:
        print(f"nothing to push: {repo} is up to date")
    else:
        print(f"pushed {count} to {repo}: {pushed.address}")


def pull(
    repo: str,
    out: str,
    experts: list[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    statistics: bool = False,
) -> None:
    """Pull experts from a model repository of the Hugging Face hub into a library.

    Every byte is checked against its hash before anything is written. Inputs that experts keep come with them. An
    expert that the library already has with the same content hash is left alone. The commit is printed, so that the
    same experts can be pulled again.

    Args:
        repo: The repository, written owner/name.
        out: Directory of the library, created if necessary.
        experts: Names of the experts; all by default.
        revision: Branch, tag or commit.
        overwrite: Replace experts of the same name and other contents.
        statistics: Pull the statistics of the pulled experts too.

    Examples:
        modular-experts pull --repo owner/name --out library
        modular-experts pull --repo owner/name --out library --revision 0123456789abcdef0123456789abcdef01234567
    """
    pulled = pull_experts(repo, out, experts, revision, overwrite, statistics, progress_bar("checking"))
    for expert in pulled.experts:
        print(f"{Path(out, expert.name)}: {expert_line(expert)}")
    for expert in pulled.present:
        print(f"{Path(out, expert.name)}: there already with the same content hash, left alone")
    count = counted(len(pulled.experts), "expert")
    print(f"pulled {count} of {repo}; the same again: --revision {pulled.commit}")
