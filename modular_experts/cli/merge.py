"""`modular-experts merge`: many experts into one."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.cli.progress import progress_bar
from modular_experts.cli.summary import call_text, summary
from modular_experts.cli.tool import run_tool
from modular_experts.merger import describe
from modular_experts.merger import merge as merge_experts
from modular_experts.merging import MergeMethod

EXAMPLES = """\
  modular-experts merge --experts '[library/a, library/b]' --method SparseAverage --out library/ab
  modular-experts merge --experts '[library/a, library/b]' --method TIES --method.keep 0.1 --out library/ab
  modular-experts merge --config merge.yaml
  modular-experts merge --method.help TIES"""


def merge(experts: list[str], method: MergeMethod, out: str, overwrite: bool = False) -> None:
    """Merge experts of one base into a new expert, weight by weight.

    The experts may be of any kinds. The result is an expert like any other: test it with `test --model.applied`,
    make it a checkpoint with `apply`, or merge it again.

    Args:
        experts: Directories of the experts, written '[library/a, library/b]'.
        method: How the deltas of one weight become one: Average, SparseAverage (the paper's), TaskArithmetic, TIES,
            MagMax, Breadcrumbs, ModelStock, or the dotted path of a class of your own, such as my_methods.Median in the
            current directory.
        out: Directory of the merged expert; its last part is the name.
        overwrite: Replace an expert that is there.
    """
    merged = merge_experts(experts, method, out, overwrite, progress_bar("merging"))
    how = call_text(type(method).__name__, describe(method)["init_args"])
    print(f"merged {len(experts)} {'expert' if len(experts) == 1 else 'experts'} with {how}")
    print(f"{out}: {summary(merged)}")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(merge, argv, EXAMPLES, class_bases=[MergeMethod])
