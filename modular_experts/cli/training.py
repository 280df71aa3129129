"""Run `fit`, `validate`, `test` and `predict`: their options are arguments of the model, the data and the trainer.

The command line beats the config files, and these beat a checkpoint, whose settings are read first.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from modular_experts.cli.commands import DEVICE, importing
from modular_experts.study.options import SHORT_NAMES, Config, respelt, value_of
from modular_experts.text import bytes_text

if TYPE_CHECKING:
    from modular_experts.training.estimate import FitEstimate


def run(argv: Sequence[str]) -> None:
    """Run the command; a `UsageError` comes before anything is made."""
    verb, *words = argv
    with importing():
        from modular_experts.cli.functions import print_class_help, trust_and_use
        from modular_experts.cli.words import spelt_out
        from modular_experts.study.lightning import ExpertCLI, checkpoint_file, settings_of_checkpoint
        from modular_experts.training.fit import end_processes, estimate_run, measure_run, quiet, run_fit
    hints = _hints()
    if {"--help_all", "--help-all"} & {*words}:
        _print_options(hints)
        return
    spelt = spelt_out([*_of_environment(verb), *words], hints, short=SHORT_NAMES)
    print_class_help(spelt, hints, SHORT_NAMES)
    options = spelt.options
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
                limit = cli.config.fit_into
                print_estimate(estimate_run(lambda changed: parsed(changed).make_run(), limit), limit)
            else:
                run_fit(cli.make_run())
        finally:
            end_processes()


def _hints() -> dict[str, Any]:
    """Return the annotations of the options."""
    from lightning.pytorch import Trainer

    from modular_experts.data import TaskMixture
    from modular_experts.training.module import ExpertModule

    texts = ("seed_everything", "ckpt_path", "device", "out", "keep_inputs", "fit_into")
    return {
        **{"model": ExpertModule, "data": TaskMixture, "trainer": Trainer},
        **dict.fromkeys(texts, str),
        **{"overwrite": bool, "dry_run": bool, "trust": list[str]},
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


def print_estimate(found: "FitEstimate", limit: str | None) -> None:
    """Print rows, trained numbers, time and memory, and the files to be written, in at most 80 columns."""
    from modular_experts.cli.format import share_text, table_of

    console = Console(markup=False, emoji=False, width=80)
    rows = table_of("task", "split", "rows", "tokens", "truncated", left=2)
    for one in found.splits:
        held_out = " (held out)" if one.role == "held_out" else ""
        rows.add_row(one.task + held_out, one.split, f"{one.rows:,}", f"{one.tokens:,}", f"{one.truncated:,}")
    console.print(rows)
    weights = table_of("weight", "weights", "entries", "trained", "share", left=1)
    for group in found.weights:
        share = share_text(group.trained / group.entries) if group.entries else ""
        weights.add_row(
            group.name.removesuffix(".weight"), str(group.weights), f"{group.entries:,}", f"{group.trained:,}", share
        )
    console.print(weights)
    length = found.length
    trained, entries = (sum(getattr(one, name) for one in found.weights) for name in ("trained", "entries"))
    share = f", {share_text(trained / entries)} of these weights" if entries else ""
    print(f"{trained:,} trained parameters{share}")
    epochs = f"{length.total_steps / length.steps_per_epoch:.3g}"
    passes = f"{length.total_steps:,} steps ({epochs} epoch{'s' * (epochs != '1')})"
    rates = " and ".join(f"{rate:g}" for rate in found.rates)
    print(f"{passes} at learning rate {rates}; padding: {share_text(found.padding)} of the tokens")
    print("memory: about " + bytes_text(found.peak))
    for name, size in found.bytes.items():
        print(f"  {bytes_text(size):>8}  {name}")
    _print_times(found)
    print("a fit would write:")
    for content, place in found.places:
        told = content == "the expert" and not found.predicted
        print(f"  {place}: {content}" + f", {bytes_text(found.on_disk)}" * told)
    if not any(content == "the expert" for content, _ in found.places):
        print("  no expert; --out library/NAME keeps one")
    if limit:
        print(f"to fit into {limit}, add these options:" if found.changes else f"it fits into {limit} as it is")
    short = {full: name for name, full in SHORT_NAMES.items()}
    for change in found.changes:
        options = [f"--{short.get(name, name)} {str(value).lower()}" for name, value in change.settings.items()]
        print(f"  {bytes_text(change.peak):>8}  with {' '.join(options)}")
    ways = ["estimated from a few steps at a learning rate of 0", "predicted from shapes alone, without times"]
    print(f"{ways[found.predicted]}; nothing was written")


def _print_times(found: "FitEstimate") -> None:
    from modular_experts.cli.format import counted, duration_text

    if not found.seconds:
        return
    print("time: about " + duration_text(sum(found.seconds.values())))
    counts = {
        "router": "the router's tasks",
        "steps": f"{found.length.total_steps:,} steps",
        "choices": f"{counted(found.choices, 'choice')} of supports",
        "validations": counted(found.validations, "validation"),
    }
    for name, taken in found.seconds.items():
        if taken:
            print(f"  {duration_text(taken):>8}  {counts[name]}")
