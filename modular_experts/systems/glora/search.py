"""Choose a path of GLoRA for each layer by evolution on validation rows, under a limit of trained numbers."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.injection.attach import by_state
from modular_experts.injection.inject import expert_layers, expert_state, load_expert_state, task_vector
from modular_experts.injection.routed import Injected
from modular_experts.injection.save import describe_experts
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, write_expert
from modular_experts.library.compatibility import check_mergeable, open_parents
from modular_experts.merging.objective import (
    Objective,
    Trial,
    ValidationRows,
    mean_loss,
    objective_on_base,
    record_notes,
    write_trials,
)
from modular_experts.merging.search import SearchAlgorithm, SearchResult
from modular_experts.methods import MergeMethod
from modular_experts.methods.settings import Checks, at_least
from modular_experts.progress import Progress
from modular_experts.reports.json_lines import JSONLines
from modular_experts.systems.evolution import Category, Evolution, Genes
from modular_experts.systems.glora.expert import KINDS, GLoRAExpert, GLoRAPath


@dataclass(frozen=True)
class PathSearch(Evolution, SearchAlgorithm):
    """Evolution over the paths of a GLoRA that `RandomPaths` trained, on the mean over tasks of the validation loss.

    A candidate names for each layer and part what the layer keeps: all of a product, its first column, one number, or
    nothing. One above the limit loses parts at random places until it fits. The first candidates have the same path in
    all layers, the largest one among them.

    Args:
        limit: The most trained numbers of all layers together; without it, all that the expert has.
        evaluations: Candidates that are measured, the budget of the search; GLoRA measures about a thousand.
        first: How many of them are drawn at random, before parents are chosen; GLoRA takes 50.
        parents: How many of the best candidates have children; GLoRA takes 10.
        crossover: Share of the children with two parents, in [0, 1]; GLoRA makes half of them so.
        mutation: Probability that a part of the others changes, in (0, 1]; at least one changes. GLoRA takes 0.2.
    """

    checks = Checks(limit=at_least(1, "must be at least 1 trained number"))

    limit: int | None = None

    def run(
        self,
        experts: Sequence[str | Path],
        data: ValidationRows | TaskMixture,
        out: str | Path,
        merges: Sequence[MergeMethod] = (),
        overwrite: bool = False,
        progress: Progress = iter,
    ) -> "SearchedPaths":
        """Find the best path of each layer of one stored GLoRA, and write the expert of these paths.

        Experts that it was trained on top of must lie beside it; they are added to the base first. Losses are stored
        beside `out` as they come; an interrupted search that is run again goes on from there.

        Raises:
            FileExistsError: A file would be replaced; nothing has been read yet.
            FileNotFoundError: An expert that it was trained on top of is missing.
            ValueError: The expert is not a GLoRA, one beneath it has changed or chooses by the input, the losses of
                another search lie beside `out`, or `objective_on_base` refuses the data.
        """
        rows = data if isinstance(data, ValidationRows) else ValidationRows(data)
        if rows.labels != "rows" or rows.expert_of:
            raise ValueError("PathSearch measures the targets of the rows; leave labels and expert_of out")
        count = len(experts) + len(merges)
        if count != 1:
            raise ValueError(f"PathSearch searches the paths of one expert, and {count} experts and merges are given")
        check_target(out, overwrite)
        opened = _with_paths(experts[0])
        parents = open_parents(opened)
        check_mergeable(parents)
        objective = objective_on_base([opened, *parents], rows)
        with ExitStack() as meanwhile:
            meanwhile.enter_context(applied(objective.model, parents, check=False))
            beneath = objective.losses()
            meanwhile.enter_context(Injected(objective.model, partial(by_state, GLoRAExpert, opened)))
            load_expert_state(objective.model, opened.state())
            space = _Paths(objective, _Losses(Path(out), [opened, *parents], objective))
            limit = space.numbers(space.largest) if self.limit is None else self.limit
            evolved = self.search(
                [Category(len(kinds)) for _, kinds in space.parts],
                lambda genes: mean_loss(space.losses(genes)),
                space.uniform(),
                lambda genes: space.within(genes, limit),
                progress=progress,
            )
            # Before the best paths alone are left in the model.
            best = space.losses(evolved.best)
            largest = space.losses(space.largest)
            numbers = space.numbers(evolved.best)
            settings = asdict(self) | {"numbers": numbers, "rows": rows.rows, "search": type(self).__name__}
            _write(space, evolved.best, opened, settings, out, overwrite)
            trials = [space.trial(genes) for genes, _ in evolved.measured]
        file = write_trials(out, trials)
        space.store.file.unlink()
        most = space.numbers(space.largest)
        return SearchedPaths(open_expert(out), space.paths(evolved.best), numbers, most, best, largest, beneath, file)


def _with_paths(place: str | Path) -> StoredExpert:
    expert = open_expert(place)
    if expert.record["kind"] != "GLoRAExpert" or not expert.state():
        raise ValueError(
            f"{expert.place} ({expert.record['kind']}) has no paths to choose from; name an expert that was "
            "trained with `expert=GLoRAExpert` and the callback RandomPaths, and not the result of a search"
        )
    return expert


def _write(
    space: "_Paths", best: Genes, opened: StoredExpert, settings: Mapping[str, object], out: str | Path, overwrite: bool
) -> None:
    model = space.objective.model
    for name, path in space.paths(best).items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        layer.expert = space.experts[name].only(path, layer.matrix)
    facts = describe_experts(model)
    notes = record_notes(facts.pop("hyperparameters") | settings | {"searched_in": opened.name}, space.losses(best))
    kept = {name: opened.record[name] for name in ("base", "tasks", "parents", "seed")}
    # The first layer may have kept nothing, and then does not tell the class of the state.
    facts |= {"class_path": opened.record["class_path"], "training": opened.record.get("training")}
    write_expert(out, task_vector(model), make_record(**facts, **notes, **kept), overwrite, state=expert_state(model))


@dataclass(frozen=True, eq=False)
class SearchedPaths(SearchResult):
    """What `PathSearch` found and wrote.

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
            yield f"  {path}: {count} {'layer' if count == 1 else 'layers'}"
        losses = [mean_loss(by_task) for by_task in (self.losses, self.largest, self.base)]
        beneath = " and ".join(str(parent["name"]) for parent in self.expert.record["parents"])
        without = f"of the base with {beneath}" if beneath else "of the base alone"
        yield (
            f"{self.numbers:,} of {self.most:,} trained numbers: validation loss {losses[0]:.4f}, {losses[1]:.4f} with "
            f"all, and {losses[2]:.4f} {without}"
        )
        yield f"the trials are in {self.trials}"


