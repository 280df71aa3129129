"""Run the command `modular-experts`: print help, which imports no torch, or call the function of a command."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from modular_experts import __version__
from modular_experts.cli.command import check_experts, check_options, guarded, unknown_command
from modular_experts.cli.commands import VERBS, importing, options_of_run
from modular_experts.cli.option_names import OptionRecord

HELP = """\
usage: modular-experts COMMAND [options]

Train experts for a causal language model, keep them in a library, merge them,
and measure the merge.

{verbs}

Each command has --help, --config FILE.yaml and --print_config. A first tour:

  modular-experts fit --base DIR --expert SparseExpert --modules q_proj v_proj \\
      --tasks a.jsonl --out library/a
  modular-experts merge --experts library/a library/b --method SparseAverage \\
      --out library/ab
  modular-experts apply --experts library/ab --out merged-checkpoint

options: --help, --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error of the command, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    factory = logging.getLogRecordFactory()
    try:
        return guarded(lambda: _run(argv))
    finally:
        logging.setLogRecordFactory(factory)


def _run(argv: Sequence[str]) -> None:
    verb, asked = argv[0] if argv else "help", {*argv}
    if verb in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(HELP.format(verbs="\n".join(f"  {name:<{width}}  {command.summary}" for name, command in VERBS.items())))
        return
    if verb == "--version":
        print(f"modular-experts {__version__}")
        return
    if verb not in VERBS:
        raise unknown_command(verb)
    command = VERBS[verb]
    if {"-h", "--help"} & asked or ({"--help-all", "--help_all"} & asked and command.function):
        from modular_experts.cli.help import command_help

        print(command_help(verb, command, whole=not {"-h", "--help"} & asked))
        return
    if command.function:
        from modular_experts.cli.help import options_in_source

        check_options(argv[1:], options_in_source(verb, command))
    else:
        check_options(argv[1:], options_of_run(verb))
    check_experts(argv, command.positional)
    logging.setLogRecordFactory(OptionRecord)
    # A user's class lies beside the config, where a console script does not look; a file there hides no other module.
    sys.path += {os.getcwd()} - {*sys.path}
    with importing():
        module = importlib.import_module(f"modular_experts.{command.path.replace('/', '.')}")
    if command.function:
        from modular_experts.cli.functions import run_command

        run_command(getattr(module, command.function), argv, command.positional)
    else:
        module.run(argv)


if __name__ == "__main__":
    sys.exit(main())
