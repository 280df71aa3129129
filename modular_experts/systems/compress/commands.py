"""The command `modular-experts compress`, which makes a smaller base without training."""

from modular_experts.cli.format import share_text
from modular_experts.data.tasks import Tasks
from modular_experts.reports.progress import progress_by_tenths
from modular_experts.systems.compress.compress import Reduction
from modular_experts.systems.compress.compress import compress as make_smaller


def compress(
    base: str, tasks: Tasks, reduction: Reduction, out: str, revision: str | None = None, overwrite: bool = False
) -> None:
    """Make a smaller base without training: search what can go, correct what reads it, write a checkpoint.

    Whole transformer blocks, groups of attention heads and MLP channels go. Plain transformers loads the result, and
    experts train on it as on any base; experts of the large base do not fit it. The text comes from the tasks' rows:
    training rows rank and correct, validation rows measure candidates, test rows measure the end. The same command goes
    on with an interrupted search.

    Args:
        base: Directory or hub id of the base.
        tasks: Task files, or tasks with settings, as for `fit`.
        reduction: How much goes, and how that is searched.
        out: Directory of the smaller base.
        revision: Branch, tag or commit of a hub id.
        overwrite: Replace a checkpoint of ours.

    Examples:
        modular-experts compress --base DIR --keep 0.8 --tasks a.jsonl b.jsonl --out smaller
        modular-experts fit --base smaller --expert SparseExpert --modules q_proj v_proj \\
            --tasks a.jsonl --out library/a
    """
    with progress_by_tenths(
        line=lambda what, done, total, left: f"{what}: {done / total:.0%} of the work done{left}"
    ) as bar:
        smaller = make_smaller(base, tasks, out, reduction, revision, overwrite=overwrite, progress=bar)
    parts = [f"{len(smaller.blocks)} of {smaller.all_blocks} blocks"]
    parts += [f"{kept:,} of {whole:,} {name}" for name, (kept, whole) in smaller.sizes.items() if whole > 1]
    share = share_text(smaller.parameters / smaller.base)
    print(f"{', '.join(parts)}: {smaller.parameters:,} of {smaller.base:,} parameters ({share})")
    print(f"perplexity on {smaller.tokens:,} tokens of the test rows:")
    names = {"base": "the base", "cut": "the best candidate, as it was cut", "reformed": "the same, corrected"}
    for name, value in smaller.perplexity.items():
        print(f"  {value:>10.4g}  {names[name]}{', which was written' if name == smaller.written else ''}")
    if smaller.written == "cut" and "reformed" in smaller.perplexity:
        print("on the validation rows the corrected one is the worse; more --tokens of training rows may help")
    print(
        f"loaded again with transformers: the largest difference of a logit is {smaller.check.largest_difference:.3g}"
    )
    print(f"{out}: a base of {smaller.parameters:,} parameters; fit --base {out} trains experts on it")