class _Paths:
    """The paths of all layers as one tuple of genes: which kind each part that has a choice is."""

    def __init__(self, objective: Objective, store: "_Losses") -> None:
        self.objective = objective
        self.store = store
        self.experts = {name: cast(GLoRAExpert, layer.expert) for name, layer in expert_layers(objective.model)}
        self.parts: list[tuple[tuple[str, str], tuple[str, ...]]] = [
            ((name, part), kinds)
            for name, expert in self.experts.items()
            for part, kinds in expert.choices().items()
            if len(kinds) > 1
        ]
        self.largest: Genes = tuple(len(kinds) - 1 for _, kinds in self.parts)
        none = GLoRAPath(*("none" for _ in KINDS))
        self.sizes = [
            [self.experts[name].numbers(none._replace(**{part: kind})) for kind in kinds]
            for (name, part), kinds in self.parts
        ]
        """How many trained numbers each kind of each part keeps."""

    def paths(self, genes: Genes) -> dict[str, GLoRAPath]:
        chosen = {place: kinds[int(gene)] for (place, kinds), gene in zip(self.parts, genes, strict=True)}
        return {name: GLoRAPath(*(chosen.get((name, part), "none") for part in KINDS)) for name in self.experts}

    def trial(self, genes: Genes) -> Trial:
        return Trial({name: str(path) for name, path in self.paths(genes).items()}, self.losses(genes))

    def losses(self, genes: Genes) -> dict[str, float]:
        """Return the losses by task of paths, which are measured once."""
        if genes not in self.store:
            for name, path in self.paths(genes).items():
                self.experts[name].path = path
            self.store[genes] = self.objective.losses()
        return self.store[genes]

    def numbers(self, genes: Genes) -> int:
        return sum(sizes[int(gene)] for sizes, gene in zip(self.sizes, genes, strict=True))

    def within(self, genes: Genes, limit: int) -> Genes:
        """Return the genes with parts at random places made smaller until the limit holds."""
        # Equal candidates are made smaller alike, so that a search repeats.
        draws = random.Random(str(genes))
        smaller = [int(gene) for gene in genes]
        kept = self.numbers(genes)
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
    """The losses of one search's candidates, in a file beside the expert until the search ends."""

    def __init__(self, out: Path, experts: Sequence[StoredExpert], objective: Objective) -> None:
        super().__init__(out.with_name(f"{out.name}.losses.jsonl"))
        digest = hashlib.sha256("".join(expert.content_hash for expert in experts).encode())
        for task, batches in objective.batches.items():
            digest.update(task.encode())
            for batch in batches:
                digest.update(batch["input_ids"].cpu().numpy().tobytes() + batch["labels"].cpu().numpy().tobytes())
        search = digest.hexdigest()
        if ("search",) not in self:
            self["search",] = search
        if self["search",] != search:
            raise ValueError(
                f"{self.file} holds losses of another expert or of other rows; delete it to search anew, or choose "
                "another out"
            )
