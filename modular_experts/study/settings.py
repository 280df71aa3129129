"""Read what a study shall do from settings, and check all of it before anything runs.

The settings are those of `modular-experts study`, plain values as a YAML file holds them. Processes that do a piece of
the work get the same values, and make objects of them where they need some.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from modular_experts.base.base import DType
from modular_experts.data.tasks import NAME, Task
from modular_experts.evaluation import text_metrics
from modular_experts.evaluation.scores import TextMetric
from modular_experts.library import check_name
from modular_experts.settings.make import check_fit, make, plain
from modular_experts.study.merges import Combination, Entry, Route, check_kinds, read_entry
from modular_experts.study.published import SINGLE, Published, read_published
from modular_experts.text import did_you_mean

log = logging.getLogger(__name__)

MULTITASK, BASE = "multitask", "base"
RESERVED = (MULTITASK, BASE, "merge", "route")
DATA = ("max_length", "validation_ratio", "test_ratio", "split_seed", "eval_limit", "chat_template", "eval_batch_size")
"""Settings of `TaskMixture` that hold for the training and for every measurement alike."""


@dataclass(frozen=True)
class Study:
    """Everything that a study does, as plain values.

    Attributes:
        base: The directory or hub id of the base.
        held_in: Settings of the tasks that get experts, by name.
        held_out: Settings of the tasks that are only tested, by name.
        contents: A hash of the files of each task, by name; empty for rows from elsewhere.
        experts: For each kind of expert the configs of its fit, of which a later one wins.
        merges: For each kind of expert its merges, routes and ensembles.
        counts: How many experts are merged; the largest is the number of held-in tasks if `all` of them are.
        draws: For each count whose groups are random, how many there are; the groups of other counts are disjoint.
        multitask: The configs of the fit of one expert on all held-in tasks, or None.
        matrix: Whether every model is tested on every task.
        seeds: Seeds of the trainings.
        data: How rows are read, in training and tests: the settings of `DATA`.
        max_new_tokens: Length limit of a generated answer.
        metrics: Dotted paths of the text metrics that stand beside exact match and Rouge-L, or in their place, by name.
        dtype: Data type of the base, in trainings (unless the configs of a kind set another) and in tests.
        needs: The kinds of statistics that each merge needs, by its name.
        published: Figures of others for models of this study, which its tables show beside ours.
    """

    base: str
    held_in: dict[str, dict[str, Any]]
    held_out: dict[str, dict[str, Any]]
    contents: dict[str, str]
    experts: dict[str, list[dict[str, Any]]]
    merges: dict[str, tuple[Combination, ...]]
    counts: tuple[int, ...]
    multitask: list[dict[str, Any]] | None
    matrix: bool
    seeds: tuple[int, ...]
    data: dict[str, Any]
    max_new_tokens: int
    dtype: DType
    metrics: dict[str, str] = field(default_factory=dict)
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    draws: dict[int, int] = field(default_factory=dict)
    published: Published | None = None

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Settings of all tasks by name, those that get experts first."""
        return {**self.held_in, **self.held_out}

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

    def multitask_name(self, seed: int) -> str:
        """Return the name in the library of the multitask expert."""
        return f"{MULTITASK}{self._of(seed)}"

    def _of(self, seed: int) -> str:
        return f"-seed{seed}" if len(self.seeds) > 1 else ""


