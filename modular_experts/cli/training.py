"""Run `fit`, `validate`, `test` and `predict`: their options are arguments of the model, the data and the trainer.

The command line beats the config files, and these beat a checkpoint, whose settings are read first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from modular_experts.cli.command import arguments_given
from modular_experts.cli.commands import DEVICE, importing
from modular_experts.settings import SHORT_NAMES, respelt, unknown
from modular_experts.settings.read import arguments_of
from modular_experts.text import bytes_text

if TYPE_CHECKING:
    from modular_experts.training.estimate import FitEstimate

GROUPS = ("model", "data", "trainer")
OTHERS = ("seed_everything", "ckpt_path", "trust", "device")
FIT_ALONE = ("out", "overwrite", "keep_inputs", "dry_run", "fit_into")


def run(argv: Sequence[str]) -> None:
    """Run the command; a `UsageError` comes before anything is made."""
    verb, *words = argv
    known = [*SHORT_NAMES, *GROUPS, *OTHERS, *(FIT_ALONE if verb == "fit" else ())]
    for name in [word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--")]:
        # Before torch and Lightning are imported, which takes seconds.
        if name.replace("-", "_").removesuffix("+") not in {*known, "config", "print_config", "help", "help_all"}:
            raise unknown("option", f"--{name}", [f"--{one}" for one in known])
    with importing():
        from modular_experts.cli.help import class_help
        from modular_experts.training.fit import end_processes, estimate_fit, fit, measure
        from modular_experts.training.settings import RunSettings, read_run
    hints = {name: hint for name, hint in arguments_of(RunSettings)[0].items() if name in known} | {"device": str}
    if {"--help_all", "--help-all"} & {*words}:
        texts = "\n\n".join(class_help(f"--{group}.", hints[group].__args__[-1]) for group in GROUPS)
        print(respelt(texts, {full: name for name, full in SHORT_NAMES.items()}))
        print("\n" + "  ".join(*DEVICE.items()))
        return
    make = partial(read_run, known=known)
    arguments = arguments_given(words, hints, make, short=SHORT_NAMES, beneath=_settings_of_checkpoint)
    described = arguments["described"]
    try:
        if verb != "fit":
            measure(verb, **arguments)
        elif described["dry_run"]:
            _print_estimate(estimate_fit(**arguments), described["fit_into"])
        else:
            fit(**arguments)
    finally:
        end_processes()


def _settings_of_checkpoint(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    from modular_experts.training.settings import settings_of_checkpoint

    return settings_of_checkpoint(Path(settings["ckpt_path"])) if settings.get("ckpt_path") else {}


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
