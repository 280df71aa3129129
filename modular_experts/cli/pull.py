"""`modular-experts pull`: experts from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modular_experts.cli.command import run_tool
from modular_experts.cli.format import progress_bar, summary
from modular_experts.hub.pull import pull as pull_experts

EXAMPLES = """\
  modular-experts pull --repo owner/name --out library
  modular-experts pull --repo owner/name --out library --experts '[a, b]'
  modular-experts pull --repo owner/name --out library --revision 0123456789abcdef0123456789abcdef01234567"""


def pull(
    repo: str,
    out: str,
    experts: list[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    statistics: bool = False,
) -> None:
    """Pull experts from a model repository of the Hugging Face hub into a library.

    Every byte is checked against its hash before anything is written. An expert that is there already with the same
    content hash is left alone. The commit is printed, so that the same can be pulled again.

    Args:
        repo: The repository, written 'owner/name'.
        out: Directory of the library; made if it is not there.
        experts: Names of the experts, written '[a, b]'; all if not given.
        revision: Branch, tag or commit.
        overwrite: Replace experts of the same name and other contents.
        statistics: Pull the statistics too, of the experts that are written.
    """
    pulled = pull_experts(repo, out, experts, revision, overwrite, statistics, progress_bar("checking"))
    for expert in pulled.experts:
        print(f"{Path(out, expert.name)}: {summary(expert)}")
    for expert in pulled.present:
        print(f"{Path(out, expert.name)}: there already with the same content hash, left alone")
    count = len(pulled.experts)
    print(
        f"pulled {count} {'expert' if count == 1 else 'experts'} of {repo}; the same again: --revision {pulled.commit}"
    )


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(pull, argv, EXAMPLES)
