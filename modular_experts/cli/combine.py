"""Run `modular-experts combine`, which finds the best way to use many experts within some bytes."""

from rich.console import Console

from modular_experts.cli.format import progress_bar, table_of
from modular_experts.data import TaskMixture
from modular_experts.methods import Distilled
from modular_experts.routing import Router
from modular_experts.text import bytes_of, bytes_text
from modular_experts.training.combine import combine as combine_experts
from modular_experts.training.fit import quiet


def combine(
    experts: list[str],
    out: str,
    data: TaskMixture | None = None,
    budget: str | None = None,
    distilled: Distilled | None = None,
    router: Router | None = None,
    overwrite: bool = False,
) -> None:
    """Make one model of many experts in four ways, measure what each keeps, and name the best.

    The ways are the best merge without data, the merge Distilled, and a router in front of the experts as they are and
    of shrunk experts. The same command goes on where it was interrupted.

    Args:
        experts: Directories of the experts, such as library/*, which the shell expands.
        out: Directory of all that is made.
        data: The experts' tasks: the ways learn from inputs of training rows, and are measured on validation rows;
            tasks with {role: held_out} on test rows. Default: the inputs that the experts keep (`fit --keep_inputs`),
            of which a quarter measures, against the experts' own answers.
        budget: The most bytes beside the base, such as 50MB; a merge takes none.
        distilled: Settings of the merge Distilled, such as --distilled.steps 80.
        router: The router, as for `route`.
        overwrite: Replace what `out` holds of other experts, rows or settings.

    Examples:
        modular-experts combine --experts library/* --out combined
        modular-experts combine --experts library/a library/b --data.tasks a.jsonl b.jsonl --budget 5MB --out combined
    """
    most = bytes_of(budget) if budget else None
    with quiet():
        done = combine_experts(experts, out, data, most, distilled, router, overwrite, progress_bar("  done"))
    held_out = any(way.held_out is not None for way in done.ways)
    heads = ["kept", "loss", *["held out"] * held_out, "bytes", "time", "needs"]
    table = table_of("way", *heads)
    for way in done.ways:
        shown = [f"{way.kept:.1%}", f"{way.loss:.3f}", *[f"{way.held_out or 0:.1%}"] * held_out]
        table.add_row(way.name, *shown, bytes_text(way.bytes), f"{way.time:.2f}", way.needs)
    Console(markup=False, emoji=False).print(table)
    print("kept: exact match, 100 % for each task's own expert; bytes: beside the base; time: of a pass, base 1")
    within = f" within {budget}" if budget else ""
    print(f"best{within}: {done.best.name}, in {done.best.place}")
    merged = done.best.bytes == 0
    command = f"apply {done.best.place} --out checkpoint" if merged else f'generate "..." --experts {done.best.place}'
    print(f"next: modular-experts {command}")
