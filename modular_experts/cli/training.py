"""Run `fit`, `validate`, `test` and `predict`: their options are arguments of the model, the data and the trainer.

The command line beats the config files, these beat variables of the environment, and all beat a checkpoint's settings.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modular_experts.cli.commands import DEVICE, importing
from modular_experts.study.options import SHORT_NAMES, Config, respelt, value_of


def run(argv: Sequence[str]) -> None:
    """Run the command; a `UsageError` comes before anything is made."""
    verb, *words = argv
    with importing():
        from modular_experts.cli.functions import print_class_help, trust_and_use
        from modular_experts.cli.words import spelt_out
        from modular_experts.study.lightning import ExpertCLI, checkpoint_file, settings_of_checkpoint
        from modular_experts.training.fit import end_processes, estimate_run, measure_run, quiet, run_fit
    hints = option_hints()
    if {"--help_all", "--help-all"} & {*words}:
        _print_options(hints)
        return
    spelt = spelt_out(words, hints, short=SHORT_NAMES)
    print_class_help(spelt, hints, SHORT_NAMES)
    # Variables of the environment lie beneath config files.
    options = [*spelt_out(_of_environment(verb), hints, short=SHORT_NAMES).options, *spelt.options]
    if word := value_of(options, "ckpt_path"):
        checkpoint = checkpoint_file(word, options)
        # The settings of a checkpoint lie beneath all others.
        options = [("config", settings_of_checkpoint(Path(checkpoint))), *options, ("ckpt_path", checkpoint)]

    def parsed(changed: Config) -> ExpertCLI:
        with spelt.told_as_typed(SHORT_NAMES):
            cli = ExpertCLI(verb, [*options, ("config", changed)])
        trust_and_use(cli.trusted, cli.device)
        return cli

    with quiet():
        try:
            cli = parsed({})
            if verb != "fit":
                measure_run(verb, cli.make_run())
            elif cli.config.dry_run:
                from modular_experts.cli.estimate import print_estimate

                limit = cli.config.fit_into
                print_estimate(estimate_run(lambda changed: parsed(changed).make_run(), limit), limit)
            else:
                run_fit(cli.make_run())
        finally:
            end_processes()


def option_hints() -> dict[str, Any]:
    """Return the annotations of the options."""
    from lightning.pytorch import Trainer

    from modular_experts.data import TaskMixture
    from modular_experts.training.module import ExpertModule

    texts = ("ckpt_path", "device", "out", "keep_inputs", "fit_into")
    return {
        **{"model": ExpertModule, "data": TaskMixture, "trainer": Trainer},
        **dict.fromkeys(texts, str),
        **{"seed_everything": int | bool, "overwrite": bool, "dry_run": bool, "trust": list[str]},
    }


def _of_environment(verb: str) -> list[str]:
    """Return the options in variables such as PL_FIT__TRAINER__MAX_STEPS, as LightningCLI names them."""
    start = f"PL_{verb.upper()}__"
    named = {name.removeprefix(start): value for name, value in os.environ.items() if name.startswith(start)}
    return [f"--{name.lower().replace('__', '.')}={value}" for name, value in named.items()]


def _print_options(hints: Mapping[str, Any]) -> None:
    from modular_experts.cli.help import class_help

    texts = "\n\n".join(class_help(group, hints[group]) for group in ("model", "data", "trainer"))
    print(respelt(texts, {full: name for name, full in SHORT_NAMES.items()}))
    print("\n" + "  ".join(*DEVICE.items()))