def read_study(
    base: str | Path,
    tasks: Any,
    experts: Mapping[str, Any],
    merges: Sequence[Any] = (),
    counts: Sequence[Any] | Mapping[Any, Any] = ("all",),
    multitask: Mapping[str, Any] | None = None,
    matrix: bool = False,
    seeds: Sequence[int] = (0,),
    data: Mapping[str, Any] | None = None,
    fit: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    published: Mapping[str, Any] | None = None,
    dtype: DType = "float32",
    metrics: Mapping[str, Any] | None = None,
) -> Study:
    """Check the settings of a study, and return them with every short form spelt out.

    The arguments are those of `modular-experts study`. Where they name a class, the class itself may stand, or
    `partial(LoRAExpert, rank=4)`, an object of a merge method, or a `Task`.

    Raises:
        ValueError: Something does not fit; nothing has run.
    """
    base, tasks, experts, merges, multitask, fit, metrics = map(
        plain, (base, tasks, experts, merges, multitask, fit, metrics or {})
    )
    for name, listed in {"merges": merges, "counts": counts, "seeds": seeds}.items():
        if isinstance(listed, str | int) or (isinstance(listed, Mapping) and name != "counts"):
            raise ValueError(f"{name}={listed!r} must be a list, such as [{listed!r}]")
    held_in, held_out = _tasks(tasks)
    for key in data or {}:
        if key not in DATA:
            near = did_you_mean(key, DATA) or f"; they are {', '.join(DATA)}"
            raise ValueError(f"data.{key} is not a setting of how the rows of a study are read{near}")
    check = partial(_check_fit, base=base, data={**(data or {}), "tasks": [next(iter(held_in.values()))]})
    shared = "fit and " if fit else ""
    kinds = {kind: _configs(kind, settings, fit) for kind, settings in experts.items()}
    if not kinds:
        raise ValueError("a study needs a kind of expert, such as experts: {lora: {expert: LoRAExpert, steps: 200}}")
    for kind, configs in kinds.items():
        if not NAME.fullmatch(kind) or kind in RESERVED:
            raise ValueError(f"{kind!r} cannot name a kind of experts; use letters, digits, '-', '_', not {RESERVED}")
        check(f"{shared}experts.{kind}", configs)
    found: dict[str, Entry] = {}
    for given in merges:
        entry = read_entry(given, found, kinds)
        if entry.merge.name in found:
            name = entry.merge.name
            raise ValueError(f"two merges are called {name!r}; name one of them: {{method: {name}, name: mine}}")
        found[entry.merge.name] = entry
    whole = None
    if multitask is not None:
        own = {name: value for name, value in multitask.items() if name != "kind"}
        if "kind" in multitask:
            check_kinds("multitask", [multitask["kind"]], kinds)
            whole = [*kinds[multitask["kind"]], *[own] * bool(own)]
        else:
            whole = _configs("multitask", own, fit)
        check("multitask", whole)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)} must be one or more different numbers, such as [0, 1, 2]")
    if dtype not in get_args(DType):
        near = did_you_mean(str(dtype), get_args(DType)) or f"; they are {', '.join(get_args(DType))}"
        raise ValueError(f"dtype={dtype!r} is not a data type of a base{near}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1 token of an answer")
    text_metrics(make(dict[str, TextMetric], {**metrics}))
    sizes, draws = _counts(counts, len(held_in))
    study = Study(
        base=str(base),
        held_in=held_in,
        held_out=held_out,
        contents={name: _content(name, task) for name, task in {**held_in, **held_out}.items()},
        experts=kinds,
        merges={kind: tuple(entry.merge for entry in found.values() if kind in entry.kinds) for kind in kinds},
        counts=sizes,
        draws=draws,
        multitask=whole,
        matrix=matrix,
        seeds=tuple(seeds),
        data=dict(data or {}),
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        metrics={**metrics},
        needs={name: entry.needs for name, entry in found.items()},
        published=read_published(published, _models(kinds, found, whole)) if published else None,
    )
    if "merged_gram" in {kind for needs in study.needs.values() for kind in needs} and study.counts != (len(held_in),):
        raise ValueError("RegMeanPlusPlus is measured for one merge of all experts; give counts: [all]")
    _check_names(study)
    return study


def _models(kinds: Iterable[str], merges: Mapping[str, Entry], multitask: Any) -> list[str]:
    """Return the names of the models of a study as its tables name them, of merges those of all experts."""
    singles = [f"{kind}{SINGLE}" for kind in kinds]
    merged = [f"{kind} {name}" for name, entry in merges.items() for kind in entry.kinds]
    return [BASE, *singles, *merged, *([MULTITASK] if multitask else [])]


def _check_fit(of: str, configs: Sequence[Mapping[str, Any]], base: Any, data: Mapping[str, Any]) -> None:
    """Raise ValueError if the configs of a fit, or how all rows are read, have settings that do not fit."""
    try:
        check_fit([*configs, {"model": {"base": base}, "data": data}])
    except ValueError as error:
        raise ValueError(f"{of}: {error}") from error


def _check_names(study: Study) -> None:
    """Raise ValueError if the library cannot take the name of an expert, or two experts would have the same."""
    names = [study.multitask_name(seed) for seed in study.seeds]
    for seed, kind in itertools.product(study.seeds, study.experts):
        names += [study.name(kind, task, seed) for task in study.held_in]
        for merge in study.merges[kind]:
            named = study.route_name if isinstance(merge, Route) else study.merge_name
            names.append(named(kind, merge.name, seed))
    for name, count in Counter(map(check_name, names)).items():
        if count > 1:
            raise ValueError(f"two experts would have the name {name} in the library; rename a kind, a task or a merge")


