"""Run `modular-experts push` and `pull`, which carry experts to and from the Hugging Face hub."""

from pathlib import Path

from modular_experts.cli.format import counted, progress_bar, summary
from modular_experts.hub.card import CARD_FILE
from modular_experts.hub.pull import pull as pull_experts
from modular_experts.hub.push import push as push_experts
from modular_experts.text import bytes_text


def push(
    experts: list[str],
    repo: str,
    private: bool = False,
    overwrite: bool = False,
    statistics: bool = False,
    dry_run: bool = False,
    inputs: bool = False,
) -> None:
    """Push experts, and a card about them, into a model repository of the Hugging Face hub, in one commit.

    Every expert is read and checked first. It becomes a folder of the repository, beside the folders that exist; an
    expert that the repository already has is left alone. Its files are pushed unchanged: `expert.json` names the base
    and the tasks as you named them, paths included.

    Args:
        experts: Directories of experts, such as library/*, which the shell expands.
        repo: The repository, written owner/name; it is created if necessary. Log in with `hf auth login` first.
        private: Make the repository private; an existing one must be private already.
        overwrite: Replace experts of the same name.
        statistics: Push the experts' statistics too.
        dry_run: Print the card and the files, and write nothing.
        inputs: Push the inputs that experts keep too. Everybody who has the base's tokenizer can read them.

    Examples:
        modular-experts push --experts library/a library/b --repo owner/name --dry-run
        modular-experts push --experts library/* --repo owner/name
    """
    bar = progress_bar("checking")
    pushed = push_experts(experts, repo, private, overwrite, statistics, dry_run, inputs, bar)
    if pushed.card is None:
        print(f"{CARD_FILE} of {repo} has a text of its own and stays as it is")
    elif dry_run:
        print(pushed.card)
    for path, file in pushed.files.items():
        print(f"{path}: {bytes_text(file.stat().st_size)}")
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
        print(f"{Path(out, expert.name)}: {summary(expert)}")
    for expert in pulled.present:
        print(f"{Path(out, expert.name)}: there already with the same content hash, left alone")
    count = counted(len(pulled.experts), "expert")
    print(f"pulled {count} of {repo}; the same again: --revision {pulled.commit}")
