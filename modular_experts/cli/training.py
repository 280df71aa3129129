"""Run `fit`, `validate`, `test` and `predict`: their options are arguments of the model, the data and the trainer.

The command line beats the config files, and these beat a checkpoint, whose settings are read first.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from modular_experts.cli.commands import DEVICE, importing
from modular_experts.study.options import SHORT_NAMES, respelt
from modular_experts.text import bytes_text

if TYPE_CHECKING:
    from modular_experts.cli.words import Shape
    from modular_experts.training.estimate import FitEstimate
    from modular_experts.training.fit_into import Settings


def run(argv: Sequence[str]) -> None:
    """Run the command; a `UsageError` comes before anything is made."""
    verb, *words = argv
    with importing():
        from modular_experts.cli.functions import print_class_help, take_common, told_as_typed
        from modular_experts.cli.words import spelt_out
        from modular_experts.study.lightning import (
            GROUPS,
            ExpertCLI,
            checkpoint_file,
            settings_of_checkpoint,
            usual_class,
        )
        from modular_experts.training.fit import TRAINER, Run, end_processes, estimate_run, measure_run, quiet, run_fit
    if {"--help_all", "--help-all"} & {*words}:
        _print_options()
        return
    spelt = spelt_out([*_of_environment(verb), *words], _shapes(), short=SHORT_NAMES)
    print_class_help(spelt, {group: usual_class(group) for group in GROUPS}, SHORT_NAMES)
    take_common(spelt)
    if word := spelt.value("ckpt_path"):
        root = spelt.value("trainer.default_root_dir") or spelt.value("trainer.init_args.default_root_dir")
        checkpoint = checkpoint_file(word, root or TRAINER["default_root_dir"])
        # The settings of a checkpoint lie beneath all others.
        beneath = json.dumps(settings_of_checkpoint(Path(checkpoint)))
        spelt.options = [("config", beneath), *spelt.options, ("ckpt_path", checkpoint)]

    def made(changed: "Settings") -> Run:
        with told_as_typed(spelt, SHORT_NAMES):
            words = spelt.words
            if changed:
                words = [*words, f"--config={json.dumps(changed)}"]
            cli = ExpertCLI(verb, words)
        return cli.make_run()

    with quiet():
        try:
            run = made({})
            if verb != "fit":
                measure_run(verb, run)
            elif spelt.value("dry_run"):
                limit = spelt.value("fit_into")
                _print_estimate(estimate_run(made, limit), limit)
            else:
                run_fit(run)
        finally:
            end_processes()


def _shapes() -> "dict[str, Shape]":
    from modular_experts.cli.words import shapes_of
    from modular_experts.data import TaskMixture
    from modular_experts.training.module import ExpertModule

    groups = shapes_of({"model": ExpertModule, "data": TaskMixture})
    shapes: dict[str, Shape] = {"overwrite": "flag", "dry_run": "flag", "trust": "texts", "trainer.max_steps": "value"}
    for name in ("trainer", "seed_everything", "ckpt_path", "out", "keep_inputs", "fit_into", "device"):
        shapes[name] = "value"
    return groups | shapes


def _of_environment(verb: str) -> list[str]:
    """Return the options in variables such as PL_FIT__TRAINER__MAX_STEPS, as LightningCLI names them."""
    start = f"PL_{verb.upper()}__"
    named = {name.removeprefix(start): value for name, value in os.environ.items() if name.startswith(start)}
    return [f"--{name.lower().replace('__', '.')}={value}" for name, value in named.items()]


def _print_options() -> None:
    from modular_experts.cli.help import class_help
    from modular_experts.study.lightning import GROUPS, usual_class

    texts = "\n\n".join(class_help(group, usual_class(group)) for group in GROUPS)
    print(respelt(texts, {full: name for name, full in SHORT_NAMES.items()}))
    print("\n" + "  ".join(*DEVICE.items()))


def _print_estimate(found: "FitEstimate", limit: str | None) -> None:
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
    for change in found.changes:
        print(f"  {bytes_text(change.peak):>8}  with {change.options}")
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
