"""Search how much of each expert to merge, on validation rows, and merge.

`CoefficientSearch` is the contract of an algorithm, and `search` runs one from experts on disk to the merged expert.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from modular_experts.data import TaskMixture
from modular_experts.injection.task_heads import head_state
from modular_experts.library import StoredExpert, check_target, open_expert, open_experts, write_expert
from modular_experts.library.record import Facts
from modular_experts.merging.combination import Combination
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import (
    Objective,
    Trial,
    ValidationRows,
    mean_loss,
    objective_on_base,
    record_notes,
    write_trials,
)
from modular_experts.methods import MergeMethod, TaskArithmetic
from modular_experts.methods.settings import Checked
from modular_experts.progress import Counted, Progress


@dataclass(frozen=True, eq=False)
class Found:
    """What an algorithm found.

    Attributes:
        coefficients: `(weights, experts)` float64; or one for each row of every weight, as `Combination.move_to` takes
            them.
        losses: The loss of the validation rows at these coefficients, by task.
        trials: All trials, in order.
    """

    coefficients: Tensor
    losses: dict[str, float]
    trials: list[Trial]


class SearchResult(ABC):
    """What a search found; `expert` is the expert that it wrote."""

    expert: StoredExpert

    @abstractmethod
    def report(self) -> Iterator[str]:
        """Yield lines that tell a user what was found, and where it is."""


class SearchAlgorithm(ABC):
    """What the command `search` runs, from experts on disk to one expert; most are a `CoefficientSearch`."""

    @abstractmethod
    def run(
        self,
        experts: Sequence[str | Path],
        data: ValidationRows | TaskMixture,
        out: str | Path,
        merges: Sequence[MergeMethod] = (),
        overwrite: bool = False,
        progress: Progress = iter,
    ) -> SearchResult:
        """Search, and write the expert; it takes the arguments of the function `search`."""


class CoefficientSearch(Checked, SearchAlgorithm):
    """An algorithm that finds coefficients for each expert, its weights, or their rows.

    Subclass it as a frozen dataclass, whose fields become options of the command line, and write `search`. What refuses
    bad values of the fields stands in `checks`, as a merge method's does.
    """

    def run(
        self,
        experts: Sequence[str | Path],
        data: ValidationRows | TaskMixture,
        out: str | Path,
        merges: Sequence[MergeMethod] = (),
        overwrite: bool = False,
        progress: Progress = iter,
    ) -> "Searched":
        """Search for coefficients with the function `search`."""
        return search(experts, self, data, out, merges, overwrite, progress)

    def check(self, experts: int) -> None:
        """Raise ValueError if the settings do not fit this number of experts and merges; most fit any."""

    @property
    def distills(self) -> bool:
        """Whether it compares with the predictions of each task's own expert, which the objective then keeps."""
        return getattr(self, "objective", None) == "distill"

    @abstractmethod
    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        """Return the coefficients of a combination, inside its `with`; the model may be left at any of them."""


@dataclass(frozen=True, eq=False)
class Searched(SearchResult):
    """What `search` found and wrote.

    Attributes:
        expert: The expert.
        experts: Directories of all experts that it combines, in the order of the coefficients: merges first.
        found: Coefficients, losses and trials.
        base: The losses of the base alone, by task.
        trials: The JSON file of the trials.
    """

    expert: StoredExpert
    experts: list[str]
    found: Found
    base: dict[str, float]
    trials: Path

    def report(self) -> Iterator[str]:
        coefficients = self.found.coefficients
        for expert, values in zip(self.experts, coefficients.T, strict=True):
            low = values.min().item()
            high = values.max().item()
            spread = f", from {low:.3f} to {high:.3f}" if low < high else ""
            yield f"  {values.mean().item():.3f} of {expert}{spread}"
        if not coefficients.any():
            yield "the search ended at the base, so the merge moves nothing; take more steps, or a smaller penalty"
        yield f"validation loss {mean_loss(self.found.losses):.4f}, and {mean_loss(self.base):.4f} of the base alone"
        yield f"the trials are in {self.trials}; the same command makes the expert again"


