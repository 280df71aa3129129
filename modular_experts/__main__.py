"""Run the command `modular-experts`: print help, which imports no torch, or call the function of a command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from modular_experts import __version__
from modular_experts.cli.errors import guarded, unknown_command
from modular_experts.old_names import install_old_names


class Command(NamedTuple):
    """A command: its file in `cli/`, its function (empty if it runs a trainer), and what it does."""

    file: str
    function: str
    summary: str
    # Options that may also be given by position.
    positional: tuple[str, ...] = ()


VERBS = {
    "quickstart": Command("quickstart", "quickstart", "see it all on generated tasks: train, merge, test, report"),
    "fit": Command("training", "", "train experts on task files"),
    "validate": Command("training", "", "measure a model on the validation rows"),
    "test": Command("training", "", "measure a model on the test rows: a table, and results.json"),
    "evaluate": Command("evaluate", "evaluate", "compare a base and experts: a table, results.json, and a page"),
    "predict": Command("training", "", "write a model's answers"),
    "generate": Command("generate", "generate", "answer one prompt, from the command line or a pipe", ("prompt",)),
    "import": Command("import_", "import_", "bring an adapter or a fine-tuned checkpoint into a library", ("source",)),
    "statistics": Command(
        "search", "statistics", "measure what some merge methods need of the experts' data", ("experts",)
    ),
    "methods": Command("methods", "methods", "show the merge methods: formulas, settings, sources", ("name",)),
    "merge": Command("merge", "merge", "merge experts into one expert", ("experts",)),
    "search": Command(
        "search", "search", "find on validation rows how much of each expert to merge, and merge", ("experts",)
    ),
    "mergekit": Command(
        "mergekit", "mergekit", "run a recipe of mergekit: checkpoints into a checkpoint", ("recipe", "out")
    ),
    "remove": Command("merge", "remove", "take one expert out of an average again", ("merged",)),
    "apply": Command("apply", "apply", "add experts to their base: an ordinary checkpoint", ("experts",)),
    "export": Command("apply", "export", "write an expert as an adapter that PEFT loads", ("expert",)),
    "push": Command("hub", "push", "push experts and a card about them to the Hugging Face hub", ("experts",)),
    "pull": Command("hub", "pull", "pull experts from the Hugging Face hub into a library", ("repo",)),
    "list": Command("library", "list_library", "list the experts of a library", ("library",)),
    "show": Command("library", "show", "show everything about one expert", ("expert",)),
    "verify": Command("library", "verify", "check an expert's files and its base", ("expert",)),
}

HELP = """\
usage: modular-experts COMMAND [options]

Train experts for a causal language model, keep them in a library, merge them, and measure the merge.

{verbs}

Each command has --help, --config FILE.yaml and --print_config. A first tour:

  modular-experts fit --base DIR --expert SparseExpert --modules q_proj v_proj \\
      --tasks a.jsonl --out library/a
  modular-experts merge --experts library/a library/b --method SparseAverage --out library/ab
  modular-experts apply --experts library/ab --out merged-checkpoint

options: --help, --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error of the command, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    """Print help, or import and run a command."""
    verb = argv[0] if argv else "help"
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:<12}{command.summary}" for name, command in VERBS.items())))
    elif verb == "--version":
        print(f"modular-experts {__version__}")
    elif verb not in VERBS:
        raise unknown_command(verb, list(VERBS))
    elif {"-h", "--help"} & set(argv) or ({"--help-all", "--help_all"} & set(argv) and VERBS[verb].function):
        from modular_experts.cli.help import command_help, training_help

        file, function, summary, positional = VERBS[verb]
        whole = not {"-h", "--help"} & set(argv)
        print(command_help(verb, file, function, positional, whole) if function else training_help(verb, summary))
    else:
        # A user's class lies beside the config, where a console script does not look.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        install_old_names()
        module = importlib.import_module(f"modular_experts.cli.{VERBS[verb].file}")
        if VERBS[verb].function:
            from modular_experts.cli.command import run_command

            run_command(getattr(module, VERBS[verb].function), argv, VERBS[verb].positional)
        else:
            module.run(argv)


if __name__ == "__main__":
    sys.exit(main())
