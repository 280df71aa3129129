"""`modular-experts remove`: take one expert out of an average or a sum again."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.cli.command import run_tool
from modular_experts.cli.format import progress_bar, summary
from modular_experts.merger.remove import remove as remove_expert

EXAMPLES = """\
  modular-experts remove --merged library/abc --expert library/c --out library/ab"""


def remove(merged: str, expert: str, out: str, overwrite: bool = False) -> None:
    """Take an expert out of a merge by Average or TaskArithmetic, without the other experts at hand.

    The result is what merging the others would give, but for rounding. Other methods are not linear: merge again.

    Args:
        merged: Directory of the merged expert.
        expert: Directory of the expert to take out, one of those that it was made of.
        out: Directory of the result.
        overwrite: Replace an expert that is there.
    """
    left = remove_expert(merged, expert, out, overwrite, progress_bar("removing"))
    print(f"took {expert} out of {merged}; {len(left.record['parents'])} experts are left")
    print(f"{out}: {summary(left)}")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(remove, argv, EXAMPLES)