def search(
    experts: Sequence[str | Path | StoredExpert],
    algorithm: CoefficientSearch,
    data: ValidationRows | TaskMixture,
    out: str | Path,
    merges: Sequence[MergeMethod] = (),
    overwrite: bool = False,
    progress: Progress = iter,
    read: Callable[..., Objective] = objective_on_base,
) -> Searched:
    """Find how much of each expert to merge by the loss on validation rows, and write the merge.

    Args:
        experts: Directories of the experts, or opened ones.
        algorithm: Finds the coefficients, e.g. `ATLAS()`.
        data: The rows that are measured; a `TaskMixture` alone stands for at most 64 labelled rows of each task.
        out: Directory of the merged expert. It holds the trials.
        merges: Methods whose merges of the experts are combined with the experts, as the first ones. Each merge is
            also written as an expert, named after `out` and the method.
        overwrite: Whether files that exist may be replaced.
        read: Makes the objective, with the arguments of `objective_on_base`, for example on a base that is loaded.

    Raises:
        FileExistsError: A file would be replaced; nothing has been read yet.
        ValueError: A merge would replace one of the experts, or `objective_on_base` refuses the data.
    """
    data = ValidationRows(data) if isinstance(data, TaskMixture) else data
    places = places_of(merges, experts, out)
    algorithm.check(len(merges) + len(experts))
    for target in [out, *places]:
        check_target(target, overwrite)
    opened = open_experts(experts, base=data.base)
    merged_lazily = [Merged(opened, method) for method in merges]
    objective = read(opened, data, algorithm.distills, progress)
    base_losses = objective.losses()
    held = [{name: merged[name] for name in progress(Counted(merged, "weights"))} for merged in merged_lazily]
    with Combination(objective.model, [*held, *opened], len(held)) as combination:
        outcome = algorithm.search(combination, objective, progress)
    for place, deltas, merged in zip(places, held, merged_lazily, strict=True):
        write_expert(place, deltas, merged.record(), overwrite, state=head_state(opened))
    settings = {"search": type(algorithm).__name__, **vars(algorithm), "rows": data.rows, **objective.origin}
    notes = record_notes(settings, outcome.losses)
    expert = _write([*places, *opened], combination, outcome.coefficients, notes, out, overwrite, progress)
    shown = [*places, *(str(member.place) for member in opened)]
    return Searched(expert, shown, outcome, base_losses, write_trials(out, outcome.trials))


def _write(
    experts: Sequence[str | StoredExpert],
    combination: Combination,
    coefficients: Tensor,
    notes: Facts,
    out: str | Path,
    overwrite: bool,
    progress: Progress,
) -> StoredExpert:
    """Write the merge with some coefficients: by `TaskArithmetic`, unless each row of a weight has its own."""
    rows = coefficients.tolist()
    if len(rows) > len(combination.names):
        merged = Merged(experts, TaskArithmetic())
        record = merged.record() | {"method": None} | dict(notes)
        write_expert(out, combination.deltas(coefficients), record, overwrite, state=head_state(merged.stored))
        return open_expert(out)
    if all(row == rows[0] for row in rows):
        merge = Merged(experts, TaskArithmetic(weights=rows[0]))
    else:
        by_name = zip(combination.names, rows, strict=True)
        merge = Merged(experts, None, {re.escape(name): TaskArithmetic(weights=row) for name, row in by_name})
    return write_merged(merge, out, overwrite, progress, notes)


def places_of(
    merges: Sequence[MergeMethod], experts: Sequence[str | Path | StoredExpert], out: str | Path
) -> list[str]:
    """Return where the merges are written, beside `out`; raise ValueError if one of the experts lies there."""
    places: list[str] = []
    for number, method in enumerate(merges):
        name = type(method).__name__
        # The second merge of one class gets the number 2.
        same = sum(type(other).__name__ == name for other in merges[: number + 1])
        places.append(f"{Path(out)}-{name}" if same == 1 else f"{Path(out)}-{name}-{same}")
    resolved = [Path(place).resolve() for place in places]
    for expert in experts:
        directory = expert.path if isinstance(expert, StoredExpert) else expert
        if Path(directory).resolve() in resolved:
            raise ValueError(f"a merge would be written to {directory}, which is among the experts; give another out")
    return places
