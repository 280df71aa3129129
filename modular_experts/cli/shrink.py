"""Run `modular-experts shrink`, which stores experts in few bits."""

from typing import Literal

from rich.console import Console

from modular_experts.cli.format import counted, progress_bar, table_of
from modular_experts.text import bytes_text
from modular_experts.tuning.objective import ValidationRows
from modular_experts.tuning.shrink import Form, Shrunk
from modular_experts.tuning.shrink import shrink as shrink_experts


def shrink(
    experts: list[str],
    measured: ValidationRows,
    out: str,
    to: Literal["bfloat16", "int8", "int4", "magnitudes4", "magnitudes2", "sign"] | None = None,
    keep: float = 1.0,
    rank: int | None = None,
    bound: float = 0.01,
    overwrite: bool = False,
) -> None:
    """Store each expert in the fewest bytes that keep its loss, in another library.

    The command measures forms from the smallest upwards: values in few bits, for a low-rank or a full expert after a
    cut to fewer directions, for a sparse one perhaps without its smaller entries. It writes the first whose loss on the
    expert's tasks rises by at most the bound, and no expert if all forms lose more. It first fits the scales of values
    in one or two bits to the layers' outputs on these rows.

    Args:
        experts: Directories of the experts.
        measured: The rows on which the loss is measured.
        out: The library of the shrunk experts, which keep their names.
        to: The one encoding that is tried; by default all that fit the expert.
        keep: With `to`, the share of the entries or tiles that stay, the largest ones.
        rank: With `to`, the most directions of each matrix.
        bound: How much the loss may rise, in nats a target token.
        overwrite: Replace experts in `out`.

    Examples:
        modular-experts shrink --experts library/a library/b --out small --data.tasks a.jsonl b.jsonl
        modular-experts shrink --experts library/a --to sign --keep 0.5 --bound 0.1 --out small --data.tasks a.jsonl
    """
    if to is None and (keep != 1 or rank is not None):
        raise ValueError("--keep and --rank belong to one encoding; name it, such as --to int4")
    form, done = Form(to, keep, rank) if to else None, []
    for one in shrink_experts(experts, measured, out, form, bound, overwrite, progress_bar("shrinking")):
        _print(one, bound)
        done.append(one)
    kept = [one for one in done if one.chosen]
    before, after = sum(one.before.bytes for one in kept), sum(one.chosen.bytes for one in kept if one.chosen)
    if kept:
        print(f"{counted(len(kept), 'expert')} in {out}: {bytes_text(after)} instead of {bytes_text(before)}")
    if missed := [one.source.name for one in done if not one.chosen]:
        names = ", ".join(missed)
        raise ValueError(f"no smaller form of {names} keeps the loss within {bound:g}; allow more with --bound")


def _print(one: Shrunk, bound: float) -> None:
    table = table_of("form", "bytes", "loss")
    table.add_row("as it was", bytes_text(one.before.bytes), f"{one.before.loss:.4f}")
    for tried in one.tried:
        mark = " (written)" if tried is one.chosen else ""
        table.add_row(f"{tried.form}{mark}", bytes_text(tried.bytes), f"{tried.loss:.4f}")
    print(f"{one.source.name}: loss on validation rows, at most {one.before.loss + bound:.4f}")
    Console(markup=False, emoji=False).print(table)
