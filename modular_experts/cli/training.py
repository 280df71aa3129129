"""Run `fit`, `validate`, `test` and `predict`: their options are arguments of the model, the data and the trainer.

The command line beats the config files, and these beat a checkpoint: Lightning alone lets the checkpoint win silently.
So the settings in a checkpoint are read first, as if they were the first config file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modular_experts.cli.commands import importing
from modular_experts.cli.words import Option, read_options, settings_of
from modular_experts.settings import SHORT_NAMES, no_option
from modular_experts.settings.read import arguments_of

GROUPS = ("model", "data", "trainer")
OTHERS = ("seed_everything", "ckpt_path", "trust")
FIT_ALONE = ("out", "overwrite", "dry_run", "gate_of")


def run(argv: Sequence[str]) -> None:
    """Run the command, or with `--gate-of` the training of gates; a `UsageError` comes before anything is made."""
    verb, *words = argv
    known = [*SHORT_NAMES, *GROUPS, *OTHERS, *(FIT_ALONE if verb == "fit" else ())]
    names = [word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--")]
    for name in names:
        # Before torch and Lightning are imported, which takes seconds.
        if name.replace("-", "_").removesuffix("+") not in {*known, "config", "print_config", "help", "help_all"}:
            raise no_option(f"--{name}", [f"--{one}" for one in known])
    if "gate_of" in [name.replace("-", "_") for name in names]:
        from modular_experts.cli.command import run_command
        from modular_experts.cli.search import gates

        run_command(gates, argv, short={"tasks": SHORT_NAMES["tasks"]})
    else:
        _run(verb, words, known)


def _run(verb: str, words: Sequence[str], known: Sequence[str]) -> None:
    with importing():
        from modular_experts.cli import command
        from modular_experts.cli.dry_run import print_estimate
        from modular_experts.cli.help import class_help
        from modular_experts.training.fit import end_processes, estimate_fit, fit, measure
        from modular_experts.training.settings import RunSettings, read_run
    hints = {name: hint for name, hint in arguments_of(RunSettings)[0].items() if name in known}
    hints |= command.TRUST
    options = read_options(words, hints, short=SHORT_NAMES)
    if any(one.name == "help_all" for one in options):
        print("\n\n".join(class_help(f"--{group}.", hints[group].__args__[-1]) for group in GROUPS))
        return
    with command.spelt_as_typed(options, SHORT_NAMES):
        if helped := command.help_asked(options, hints):
            print(helped)
            return
        settings = _settings(options, hints)
        command.trust_named(settings)
        for name in settings:
            if name not in hints:
                raise no_option(f"--{name}", [f"--{one}" for one in known])
        read = read_run(settings)
    if command.asks_for_config(options):
        command.print_config(read.plain)
    arguments = read.make()
    try:
        if verb != "fit":
            measure(verb, **arguments)
        elif settings.get("dry_run"):
            print_estimate(estimate_fit(**arguments))
        else:
            fit(**arguments)
    finally:
        end_processes()


def _settings(options: Sequence[Option], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint, config files and options set."""
    from modular_experts.training.settings import settings_of_checkpoint

    settings = settings_of(options, hints, SHORT_NAMES)
    if settings.get("ckpt_path"):
        beneath = settings_of_checkpoint(Path(settings["ckpt_path"]))
        settings = settings_of(options, hints, SHORT_NAMES, beneath)
    return settings
