"""Read the description of a study, and check all of it before anything runs."""

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modular_experts.base.base import Base, DType
from modular_experts.data.tasks import NAME
from modular_experts.evaluation.metrics import TAKEN, Metrics, named_metrics, text_metrics
from modular_experts.library import check_name, open_expert
from modular_experts.study.apart import Apart
from modular_experts.study.lightning import check_settings
from modular_experts.study.merges import check_kinds, read_ways
from modular_experts.study.options import SHORT_NAMES, respelt
from modular_experts.study.parser import load_yaml, make
from modular_experts.study.plan import BASE, MULTITASK, Measure, Study
from modular_experts.study.short_forms import Kinds, Settings, check_files, for_seed, kinds_of, read_tasks, stored_in
from modular_experts.text import did_you_mean
from modular_experts.training.checkpoint import as_config

log = logging.getLogger(__name__)

RESERVED = (MULTITASK, BASE, "merge", "route")
DATA = (
    "max_length",
    "validation_ratio",
    "test_ratio",
    "split_seed",
    "eval_limit",
    "chat_template",
    "eval_batch_size",
    "shots",
    "shots_seed",
    "label_choices",
)
"""Settings of `TaskMixture` that hold for the training and for every measurement alike."""

Count = int | str


@dataclass(frozen=True)
class Description:
    """What a study shall do, in the words of its file.

    Args:
        base: Directory or hub id of the base.
        tasks: {held_in: [...], held_out: [...]} of task files. A list also takes patterns such as tasks/*.jsonl, hub
            ids, tasks of the suite such as Reverse, and tasks with settings, as for `fit`.
        experts: A config of `fit` for each kind, or its settings. An example is {lora: {expert: LoRAExpert, steps:
            200}}. With `grid: {learning_rate: [0.001, 0.003]}` in it there is a kind for each value, lora-0.001 and
            lora-0.003; with `joint: true` the kind has one expert of all held-in tasks. {lora: {stored: peft}} takes
            the experts or PEFT adapters in a directory, each named after its task.
        merges: Merge methods, such as [SparseAverage, TIES]. {method: TIES, tune: true} chooses its settings on
            validation rows, and so does a search: {search: ATLAS, merges: [SelfRegMean]}. Entries may also be routes
            and ensembles: {route: Centroid, fallback: SelfRegMean}, {ensemble: probabilities}. {distill: LoRAExpert,
            steps: 1000} trains one expert on the experts' predictions. {shrink: int4} stores each expert in fewer bytes
            and tests it on its own task, and {route: Centroid, of: int4} chooses among these. `kinds: [sparse]` in an
            entry leaves the other kinds out; {method: [TIES, IsoC]} stands for two.
        counts: Experts in a merge (default: [all]). With [2, 5, all] there are merges of two and five too, of disjoint
            groups that the seed draws, the same for every method. [2: 10 draws, all] merges ten random pairs, which may
            share experts.
        multitask: {kind: full} trains one expert on all held-in tasks; {kind: full, steps: 500} gives it settings of
            `fit` of its own.
        matrix: Test every model on every task.
        seeds: Seeds of the trainings (default: [0]). `{seed}` in the base, in tasks and in experts stands for them.
        data: How rows are read, such as {eval_limit: 100}. It holds for trainings and tests.
        fit: Settings of `fit` that all kinds share.
        base_shots: Also test the base with demonstrations: [4, 8].
        max_new_tokens: Length limit of a generated answer.
        dtype: Data type of the base. The settings of a kind beat it in its trainings; statistics and searches stay in
            float32.
        metrics: Metrics beside exact match and rougeL. A list is [number, json, mine.length, year=/[0-9]{4}/]; by name,
            one may take the place of ours: {rougeL: stemmed_rouge_l}.
        measures: Measures of single experts, by name. Each is a function of the opened experts of a kind and seed that
            returns a number for each, such as {overlap: mine.overlap}.
    """

    base: str
    # In `dict` and `list` texts stay texts; among values of any type a parser would read YAML in them.
    tasks: dict | list | str
    experts: dict
    merges: list | None = None
    counts: list[Count | dict[str, Count]] | dict[str, Count] | Count | None = None
    multitask: dict | None = None
    matrix: bool = False
    seeds: list[int] | None = None
    data: dict | None = None
    fit: dict | None = None
    base_shots: list[int] | None = None
    max_new_tokens: int = 64
    dtype: DType = "float32"
    metrics: Metrics | None = None
    measures: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("merges", "counts", "seeds", "base_shots"):
            listed = getattr(self, name)
            if isinstance(listed, str | int) or (isinstance(listed, Mapping) and name != "counts"):
                raise ValueError(f"{name}={listed!r} must be a list, such as [{listed!r}]")
        for key in self.data or {}:
            if key not in DATA:
                near = did_you_mean(key, DATA) or f"; they are {', '.join(DATA)}"
                raise ValueError(f"data.{key} is not a setting of how the rows of a study are read{near}")
        if len(set(self.seeds or ())) < len(self.seeds or ()):
            raise ValueError(f"seeds={self.seeds} must be one or more different numbers, such as [0, 1, 2]")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1 token of an answer")
        if bad := [shots for shots in self.base_shots or () if shots < 1]:
            raise ValueError(
                f"base_shots={bad[0]} must be at least 1; the base without demonstrations is always tested"
            )
        make("dtype", DType, self.dtype)
        text_metrics(self.metrics)
        make("measures", dict[str, Measure], {**(self.measures or {})})
        if taken := [name for name in self.measures or () if name in TAKEN]:
            raise ValueError(f"measures.{taken[0]} has a name that results have already; give another name")


