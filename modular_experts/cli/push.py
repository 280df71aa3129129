"""`modular-experts push`: experts to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.cli.command import run_tool
from modular_experts.cli.format import bytes_text, progress_bar
from modular_experts.hub.card import CARD_FILE
from modular_experts.hub.push import Pushed
from modular_experts.hub.push import push as push_experts

EXAMPLES = """\
  modular-experts push --experts '[library/a, library/b]' --repo owner/name --dry_run
  modular-experts push --experts '[library/a, library/b]' --repo owner/name --private true
  modular-experts push --library library --repo owner/name"""


def push(
    repo: str,
    experts: list[str] | None = None,
    library: str | None = None,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    statistics: bool = False,
    dry_run: bool = False,
) -> None:
    """Push experts, and a card about them, into a model repository of the Hugging Face hub, in one commit.

    Every expert is read and checked first. It becomes a folder of the repository, beside those that are there; an
    expert that the repository has already is left alone. Its files go as they are: `expert.json` names the base and
    the tasks as you named them, paths included.

    Args:
        repo: The repository, written 'owner/name'; made if it is not there. Log in with `hf auth login` first.
        experts: Directories of experts, written '[library/a, library/b]'.
        library: Directory of a library whose experts are all meant, instead of `experts`.
        private: Make the repository private; one that is there must be.
        branch: Branch to write to, made if it is not there.
        message: Subject of the commit.
        overwrite: Replace experts of the same name.
        statistics: Push the experts' statistics too.
        dry_run: Print the card and the files, and write nothing.
    """
    if (experts is None) == (library is None):
        raise ValueError("say what to push, and in one way: --experts '[library/a, library/b]' or --library library")
    given = library if library is not None else list(experts or [])
    pushed = push_experts(
        given, repo, private, branch, message, overwrite, statistics, dry_run, progress_bar("checking")
    )
    if dry_run:
        print(pushed.card or f"{CARD_FILE} of {repo} has a text of its own and would stay as it is")
    _tell(pushed, repo, dry_run)


def _tell(pushed: Pushed, repo: str, dry_run: bool) -> None:
    for path, file in pushed.files.items():
        print(f"{path}: {bytes_text(file.stat().st_size)}")
    for path in pushed.removed:
        print(f"{path}: {'would be ' if dry_run else ''}removed, as it belongs to what is replaced")
    for name in pushed.present:
        print(f"{name}: there already with the same content hash and record, left alone")
    if pushed.card is None and not dry_run:
        print(f"{CARD_FILE}: has a text of its own and was left as it is")
    count = len(pushed.experts)
    experts = f"{count} {'expert' if count == 1 else 'experts'}"
    if dry_run:
        print(f"nothing was written; without --dry_run, {experts} would be pushed to {pushed.address}")
    elif pushed.commit is None:
        print(f"nothing to push: {repo} is up to date")
    else:
        print(f"pushed {experts} to {repo}: {pushed.address}")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(push, argv, EXAMPLES)
