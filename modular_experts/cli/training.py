"""Run `fit`, `validate`, `test` and `predict`; `settings/training.py` makes the trainer and what it runs."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.cli.dry_run import print_estimate
from modular_experts.settings import SHORT_NAMES, training


def run(argv: Sequence[str]) -> None:
    """Run the command, or with `--gate-of` the training of gates; a `UsageError` comes before anything is made."""
    verb, *words = argv
    if verb == "fit" and "--gate-of" in [word.partition("=")[0].replace("_", "-") for word in words]:
        from modular_experts.cli.command import run_command
        from modular_experts.cli.search import gates

        run_command(gates, argv, short={"tasks": SHORT_NAMES["tasks"]})
        return
    if found := training.run(argv):
        print_estimate(found)
