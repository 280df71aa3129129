"""Read the description of a study, and check all of it before anything runs.

A `Description` holds the words of a YAML file, or of a call in Python. `read_study` makes a `Study` of it: the same as
plain values, every short form spelt out. A process that does a piece of the work gets these values and makes objects of
them where it needs some.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from modular_experts.base.base import DType
from modular_experts.data.tasks import NAME
from modular_experts.evaluation import text_metrics
from modular_experts.evaluation.scores import TextMetric
from modular_experts.library import StoredExpert, check_name
from modular_experts.library.described import trusted
from modular_experts.settings import SHORT_NAMES, Options, folded, plain, respelt
from modular_experts.settings.read import make
from modular_experts.study.merges import Combination, Entry, Route, check_kinds, read_entries
from modular_experts.study.published import SINGLE, Published, read_published
from modular_experts.study.short_forms import Kinds, content_hash, for_seed, read_tasks, spelt_out
from modular_experts.text import did_you_mean
from modular_experts.training.settings import read_run

log = logging.getLogger(__name__)

MULTITASK, BASE = "multitask", "base"
RESERVED = (MULTITASK, BASE, "merge", "route")
DATA = ("max_length", "validation_ratio", "test_ratio", "split_seed", "eval_limit", "chat_template", "eval_batch_size")
"""Settings of `TaskMixture` that hold for the training and for every measurement alike."""

Settings = dict[str, Any]
Measure = Callable[[Sequence[StoredExpert]], Sequence[float]]
Count = int | str


@dataclass(frozen=True)
class Description(Options):
    """What a study shall do, in the words of its file.

    Args:
        base: Directory or hub id of the base.
        tasks: {held_in: [...], held_out: [...]} of task files. Such are also patterns as tasks/*.jsonl, hub ids, tasks
            of the suite, as Reverse, and tasks with settings, as for `fit`.
        experts: A config of `fit` for each kind, or its settings. One is {lora: {expert: LoRAExpert, steps: 200}}. With
            `grid: {learning_rate: [0.001, 0.003]}` in it there is a kind for each value, lora-0.001 and lora-0.003;
            with `joint: true` the kind has one expert of all held-in tasks.
        merges: Merge methods, such as [SparseAverage, TIES]. {method: TIES, tune: true} chooses its settings on
            validation rows, and so does a search: {search: ATLAS, merges: [SelfRegMean]}. Beside them stand routes and
            ensembles: {route: Centroid, fallback: SelfRegMean}, {ensemble: probabilities}. `kinds: [sparse]` in an
            entry leaves the other kinds out; {method: [TIES, IsoC]} stands for two entries.
        counts: Experts in a merge (default: [all]). With [2, 5, all] there are merges of two and five too, of disjoint
            groups that the seed draws, the same for every method. [2: 10 draws, all] merges ten random pairs, which may
            share experts.
        multitask: {kind: full} trains one expert on all held-in tasks; {kind: full, steps: 500} with settings of
            `fit` of its own.
        matrix: Test every model on every task.
        seeds: Seeds of the trainings (default: [0]). `{seed}` in the base, in tasks and in experts stands for them.
        data: How rows are read, such as {eval_limit: 100}. It holds for trainings and tests.
        fit: Settings of `fit` that all kinds share.
        max_new_tokens: Length limit of a generated answer.
        dtype: Data type of the base. The settings of a kind beat it in its trainings; statistics and searches stay in
            float32.
        published: Figures of others to show beside ours. Such are {source: ..., metric: rougeL, rows: {lora TIES:
            {held_in: 50.2}}}: a row has the name of a model of this study; exact match and Rouge-L are in per cent.
        metrics: Metrics beside exact match and rougeL, by name. Each is a function of a generated text and its target,
            and may take the place of one of ours: {rougeL: modular_experts.evaluation.stemmed_rouge_l}.
        measures: Measures of single experts, by name. Each is a function of the opened experts of a kind and seed that
            returns a number for each, such as {overlap: mine.overlap}.
    """

    base: str
    tasks: Settings | list[Any] | str
    experts: Settings
    merges: list[Any] | None = None
    counts: list[Count | dict[str, Count]] | dict[str, Count] | Count | None = None
    multitask: Settings | None = None
    matrix: bool = False
    seeds: list[int] | None = None
    data: Settings | None = None
    fit: Settings | None = None
    max_new_tokens: int = 64
    dtype: DType = "float32"
    published: Settings | None = None
    metrics: dict[str, str] | None = None
    measures: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("merges", "counts", "seeds"):
            listed = getattr(self, name)
            if isinstance(listed, str | int) or (isinstance(listed, Mapping) and name != "counts"):
                raise ValueError(f"{name}={listed!r} must be a list, such as [{listed!r}]")
        for key in self.data or {}:
            if key not in DATA:
                near = did_you_mean(key, DATA) or f"; they are {', '.join(DATA)}"
                raise ValueError(f"data.{key} is not a setting of how the rows of a study are read{near}")
        if len(set(self.seeds or ())) < len(self.seeds or ()):
            raise ValueError(f"seeds={self.seeds} must be one or more different numbers, such as [0, 1, 2]")
        if self.dtype not in get_args(DType):
            near = did_you_mean(str(self.dtype), get_args(DType)) or f"; they are {', '.join(get_args(DType))}"
            raise ValueError(f"dtype={self.dtype!r} is not a data type of a base{near}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1 token of an answer")
        text_metrics(make("--metrics", dict[str, TextMetric], {**(self.metrics or {})}))
        make("--measures", dict[str, Measure], {**(self.measures or {})})


@dataclass(frozen=True)
class Study:
    """Everything that a study does, as plain values; what is not told here is as in its `Description`.

    Attributes:
        held_in: Settings of the tasks that get experts, by name.
        held_out: Settings of the tasks that are only tested, by name.
        contents: A hash of the files of each task, by name; empty for rows from elsewhere.
        experts: For each kind with an expert for each task the configs of its fit, of which a later one wins.
        merges: For each kind of expert its merges, routes and ensembles.
        counts: How many experts are merged, in ascending order.
        draws: For each count whose groups are random, how many there are; the groups of other counts are disjoint.
        joint: The configs of the fit of each kind with one expert of all held-in tasks.
        needs: The kinds of statistics that each merge needs, by its name.
    """

    base: str
    held_in: dict[str, Settings]
    held_out: dict[str, Settings]
    contents: dict[str, str]
    experts: dict[str, list[Settings]]
    merges: dict[str, tuple[Combination, ...]]
    counts: tuple[int, ...]
    joint: dict[str, list[Settings]]
    matrix: bool
    seeds: tuple[int, ...]
    data: Settings
    max_new_tokens: int
    dtype: DType
    metrics: dict[str, str] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=dict)
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    draws: dict[int, int] = field(default_factory=dict)
    published: Published | None = None
    trust: tuple[str, ...] = field(default_factory=trusted)
    """Modules and classes that pieces trust in their processes, as this process does (`library/described.py`)."""

    @property
    def tasks(self) -> dict[str, Settings]:
        """Settings of all tasks by name, those that get experts first."""
        return {**self.held_in, **self.held_out}

    def at(self, seed: int) -> Study:
        """Return the study of a seed, which stands in the place of `{seed}`."""
        parts = {name: getattr(self, name) for name in ("base", "held_in", "held_out", "experts", "joint")}
        found = {name: for_seed(part, seed) for name, part in parts.items()}
        tasks = {**found["held_in"], **found["held_out"]}
        changed = {name: content_hash(name, task) for name, task in tasks.items() if task != self.tasks[name]}
        return replace(self, **found, contents=self.contents | changed) if found != parts else self

    def seen(self, tasks: Iterable[str]) -> list[list[Any]]:
        """Return the settings and the contents of tasks: all that a result on these tasks depends on."""
        every = self.tasks
        return [[every[task], self.contents[task]] for task in tasks]

    def name(self, kind: str, task: str, seed: int) -> str:
        """Return the name of an expert in the library."""
        return f"{kind}-{task}{self._of(seed)}"

    def merge_name(self, kind: str, merge: str, seed: int) -> str:
        """Return the name in the library of the merge of all experts of a kind."""
        return f"merge-{kind}-{re.sub('[^A-Za-z0-9._-]+', '-', merge)}{self._of(seed)}"

    def route_name(self, kind: str, route: str, seed: int) -> str:
        """Return the name in the library of all experts of a kind behind a router."""
        return self.merge_name(kind, route, seed).replace("merge", "route", 1)

    def joint_name(self, kind: str, seed: int) -> str:
        """Return the name in the library of an expert of all tasks."""
        return f"{kind}{self._of(seed)}"

    def _of(self, seed: int) -> str:
        return f"-seed{seed}" if len(self.seeds) > 1 else ""


def read_study(base: str | Path, tasks: Any, experts: Mapping[str, Any], merges: Any = None, **more: Any) -> Study:
    """Check the description of a study, and return it with every short form spelt out.

    The arguments are the settings of `Description`. Where they name a class, the class itself may stand, or
    `partial(LoRAExpert, rank=4)`, an object of a merge method, or a `Task`.

    Raises:
        ValueError: Something does not fit; nothing has run.
    """
    given = Description(*map(plain, (base, tasks, experts, merges)), **plain(more))
    held_in, held_out = read_tasks(given.tasks)
    kinds, joint, named = read_experts(given)
    seeds = tuple(given.seeds or [0])
    _check_fits(given, {**kinds, **joint}, next(iter(held_in.values())), seeds[0])
    entries = read_entries(given.merges or [], named)
    wanted: Any = given.counts or ["all"]
    counts = read_counts(wanted, len(held_in))
    if [*counts] != [len(held_in)] and (together := [name for name, entry in entries.items() if entry.together]):
        raise ValueError(f"{together[0]} is measured for one merge of all experts; give counts: [all]")
    study = Study(
        base=given.base,
        held_in=held_in,
        held_out=held_out,
        contents={name: content_hash(name, for_seed(task, seeds[0])) for name, task in {**held_in, **held_out}.items()},
        experts=kinds,
        merges={kind: tuple(entry.merge for entry in entries.values() if kind in entry.kinds) for kind in kinds},
        counts=tuple(counts),
        draws={size: draws for size, draws in counts.items() if draws},
        joint=joint,
        matrix=given.matrix,
        seeds=seeds,
        data=dict(given.data or {}),
        max_new_tokens=given.max_new_tokens,
        dtype=given.dtype,
        metrics={**(given.metrics or {})},
        measures={**(given.measures or {})},
        needs={name: entry.needs for name, entry in entries.items()},
        published=read_published(given.published, _models(kinds, entries, joint)) if given.published else None,
    )
    _check_names(study)
    for seed in seeds[1:]:
        study.at(seed)  # refuses files that are not there
    return study


def read_experts(given: Description) -> Kinds:
    """Return the configs of the fit of each kind of experts: the shared settings, then its own."""
    if not given.experts:
        raise ValueError("a study needs a kind of expert, such as experts: {lora: {expert: LoRAExpert, steps: 200}}")
    found = spelt_out(given.experts)
    for kind in {**found.apart, **found.joint}:
        if not NAME.fullmatch(kind) or kind in RESERVED:
            raise ValueError(f"{kind!r} cannot name a kind of experts; use letters, digits, '-', '_', not {RESERVED}")
    apart, joint = (
        {kind: _configs(kind, settings, given.fit) for kind, settings in part.items()}
        for part in (found.apart, found.joint)
    )
    return Kinds(apart, joint | _multitask(given, apart), found.named)


def _multitask(given: Description, kinds: Mapping[str, list[Settings]]) -> dict[str, list[Settings]]:
    if given.multitask is None:
        return {}
    own = {name: value for name, value in given.multitask.items() if name != "kind"}
    if "kind" not in given.multitask:
        return {MULTITASK: _configs(MULTITASK, own, given.fit)}
    check_kinds("multitask", [given.multitask["kind"]], kinds)
    return {MULTITASK: [*kinds[given.multitask["kind"]], *[own] * bool(own)]}


def _configs(kind: str, settings: Any, shared: Mapping[str, Any] | None) -> list[Settings]:
    """Return the configs of a fit: what all kinds share, then its own, each a file or its contents."""
    found = [dict(shared)] if shared else []
    for one in settings if isinstance(settings, list) else [settings]:
        if isinstance(one, str):
            file = Path(one)
            try:
                one = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError) as error:
                why = " ".join(str(error).split())
                meant = "" if file.suffix in (".yaml", ".yml") else f"; a type of expert is {{expert: {file}}}"
                raise ValueError(f"experts.{kind}: {file} cannot be read as a config of fit ({why}){meant}") from None
        if not isinstance(one, Mapping):
            raise ValueError(
                f"experts.{kind} is {one!r}; give a config of fit, or its settings: {{expert: LoRAExpert}}"
            )
        found.append(dict(one))
    return found


def _check_fits(given: Description, kinds: Mapping[str, list[Settings]], task: Settings, seed: int) -> None:
    shared = "fit and " if given.fit else ""
    own = {"model": {"base": given.base}, "data": {**(given.data or {}), "tasks": [task]}}
    short = {full: name for name, full in SHORT_NAMES.items()}
    for kind, configs in kinds.items():
        try:
            every = for_seed([*configs, own], seed)
            read_run(folded([("the config", one) for one in every], short=SHORT_NAMES))
        except ValueError as error:
            name = MULTITASK if kind == MULTITASK else f"{shared}experts.{kind}"
            raise ValueError(f"{name}: {respelt(str(error), short)}") from error


def read_counts(counts: Sequence[Any] | Mapping[Any, Any], tasks: int) -> dict[int, int]:
    """Return how many random groups there are of each size, in ascending order; 0 of a size with disjoint groups."""
    found: dict[int, int] = {}
    for entry in [counts] if isinstance(counts, Mapping) else counts:
        for count, draws in entry.items() if isinstance(entry, Mapping) else [(entry, None)]:
            # A command line and the keys of a mapping give numbers as text.
            size = tasks if count == "all" else int(str(count)) if re.fullmatch(r"\d+", str(count)) else 0
            if count != "all" and not 2 <= size <= tasks:
                raise ValueError(
                    f"counts holds {count}; give numbers from 2 to the {tasks} held-in tasks, or `all`: [2, 5, all], "
                    "or random groups: [2: 10 draws, all]"
                )
            wanted = _draws(count, draws, size, tasks) if isinstance(entry, Mapping) else 0
            if found.setdefault(size, wanted) != wanted:
                raise ValueError(f"counts names {size} experts twice, with other groups; leave one of the two out")
    return dict(sorted(found.items()))


def _draws(count: Any, draws: Any, size: int, tasks: int) -> int:
    """Return how many random groups `10 draws` means; 0 for the group of all experts, which drawn is the same."""
    number = re.fullmatch(r"([1-9]\d*)( draws?)?", str(draws))
    if number is None:
        raise ValueError(
            f"counts: {count} has {draws!r}; give how many random groups to draw, such as [{count}: 10 draws]"
        )
    wanted, most = int(number[1]), math.comb(tasks, size)
    if most < wanted:
        groups = f"{most} different group{'s' * (most > 1)}"
        sentence = "counts: %d experts have only %s of %d, so the study takes each once instead of %d draws"
        log.warning(sentence, tasks, groups, size, wanted)
    return 0 if size == tasks else min(wanted, most)


def _models(kinds: Iterable[str], merges: Mapping[str, Entry], joint: Iterable[str]) -> list[str]:
    """Return the names of a study's models as its tables name them; merges are of all experts."""
    singles = [f"{kind}{SINGLE}" for kind in kinds]
    merged = [f"{kind} {name}" for name, entry in merges.items() for kind in entry.kinds]
    return [BASE, *singles, *merged, *joint]


def _check_names(study: Study) -> None:
    names = [study.joint_name(kind, seed) for seed in study.seeds for kind in {MULTITASK: None, **study.joint}]
    for seed, kind in itertools.product(study.seeds, study.experts):
        names += [study.name(kind, task, seed) for task in study.held_in]
        for merge in study.merges[kind]:
            named = study.route_name if isinstance(merge, Route) else study.merge_name
            names.append(named(kind, merge.name, seed))
    for name, count in Counter(map(check_name, names)).items():
        if count > 1:
            raise ValueError(f"two experts would have the name {name} in the library; rename a kind, a task or a merge")