def read_study(base: str | Path, tasks: Any, experts: Mapping[str, Any], merges: Any = None, **more: Any) -> Study:
    """Check the description of a study, and return it with every short form spelt out.

    The arguments are the settings of `Description`. Where they name a class, the class itself may stand, or
    `partial(LoRAExpert, rank=4)`, an object of a merge method, or a `Task`.

    Raises:
        ValueError: Something does not fit; nothing has run.
    """
    described = Description(*map(as_config, (base, tasks, experts, merges)), **as_config(more))
    held_in, held_out = read_tasks(described.tasks)
    kinds, joint, named = read_experts(described)
    seeds = tuple(described.seeds or [0])
    for kind, configs in joint.items():
        if stored_in(configs):
            raise ValueError(f"experts.{kind}: stored is for kinds with an expert for each task")
    trained = {kind: configs for kind, configs in {**kinds, **joint}.items() if not stored_in(configs)}
    _check_fits(described, trained, next(iter(held_in.values())), seeds[0])
    stored = [stored_in(kinds[kind]) for kind in kinds.keys() - trained]
    for place, base in {
        (for_seed(folder, seed), for_seed(described.base, seed)) for folder in stored for seed in seeds
    }:
        Base.open(base, [open_expert(Path(place, task), base) for task in held_in])
    ways = read_ways(described.merges or [], named)
    counts = read_counts(described.counts or ["all"], len(held_in))  # type: ignore[arg-type]
    together = [name for name, (way, _) in ways.items() if way.together]
    if together and [*counts] != [len(held_in)]:
        raise ValueError(f"{together[0]} is measured for one merge of all experts; give counts: [all]")
    study = Study(
        base=described.base,
        held_in=held_in,
        held_out=held_out,
        experts=kinds,
        merges={kind: tuple(way for way, its_kinds in ways.values() if kind in its_kinds) for kind in kinds},
        counts=tuple(counts),
        draws={size: draws for size, draws in counts.items() if draws},
        joint=joint,
        matrix=described.matrix,
        seeds=seeds,
        data=dict(described.data or {}),
        base_shots=tuple(described.base_shots or ()),
        max_new_tokens=described.max_new_tokens,
        dtype=described.dtype,
        metrics=named_metrics(described.metrics),
        measures={**(described.measures or {})},
    )
    _check_names(study)
    for seed in seeds:
        check_files(study.at(seed).tasks)
    return study


def read_experts(description: Description) -> Kinds:
    """Return the configs of the fit of each kind of experts: the shared settings, then its own."""
    if not description.experts:
        raise ValueError("a study needs a kind of expert, such as experts: {lora: {expert: LoRAExpert, steps: 200}}")
    kinds = kinds_of(description.experts)
    for kind in {**kinds.apart, **kinds.joint}:
        if not NAME.fullmatch(kind) or kind in RESERVED:
            raise ValueError(f"{kind!r} cannot name a kind of experts; use letters, digits, '-', '_', not {RESERVED}")
    shared = description.fit
    apart = {kind: _configs(kind, settings, shared) for kind, settings in kinds.apart.items()}
    joint = {kind: _configs(kind, settings, shared) for kind, settings in kinds.joint.items()}
    if description.multitask is not None:
        own = dict(description.multitask)
        kind = own.pop("kind", None)
        if kind is None:
            joint[MULTITASK] = _configs(MULTITASK, own, shared)
        else:
            check_kinds("multitask", [kind], apart)
            joint[MULTITASK] = [*apart[kind], own] if own else apart[kind]
    return Kinds(apart, joint, kinds.named)


