"""`modular-experts export`: an expert as an adapter that PEFT loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from modular_experts.cli.command import run_tool
from modular_experts.cli.format import progress_bar, share_text
from modular_experts.interop.peft import WrittenAdapter
from modular_experts.interop.peft import export as export_expert

EXAMPLES = """\
  modular-experts export --expert library/a --form supertuning --out adapter
  modular-experts export --expert library/ab --form lora --rank 16 --out adapter"""


def export(
    expert: str,
    form: Literal["lora", "supertuning", "shira"],
    out: str,
    rank: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
) -> None:
    """Write an expert as a PEFT adapter, which PEFT and what builds on it load without this package.

    A low-rank expert is a LoRA exactly; any other one is approximated at a rank, and what that loses is told. A sparse
    expert is carried exactly as supertuning (PEFT 0.21 or newer) or, where its modules allow it, as shira. The adapter
    is loaded again before it takes its place, by PEFT where it is installed, and its logits are compared with those of
    base plus deltas. What no adapter can carry (biases, norms) `apply` writes as a full checkpoint.

    Args:
        expert: Directory of the expert.
        form: Kind of the adapter.
        out: Directory of the adapter.
        rank: Largest rank of a LoRA; without it only low-rank experts can be one.
        base: The base's directory or hub id; as the expert's record says if not given.
        revision: Branch, tag or commit of a hub id.
        tolerance: Largest accepted difference of a logit between the reloaded adapter and the deltas that it carries.
        overwrite: Replace an adapter of ours that is there.
    """
    written = export_expert(expert, out, form, rank, base, revision, tolerance, overwrite, progress_bar("exporting"))
    for line in _report(written):
        print(line)
    print(f"{out}: a {form} adapter of {expert}, {len(written.weights)} weights")


def _report(written: WrittenAdapter) -> list[str]:
    """Return what a user should know of the adapter; the account of every weight is in its manifest."""
    check, lines = written.check, []
    lossy = {name: weight for name, weight in written.weights.items() if weight.lost}
    for name in sorted(lossy, key=lambda name: -lossy[name].relative_error)[:5]:
        weight = lossy[name]
        error = f"relative error {weight.relative_error:.3g}"
        lines.append(f"  {name}: {share_text(weight.kept_energy)} of its squared norm kept, {error}")
    if lossy:
        lines.insert(0, f"{len(lossy)} of {len(written.weights)} weights are approximated; those that lose most:")
        lines.append(
            f"in all: {share_text(written.kept_energy)} of the squared norm kept, relative error "
            f"{written.relative_error:.3g}; a logit differs from the expert's by up to "
            f"{check.largest_approximation:.3g}, {check.mean_approximation:.3g} on average"
        )
    if written.padding:
        lines.append(f"filled up with {written.padding} zeros, because the format asks for fixed numbers of entries")
    lines.append(
        f"loaded again with {check.loaded_with}: a logit differs by up to {check.largest_difference:.3g}, "
        f"{check.mean_difference:.3g} on average (tolerance {check.tolerance:g})"
    )
    if not check.loaded_with.startswith("peft"):
        lines.append("PEFT was not there to load it; to have it checked by PEFT itself: pip install 'peft>=0.21'")
    return lines


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(export, argv, EXAMPLES)
