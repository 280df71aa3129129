"""Choose a path of GLoRA for each layer by evolution on validation rows, under a limit of trained numbers."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.injection.attach import by_state
from modular_experts.injection.inject import (
    expert_layers,
    expert_state,
    load_expert_state,
    task_vector,
)
from modular_experts.injection.routed import Injected
from modular_experts.injection.save import describe_experts
from modular_experts.jobs import JSONLines
from modular_experts.library import (
    StoredExpert,
    check_target,
    make_record,
    open_expert,
    write_expert,
)
from modular_experts.library.compatibility import open_parents
from modular_experts.methods import MergeMethod
from modular_experts.progress import Progress
from modular_experts.systems.evolution import Choice, Evolution, Genes
from modular_experts.systems.glora.expert import KINDS, GLoRAExpert, GLoRAPath
from modular_experts.tuning.objective import (
    Objective,
    Trial,
    ValidationRows,
    check_trials_file,
    mean_loss,
    objective_on_base,
    record_notes,
    write_trials,
)
from modular_experts.tuning.search import SearchAlgorithm, SearchResult


@dataclass(frozen=True)
class PathSearch(Evolution, SearchAlgorithm):
    """Evolution over the paths of a GLoRA that `RandomPaths` trained, on the mean over tasks of the validation loss.

    A candidate names for each layer and part what the layer keeps: all of a product, its first column, one number, or
    nothing. One that keeps more numbers than the limit allows loses parts at random places until it fits, before it is
    measured. The first candidates have the same path in all layers, the largest one among them.

    Args:
        limit: The most trained numbers of all layers together; without it, all that the expert has.
        evaluations: Candidates that are measured, the budget of the search; GLoRA measures about a thousand.
        first: How many of them are drawn at random, before parents are chosen; GLoRA takes 50.
        parents: How many of the best candidates have children; GLoRA takes 10.
        crossover: Share of the children with two parents, in [0, 1]; GLoRA makes half of them so.
        mutation: Probability that a part of the others changes, in (0, 1]; at least one changes. GLoRA takes 0.2.
        seed: Seed of all draws. Equal seeds give equal searches.
    """

    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"PathSearch: limit must be at least 1 trained number, got {self.limit}")

    def run(
        self,
        experts: Sequence[str | Path],
        data: ValidationRows | TaskMixture,
        out: str | Path,
        merges: Sequence[MergeMethod] = (),
        overwrite: bool = False,
        progress: Progress = iter,
    ) -> SearchedPaths:
        if isinstance(data, ValidationRows) and (data.labels != "rows" or data.expert_of):
            raise ValueError("PathSearch measures the targets of the rows; leave labels and expert_of out")
        if (given := len(experts) + len(merges)) != 1:
            raise ValueError(f"PathSearch searches the paths of one expert, and {given} experts and merges are given")
        return search_paths(experts[0], self, data, out, overwrite, progress)


@dataclass(frozen=True, eq=False)
class SearchedPaths(SearchResult):
    """What `search_paths` found and wrote.

    Attributes:
        expert: The expert of the best paths.
        paths: The path of each weight.
        numbers: How many trained numbers they keep together.
        most: How many the largest paths keep.
        losses: The loss of the best paths, by task.
        largest: The losses of the largest paths.
        base: The losses without the expert: of the base, with the experts that it was trained on top of.
        trials: The JSON file of all candidates.
    """

    expert: StoredExpert
    paths: dict[str, GLoRAPath]
    numbers: int
    most: int
    losses: dict[str, float]
    largest: dict[str, float]
    base: dict[str, float]
    trials: Path

    def report(self) -> Iterator[str]:
        for path, count in Counter(map(str, self.paths.values())).most_common(8):
            yield f"  {path}: {count} layer{'s' * (count != 1)}"
        losses = [mean_loss(one) for one in (self.losses, self.largest, self.base)]
        beneath = " and ".join(str(parent["name"]) for parent in self.expert.record["parents"])
        without = f"of the base with {beneath}" if beneath else "of the base alone"
        yield (
            f"{self.numbers:,} of {self.most:,} trained numbers: validation loss {losses[0]:.4f}, {losses[1]:.4f} with "
            f"all, and {losses[2]:.4f} {without}"
        )
        yield f"the trials are in {self.trials}"


def search_paths(
    expert: str | Path,
    algorithm: PathSearch,
    data: ValidationRows | TaskMixture,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
) -> SearchedPaths:
    """Find the best path of each layer of a stored GLoRA, and write the expert of these paths.

    Losses are stored beside `out` as they come; an interrupted search that is run again goes on from there.

    Args:
        expert: Directory of an expert of type `GLoRAExpert`. Experts that it was trained on top of must lie beside it;
            they are added to the base first.
        algorithm: Limit and budget.
        data: The rows that are measured, with labels of their own.
        out: Directory of the expert that is written; the trials are written beside it.
        overwrite: Whether files that exist may be replaced.

    Raises:
        FileExistsError: A file would be replaced; nothing has been read yet.
        FileNotFoundError: An expert that it was trained on top of is missing.
        ValueError: The expert is not a GLoRA, it was trained on top of one that chooses by the input or that has
            changed, the losses of another search lie beside `out`, or `objective_on_base` refuses the data.
    """
    check_target(out, overwrite)
    check_trials_file(out, overwrite)
    opened, parents = _opened(expert)
    objective = objective_on_base([opened, *parents], data)
    model = objective.model
    with ExitStack() as meanwhile:
        meanwhile.enter_context(applied(model, parents, check=False))
        beneath = objective.losses()
        meanwhile.enter_context(Injected(model, partial(by_state, GLoRAExpert, opened)))
        load_expert_state(model, opened.state())
        space = _Paths(model)
        store = _Losses(Path(out), _identity([opened, *parents], objective))

        def losses(genes: Genes) -> dict[str, float]:
            if genes not in store:
                space.take(genes)
                store[genes] = objective.losses()
            return store[genes]

        limit = space.numbers(space.largest) if algorithm.limit is None else algorithm.limit
        found = algorithm.search(
            [Choice(len(kinds)) for _, kinds in space.parts],
            lambda genes: mean_loss(losses(genes)),
            space.uniform(),
            lambda genes: space.within(genes, limit),
            progress=progress,
        )
        best, whole, numbers = losses(found.best), losses(space.largest), space.numbers(found.best)
        paths = space.paths(found.best)
        settings = asdict(algorithm) | {
            "numbers": numbers,
            "rows": data.rows if isinstance(data, ValidationRows) else ValidationRows.rows,
        }
        settings |= {"search": type(algorithm).__name__, "searched_in": opened.name}
        for name, layer in expert_layers(model):
            layer.expert = space.experts[name].only(paths[name], layer.matrix)
        record = _record(model, opened, settings, best)
        write_expert(out, task_vector(model), record, overwrite, state=expert_state(model))
    measured = [(space.paths(genes), losses(genes)) for genes, _ in found.measured]
    file = write_trials(out, [Trial({name: str(one[name]) for name in one}, values) for one, values in measured])
    store.file.unlink()
    return SearchedPaths(open_expert(out), paths, numbers, space.numbers(space.largest), best, whole, beneath, file)


def _opened(expert: str | Path) -> tuple[StoredExpert, list[StoredExpert]]:
    opened = open_expert(expert)
    if opened.record["kind"] != "GLoRAExpert" or not opened.state():
        raise ValueError(
            f"{opened.path} holds a {opened.record['kind']}, which has no paths to search; train one with "
            "--expert GLoRAExpert and the callback RandomPaths"
        )
    parents = open_parents(opened)
    for parent in parents:
        if not parent.mergeable:
            raise ValueError(
                f"{opened.name} was trained on top of {parent.name}, which chooses by the input, and PathSearch "
                "measures paths on top of deltas alone; train one on the base, or on top of a merge"
            )
    return opened, parents


def _record(
    model: nn.Module, opened: StoredExpert, settings: dict[str, Any], losses: dict[str, float]
) -> dict[str, Any]:
    facts = describe_experts(model)
    notes = record_notes(facts.pop("hyperparameters") | settings, losses)
    kept = {name: opened.record[name] for name in ("base", "tasks", "parents", "seed")}
    # The first layer may have kept nothing, and then does not tell the class of the state.
    facts["class_path"] = opened.record["class_path"]
    return make_record(**facts, **notes, **kept, training=opened.record.get("training"))


class _Paths:
    """The paths of all layers as one tuple of genes: which kind each part that has a choice is."""

    def __init__(self, model: nn.Module) -> None:
        self.experts = {name: cast(GLoRAExpert, layer.expert) for name, layer in expert_layers(model)}
        self.parts: list[tuple[tuple[str, str], tuple[str, ...]]] = [
            ((name, part), kinds)
            for name, expert in self.experts.items()
            for part, kinds in expert.choices().items()
            if len(kinds) > 1
        ]
        self.largest: Genes = tuple(len(kinds) - 1 for _, kinds in self.parts)
        none = GLoRAPath(*["none"] * len(KINDS))
        self.sizes = [
            [self.experts[name].numbers(none._replace(**{part: kind})) for kind in kinds]
            for (name, part), kinds in self.parts
        ]
        """How many trained numbers each kind of each part keeps."""

    def paths(self, genes: Genes) -> dict[str, GLoRAPath]:
        """Return the path of each weight."""
        chosen = {place: kinds[int(gene)] for (place, kinds), gene in zip(self.parts, genes, strict=True)}
        return {name: GLoRAPath(*(chosen.get((name, part), "none") for part in KINDS)) for name in self.experts}

    def take(self, genes: Genes) -> None:
        """Let each layer take its path."""
        for name, path in self.paths(genes).items():
            self.experts[name].path = path

    def numbers(self, genes: Genes) -> int:
        """Return how many trained numbers the paths keep."""
        return sum(sizes[int(gene)] for sizes, gene in zip(self.sizes, genes, strict=True))

    def within(self, genes: Genes, limit: int) -> Genes:
        """Return the genes with parts at random places made smaller until the limit holds."""
        # Equal candidates are made smaller alike, so that a search repeats.
        draws, smaller, kept = random.Random(str(genes)), [int(gene) for gene in genes], self.numbers(genes)
        while kept > limit:
            place = draws.choice([place for place, gene in enumerate(smaller) if gene])
            gene = draws.randrange(smaller[place])
            kept -= self.sizes[place][smaller[place]] - self.sizes[place][gene]
            smaller[place] = gene
        return tuple(smaller)

    def uniform(self) -> list[Genes]:
        """Return the largest path, and the paths of one part alone, each the same in all layers."""
        alone = [
            tuple(last if place[1] == part else 0 for (place, _), last in zip(self.parts, self.largest, strict=True))
            for part in dict.fromkeys(place[1] for place, _ in self.parts)
        ]
        return [self.largest, *alone]


class _Losses(JSONLines):
    """The losses of the candidates of one search in a file beside the expert, which lasts until the search ends."""

    def __init__(self, out: Path, search: str) -> None:
        super().__init__(out.with_name(f"{out.name}.losses.jsonl"))
        if ("search",) not in self:
            self["search",] = search
        if self["search",] != search:
            raise ValueError(
                f"{self.file} holds losses of another expert or of other rows; delete it to search anew, or choose "
                "another out"
            )


def _identity(experts: Sequence[StoredExpert], objective: Objective) -> str:
    digest = hashlib.sha256("".join(expert.content_hash for expert in experts).encode())
    for task, batches in objective.batches.items():
        digest.update(task.encode())
        for batch in batches:
            digest.update(batch["input_ids"].cpu().numpy().tobytes() + batch["labels"].cpu().numpy().tobytes())
    return digest.hexdigest()
