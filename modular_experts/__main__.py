"""The command `modular-experts`: hands each verb to its file in `modular_experts.cli`, and is quick about help."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from modular_experts import __version__
from modular_experts.old_names import install_old_names

# Verb -> the file in cli/ whose run(argv) gets the verb and its arguments, and what it does.
VERBS = {
    "quickstart": ("quickstart", "see it all on generated tasks: train, merge, test, report, in minutes"),
    "fit": ("training", "train experts on task files"),
    "validate": ("training", "measure a model on the validation rows"),
    "test": ("training", "measure a model on the test rows: a table, and results.json"),
    "predict": ("training", "write a model's answers"),
    "import": ("import_", "bring an adapter or a fine-tuned checkpoint into a library"),
    "statistics": ("statistics", "take what some merge methods need to know of the experts' data"),
    "methods": ("methods", "show the merge methods: formulas, settings, sources"),
    "merge": ("merge", "merge experts into one expert"),
    "search": ("search", "find on validation rows how much of each expert to merge, and merge"),
    "mergekit": ("mergekit", "run a recipe of mergekit: checkpoints into a checkpoint"),
    "remove": ("remove", "take one expert out of an average again"),
    "apply": ("apply", "add experts to their base: an ordinary checkpoint"),
    "export": ("export", "write an expert as an adapter that PEFT loads"),
    "push": ("push", "push experts and a card about them to the Hugging Face hub"),
    "pull": ("pull", "pull experts from the Hugging Face hub into a library"),
    "list": ("list", "list the experts of a library"),
    "show": ("show", "show everything about one expert"),
    "verify": ("verify", "check an expert's files and its base"),
}

HELP = """\
usage: modular-experts COMMAND [options]

Train experts for a causal language model, keep them in a library, merge them, and measure the merge.

{verbs}

Each command has --help, --config FILE.yaml and --print_config. A first tour:

  modular-experts fit --config configs/fit/sparse.yaml --model.base DIR \\
      --data.tasks '[{{"name": "intents", "path": "intents.jsonl"}}]'
  modular-experts merge --experts '[library/a, library/b]' --method SparseAverage --out library/ab
  modular-experts apply --experts '[library/ab]' --out merged-checkpoint

options: --help, --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error of the command, 2 for a wrong command line."""
    from modular_experts.cli.errors import guarded, near

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {verb:<12}{what}" for verb, (_, what) in VERBS.items())
        return guarded(lambda: print(HELP.format(verbs=verbs)))
    if argv[0] == "--version":
        return guarded(lambda: print(f"modular-experts {__version__}"))
    if argv[0] not in VERBS:
        what = "the command comes first, before" if argv[0].startswith("-") else "there is no command"
        print(f"error: {what} {argv[0]}{near(argv[0], VERBS)}; the commands are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    install_old_names()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's class lies beside the config; a console script does not look there
    return guarded(lambda: importlib.import_module(f"modular_experts.cli.{VERBS[argv[0]][0]}").run(argv))


if __name__ == "__main__":
    sys.exit(main())
