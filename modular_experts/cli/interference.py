"""Run `modular-experts interference`, which compares experts before they are merged."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from modular_experts.cli.format import call_text, progress_bar, share_text, table_of
from modular_experts.merger.interference import Interference, mean_of_others
from modular_experts.merger.interference import interference as compare
from modular_experts.methods import MergeMethod, SparseAverage
from modular_experts.text import depth_of


def interference(
    experts: list[str], method: MergeMethod | None = None, out: str | None = None, overwrite: bool = False
) -> None:
    """Show how experts get in each other's way: where they move the same entries, and where against each other.

    For each expert, overlap is the number of entries that it and another both move over the number that either
    moves; conflict is the share of the shared entries that they move in opposite directions; and distance is how
    far the merge is from the expert, as a share of its energy: 0 is the expert itself, 1 is as far as the base, and
    more is farther. Overlap, conflict and cosine are means over the other experts. These measures predict only
    weakly which expert loses by a merge: on twenty generated tasks, their rank correlations with the loss of exact
    match are about 0.5 at most.

    Args:
        experts: Directories of two or more experts.
        method: The merge whose distance is shown; SparseAverage by default.
        out: A JSON file for all numbers.
        overwrite: Replace that file.

    Examples:
        modular-experts interference library/a library/b
        modular-experts interference --experts library/a library/b --method TIES --out interference.json
    """
    if out and Path(out).exists() and not overwrite:
        raise FileExistsError(f"{out} exists already; choose another out, or replace it with --overwrite")
    chosen = method or SparseAverage()
    found = compare(experts, chosen, progress_bar("comparing"))
    console = Console(markup=False, emoji=False)
    console.print(_experts(found), _layers(found))
    print(f"distance is to a merge with {call_text(type(chosen).__name__, vars(chosen))}")
    if out:
        from modular_experts.reports import write_json

        write_json(out, found.as_dict())
        print(f"all numbers are in {out}")


def _experts(found: Interference) -> Table:
    table, sums = table_of("expert", "norm", "overlap", "conflict", "cosine", "distance"), found.total
    means = [mean_of_others(pairs) for pairs in (sums.overlap, sums.conflict, sums.cosine)]
    for number, name in enumerate(found.experts):
        overlap, conflict, cosine = (mean[number].item() for mean in means)
        norm, distance = sums.products[number, number].sqrt().item(), sums.distance[number].item()
        cells = share_text(overlap), share_text(conflict), f"{cosine:.3f}", f"{distance:.3f}"
        table.add_row(name, f"{norm:.3g}", *cells)
    return table


def _layers(found: Interference) -> Table:
    table = table_of("layer", "energy", "overlap", "conflict", "cosine", "distance")
    total = found.total.products.trace()
    for name in sorted(found.layers, key=lambda name: (not name, depth_of(f"{name}.weight"), name)):
        sums = found.layers[name]
        energy = (sums.products.trace() / total).item()
        shares = [_mean(mean_of_others(pairs)) for pairs in (sums.overlap, sums.conflict)]
        cells = [share_text(share) for share in (energy, *shares)]
        cells += [f"{_mean(mean_of_others(sums.cosine)):.3f}", f"{_mean(sums.distance):.3f}"]
        depth = depth_of(f"{name}.weight")
        table.add_row("others" if depth is None else str(depth), *cells)
    return table


def _mean(values: Tensor) -> float:
    return values.nanmean().item()