def _tasks(tasks: Any) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the settings of the tasks of each role by name, every short form spelt out."""
    found: dict[str, dict[str, dict[str, Any]]] = {"held_in": {}, "held_out": {}}
    roles = tasks if isinstance(tasks, Mapping) and set(tasks) <= set(found) else {"held_in": tasks}
    for key in tasks if roles is not tasks and isinstance(tasks, Mapping) else ():
        near = did_you_mean(key, found)
        if key not in found and (near or {*found} & {*tasks}):
            raise ValueError(f"tasks.{key} is neither held_in nor held_out{near}")
    for role, listed in roles.items():
        for entry in [listed] if isinstance(listed, str | Mapping) else listed or []:
            for one in _several(entry) if isinstance(entry, str) else [dict(entry)]:
                (task,) = make(list[Task], [one | {"role": role}])
                if task.name in found["held_in"] or task.name in found["held_out"]:
                    raise ValueError(
                        f"two tasks have the name {task.name!r}; results are kept by name, so name one of them: "
                        f"{{name: {task.name}-2, ...}}"
                    )
                found[role][task.name] = one | {"name": task.name, "role": role}
    if not found["held_in"]:
        raise ValueError("a study needs tasks that get experts, such as tasks: {held_in: tasks/*.jsonl}")
    return found["held_in"], found["held_out"]


def _content(name: str, task: Mapping[str, Any]) -> str:
    """Return a hash of a task's file, or of the files of its directory."""
    if task.get("path") is None:
        return ""
    path, found = Path(task["path"]), hashlib.sha256()
    if not path.exists():
        raise ValueError(f"task {name!r}: there is no file {path}; the path starts from the current directory")
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def _several(word: str) -> list[dict[str, Any]]:
    """Return the tasks that a word means: the files of a pattern, a file, a hub id, or a task of the suite."""
    if any(sign in word for sign in "*?["):
        files = sorted(glob.glob(word, recursive=True))
        if not files:
            raise ValueError(f"no file matches {word!r}; the pattern starts from the current directory")
        return [{"path": file} for file in files]
    if Path(word).is_dir() and not [*Path(word).glob("dataset_*.json")]:
        raise ValueError(
            f"{word} is a directory that datasets.save_to_disk did not write; give its files: {word}/*.jsonl"
        )
    if word.isidentifier() and word[0].isupper() and not Path(word).exists():
        # The name of a task of the suite, as a class is named.
        return [{"name": re.sub(r"(?<!^)(?=[A-Z])", "-", word).lower(), "source": word}]
    is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", word) and not Path(word).suffix and not Path(word).exists()
    return [{"hub": word} if is_hub else {"path": word}]


def _configs(kind: str, settings: Any, common: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the configs of a kind's fit: what all kinds share, then its own, each a file or its contents."""
    found = [dict(common)] if common else []
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


def _counts(counts: Sequence[Any] | Mapping[Any, Any], tasks: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """Return the sizes of groups in ascending order, and of each size whose groups are random how many there are."""
    found: dict[int, int] = {}
    for entry in [counts] if isinstance(counts, Mapping) else counts:
        for count, draws in entry.items() if isinstance(entry, Mapping) else [(entry, 0)]:
            # A command line and the keys of a mapping give numbers as text.
            size = tasks if count == "all" else int(str(count)) if re.fullmatch(r"\d+", str(count)) else 0
            if count != "all" and not 2 <= size <= tasks:
                raise ValueError(
                    f"counts holds {count}; give numbers from 2 to the {tasks} held-in tasks, or `all`: [2, 5, all], "
                    "or random groups: [2: 10 draws, all]"
                )
            number = re.fullmatch(r"([1-9]\d*)( draws?)?", str(draws))
            if isinstance(entry, Mapping) and number is None:
                raise ValueError(
                    f"counts: {count} has {draws!r}; give how many random groups to draw, such as [{count}: 10 draws]"
                )
            wanted, most = int(number[1]) if number else 0, math.comb(tasks, size)
            if most < wanted:
                groups = f"{most} different group{'s' * (most > 1)}"
                sentence = "counts: %d experts have only %s of %d, so the study takes each once instead of %d draws"
                log.warning(sentence, tasks, groups, size, wanted)
                wanted = most
            # There is one group of all experts, and it is the same if it is drawn.
            wanted = 0 if size == tasks else wanted
            if found.setdefault(size, wanted) != wanted:
                raise ValueError(f"counts names {size} experts twice, with other groups; leave one of the two out")
    return tuple(sorted(found)), {size: draws for size, draws in found.items() if draws}
