"""`modular-experts apply`: experts and their base into an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from modular_experts.base.apply import apply as apply_experts
from modular_experts.base.verify import Check
from modular_experts.cli.command import run_tool
from modular_experts.cli.format import progress_bar, share_text

EXAMPLES = """\
  modular-experts apply --base runs/base --experts '[library/ab]' --out merged-checkpoint
  modular-experts apply --experts '[library/ab]' --out merged-checkpoint --dtype bfloat16"""


def apply(
    experts: list[str],
    out: str,
    base: str | None = None,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    check: bool = True,
) -> None:
    """Add experts to their base and write a full Hugging Face checkpoint that needs nothing of this package.

    The deltas of several experts are added up; to average them, merge first. The checkpoint is loaded again with plain
    transformers before it takes its place, and its logits are compared with those of the model in memory. Causal
    language models only.

    Args:
        experts: Directories of the experts, written '[library/ab]'.
        out: Directory of the checkpoint.
        base: The base's directory or hub id; as the experts' records say if not given.
        revision: Branch, tag or commit of a hub id.
        dtype: Data type of the checkpoint; that of the base if not given.
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded one.
        overwrite: Replace a checkpoint of ours that is there.
        check: Load the result again and compare; without it, no more than one weight is in memory.
    """
    found = apply_experts(experts, out, base, revision, dtype, tolerance, overwrite, progress_bar("applying"), check)
    tell_check(found)
    print(f"{out}: a checkpoint of the base and {', '.join(experts)}")


def tell_check(found: Check | None) -> None:
    """Say how a checkpoint proved itself, and what its dtype could not hold."""
    if found is None:
        print("not loaded again, because check is false")
        return
    print(
        f"loaded again with transformers: the largest difference of a logit is {found.largest_difference:.3g} "
        f"(tolerance {found.tolerance:g})"
    )
    lost = found.rounding
    if lost.lost > 0:
        unchanged = share_text(lost.unchanged / lost.moved)
        print(f"rounding took {share_text(lost.lost)} of the deltas' length and left {unchanged} of them at the base")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(apply, argv, EXAMPLES)