def _configs(kind: str, settings: Any, shared: Settings | None) -> list[Settings]:
    """Return the configs of a fit: what all kinds share, then its own, each a file or its contents."""
    own = [_config(kind, config) for config in (settings if isinstance(settings, list) else [settings])]
    if stored_in(own):
        for key in (key for config in own for key in config):
            if key != "stored":
                raise ValueError(f"experts.{kind}: stored takes experts as they are; leave out {key}, or stored")
    return [dict(shared), *own] if shared else own


def _config(kind: str, config: object) -> Settings:
    """Return the settings of a config, which may stand as its file."""
    if isinstance(config, str):
        file = Path(config).expanduser()
        try:
            config = load_yaml(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            meant = "" if file.suffix in (".yaml", ".yml") else f"; a type of expert is {{expert: {file}}}"
            raise ValueError(f"experts.{kind}: {file} cannot be read as a config of fit ({why}){meant}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"experts.{kind} is {config!r}; give a config of fit, or settings: {{expert: LoRAExpert}}")
    return dict(config)


def _check_fits(given: Description, kinds: Mapping[str, list[Settings]], task: Settings, seed: int) -> None:
    shared = "fit and " if given.fit else ""
    own = {"model": {"base": given.base}, "data": {**(given.data or {}), "tasks": [task]}}
    short = {full: name for name, full in SHORT_NAMES.items()}
    for kind, configs in kinds.items():
        try:
            check_settings(for_seed([*configs, own], seed))
        except ValueError as error:
            name = MULTITASK if kind == MULTITASK else f"{shared}experts.{kind}"
            raise ValueError(f"{name}: {respelt(str(error), short)}") from error


def read_counts(counts: Sequence[Any] | Mapping[Any, Any], tasks: int) -> dict[int, int]:
    """Return how many random groups there are of each size, in ascending order; 0 of a size with disjoint groups."""
    groups: dict[int, int] = {}
    for entry in [counts] if isinstance(counts, Mapping) else counts:
        # A size alone has disjoint groups.
        pairs = entry.items() if isinstance(entry, Mapping) else [(entry, "")]
        for count, draws in pairs:
            size, number = _size_of(count, tasks), _draws_of(draws)
            if size is None or number is None:
                raise ValueError(
                    f"counts holds {entry}; give numbers from 2 to the {tasks} held-in tasks, or `all`: [2, 5, all], "
                    "or random groups: [2: 10 draws, all]"
                )
            wanted = _drawn(number, size, tasks)
            if groups.setdefault(size, wanted) != wanted:
                raise ValueError(f"counts names {size} experts twice, with other groups; leave one of the two out")
    return dict(sorted(groups.items()))


def _size_of(count: object, tasks: int) -> int | None:
    """Return the size of a group, which keys of a mapping give as text; None if there is no such group."""
    if count == "all":
        return tasks
    is_size = re.fullmatch(r"\d+", str(count)) and 2 <= int(str(count)) <= tasks
    return int(str(count)) if is_size else None


def _draws_of(draws: object) -> int | None:
    """Return the number in `10 draws`, 0 without draws; None if it is not a number from 1 up."""
    if draws == "":
        return 0
    written = re.fullmatch(r"(\d+)( draws?)?", str(draws))
    return (int(written[1]) or None) if written else None


def _drawn(wanted: int, size: int, tasks: int) -> int:
    """Return how many groups are drawn at random; 0 for the group of all experts, which drawn is the same."""
    most = math.comb(tasks, size)
    if most < wanted:
        groups = "1 different group" if most == 1 else f"{most} different groups"
        sentence = "counts: %d experts have only %s of %d, so the study takes each once instead of %d draws"
        log.warning(sentence, tasks, groups, size, wanted)
    return 0 if size == tasks else min(wanted, most)


def _check_names(study: Study) -> None:
    names = [study.joint_name(kind, seed) for seed in study.seeds for kind in {MULTITASK: None, **study.joint}]
    for seed, kind in itertools.product(study.seeds, study.experts):
        names += [study.name(kind, task, seed) for task in study.held_in]
        names += [study.combined_name(way.kept_as, kind, way.name, seed) for way in study.merges[kind]]
        small = [way for way in study.merges[kind] if isinstance(way, Apart)]
        names += [name for way in small for name in way.names(study, kind, study.held_in, seed)]
    for name, count in Counter(map(check_name, names)).items():
        if count > 1:
            raise ValueError(f"two experts would have the name {name} in the library; rename a kind, a task or a merge")
