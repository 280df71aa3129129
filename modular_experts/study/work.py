"""Do one piece of a study: train an expert, take statistics, or combine experts and test.

Pieces run in processes of their own, in any order, and several after each other in one process, which loads the base
and the rows once. A piece leaves its expert in the library and returns what its line of `pieces.jsonl` holds. The same
settings give the same numbers, whatever ran before in the process.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.base.base import DType
from modular_experts.callbacks.progress import lines_shown
from modular_experts.data import Task, TaskMixture
from modular_experts.deltas import Delta
from modular_experts.evaluation import measure, text_metrics
from modular_experts.evaluation.scores import TextMetric
from modular_experts.injection import context_length
from modular_experts.injection.attach import attached
from modular_experts.injection.ensemble import ensembled
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.described import describe, trust
from modular_experts.merger.merged import Merged, write_merged
from modular_experts.methods import MergeMethod
from modular_experts.methods.wrapper import with_settings
from modular_experts.routing import Router
from modular_experts.settings import SHORT_NAMES, folded
from modular_experts.settings.read import make
from modular_experts.statistics import take_statistics
from modular_experts.study.merges import Ensemble, Merge, Route
from modular_experts.study.settings import Measure, Study
from modular_experts.training.fit import estimate_fit, fit
from modular_experts.training.route import route
from modular_experts.training.settings import read_run
from modular_experts.tuning import CoefficientSearch, Objective, ValidationRows, search
from modular_experts.tuning.tune import notes_of, tune_groups

EXAMPLES = 3  # test rows of each task whose answers are kept
EVERY_ROW = 10**9
LONG = 60.0
"""Seconds of a training from which on it prints lines of its own."""
# A training inside of a study writes its expert and nothing else, unless its config asks for more.
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@dataclass(frozen=True)
class Group:
    """Experts of a kind and a seed that are combined, and the tasks that the combination is tested on.

    Attributes:
        kind: The kind of the experts.
        seed: The seed of their trainings.
        number: The number of the group among the groups of its size.
        own: The held-in tasks of the experts.
        tested: The tasks of the test.
        is_whole: Whether these are all experts of the kind.
    """

    kind: str
    seed: int
    number: int
    own: Sequence[str]
    tested: Sequence[str]
    is_whole: bool

    def experts(self, study: Study, out: Path) -> list[StoredExpert]:
        """Open the experts in the library of a study."""
        return [open_expert(out / "library" / study.name(self.kind, task, self.seed)) for task in self.own]


def train(
    study: Study, out: Path, configs: Sequence[Mapping[str, Any]], tasks: Sequence[str], name: str, seed: int
) -> dict[str, Any]:
    """Train an expert on held-in tasks, as `modular-experts fit` does, and put it into the library."""
    started = time.perf_counter()
    trust(*study.trust)
    target = out / "library" / name
    settings = training_settings(study, out / "runs" / name, configs, tasks, seed)

    def show(line: str, share: float) -> None:
        # On a terminal the bar of the study has the last line.
        if time.perf_counter() - started >= share * LONG and not sys.stderr.isatty():
            print(f"training {name}: {line}", file=sys.stderr, flush=True)

    with lines_shown(show):
        fit(**read_run(settings | {"out": str(target), "overwrite": True}).make())
    return _about(open_expert(target)) | {"seconds": time.perf_counter() - started}


def estimate(
    study: Study, out: Path, configs: Sequence[Mapping[str, Any]], tasks: Sequence[str], name: str, seed: int
) -> dict[str, Any]:
    """Return what `train` of the same arguments would take, by a few steps that change nothing."""
    found = estimate_fit(**read_run(training_settings(study, out, configs, tasks, seed)).make())
    return {"seconds": sum(found.seconds.values()), "expert": {"bytes": found.on_disk}, "memory": found.peak}


def training_settings(
    study: Study, place: Path, configs: Sequence[Mapping[str, Any]], tasks: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return the settings of a training, where a later config beats those before it; its files go to `place`."""
    own = {
        "seed_everything": seed,
        "model": {"base": study.base},
        "data": study.data | {"tasks": [study.held_in[task] for task in tasks]},
        "trainer": {"default_root_dir": str(place)},
    }
    every = [{"trainer": QUIET, "model": {"dtype": study.dtype}}, *configs, own]
    return folded([("the config", one) for one in every], short=SHORT_NAMES)


def take(study: Study, out: Path, kind: str, of: str, seed: int) -> dict[str, Any]:
    """Take statistics of all experts of a kind on validation rows of their own tasks."""
    started = time.perf_counter()
    experts = [out / "library" / study.name(kind, task, seed) for task in study.held_in]
    data = ChoiceRows(_tasks(study, study.held_in), **study.data)
    stored = take_statistics(experts, of, ValidationRows(data, 256, study.base), overwrite=True)  # type: ignore[arg-type]
    files = [str(one.file.relative_to(out / "library")) for one in stored]
    made_of = {expert.name: expert.content_hash for expert in map(open_expert, experts)}
    return {"files": files, "made_of": made_of, "seconds": time.perf_counter() - started}


def measure_experts(study: Study, out: Path, kind: str, name: str, seed: int) -> dict[str, Any]:
    """Measure the experts of a kind by a function of the user's, which returns a number for each."""
    started = time.perf_counter()
    experts = [open_expert(out / "library" / study.name(kind, task, seed)) for task in study.held_in]
    values = [float(one) for one in make("--measures", dict[str, Measure], {name: study.measures[name]})[name](experts)]
    about = dict.fromkeys(("merge", "count", "group", "interval"))
    about |= {"kind": kind, "seed": seed, "role": "held_in", "own": True, "metric": name}
    rows = [
        {"model": expert.name, "experts": [expert.name], "task": task, "value": value, **about}
        for expert, task, value in zip(experts, study.held_in, values, strict=True)
    ]
    made_of = {expert.name: expert.content_hash for expert in experts}
    return {"rows": rows, "made_of": made_of, "seconds": time.perf_counter() - started}


def choose(study: Study, out: Path, merge: Merge, groups: Sequence[Group]) -> dict[str, Any]:
    """Choose the settings of a merge method, which all groups of a count share, on validation rows of their tasks."""
    started = time.perf_counter()
    assert merge.tune is not None
    model, _ = loaded(study.base, study.dtype)
    rows = min(merge.rows, study.data.get("eval_limit") or merge.rows)
    data = _shared_rows(study, ChoiceRows, study.held_in, rows)
    parts = [(group.experts(study, out), Objective(model, data.only(group.own))) for group in groups]
    method, grid = _made("--merges", MergeMethod, json.dumps(merge.method)), merge.tune.get("grid")
    trials, best = tune_groups(parts, method, grid, folder=out / "library")
    found = {"settings": best.settings, "trials": [{**trial.settings, "loss": trial.loss} for trial in trials]}
    return found | {"notes": notes_of(trials, best, rows, {}), "seconds": time.perf_counter() - started}


def test(
    study: Study, out: Path, title: str, experts: Sequence[str], tasks: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Test the base, or the base with experts of the library, on tasks."""
    started = time.perf_counter()
    found = _measured(study, [open_expert(out / "library" / name) for name in experts], tasks)
    return found | {"model": title, "experts": [*experts], "own": [], **about, "seconds": time.perf_counter() - started}


def merge_and_test(
    study: Study, out: Path, merge: Merge, group: Group, chosen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Merge a group of experts and test the merge; the merge of all experts is also put into the library.

    Coefficients are searched on validation rows of the group's own tasks alone; `chosen` comes from `choose`.
    """
    started = time.perf_counter()
    target = out / "library" / study.merge_name(group.kind, merge.name, group.seed)
    # A stored merge of a few can be as large as the base, so it takes the disk of the library, under a hidden name.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        place = target if group.is_whole else Path(folder, target.name)
        merged, settings = _merged(study, merge, group.experts(study, out), group, place, chosen, group.is_whole)
        seconds = time.perf_counter() - started
        found = _measured(study, [merged], group.tested)
    found |= {"settings": settings, "merge_seconds": seconds}
    found |= _about(merged) if group.is_whole and isinstance(merged, StoredExpert) else {}
    return found | _of_group(study, merge.name, group, started)


def route_and_test(
    study: Study, out: Path, wanted: Route, group: Group, chosen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put a group of experts behind a router and test it; the route of all experts is also put into the library.

    A router learns from validation and training rows of the experts' own tasks, if it reads any. `chosen` comes from
    `choose` for the fallback.
    """
    started = time.perf_counter()
    library, experts = out / "library", group.experts(study, out)
    router, fallback, made = make("--merges", Router, wanted.router), None, list[Path]()
    # A routed expert must lie beside its experts, so the route of a few experts is in the library while it is tested.
    place = library / study.route_name(group.kind, wanted.name, group.seed)
    if not group.is_whole:
        place = place.with_name(f"{place.name}-{len(group.own)}-{group.number}")
    try:
        if wanted.fallback and group.is_whole:
            fallback = library / study.merge_name(group.kind, wanted.fallback.name, group.seed)
        elif wanted.fallback:
            fallback = place.with_name(f"{place.name}-fallback")
            made.append(fallback)
            _merged(study, wanted.fallback, experts, group, fallback, chosen, written=True)
        made += [] if group.is_whole else [place]
        routed = route(experts, place, router, fallback, overwrite=True)
        seconds = time.perf_counter() - started
        found = _measured(study, [routed], group.tested)
        found |= {"settings": routed.record["hyperparameters"], "merge_seconds": seconds}
        found |= _about(routed) if group.is_whole else {}
    finally:
        for one in made:
            shutil.rmtree(one, ignore_errors=True)
    return found | _of_group(study, wanted.name, group, started)


def test_together(study: Study, out: Path, ensemble: Ensemble, group: Group) -> dict[str, Any]:
    """Test a group of experts as an ensemble, without writing it into the library."""
    started = time.perf_counter()
    experts = group.experts(study, out)
    put = partial(ensembled, experts=experts, mean=ensemble.mean, check=False)
    found = _measured(study, experts, group.tested, put)
    found |= {"settings": {"mean": ensemble.mean}, "merge_seconds": 0.0}
    return found | _of_group(study, ensemble.name, group, started)


def _of_group(study: Study, name: str, group: Group, started: float) -> dict[str, Any]:
    kind, count = group.kind, len(group.own)
    title = f"{kind} {name}" + ("" if group.is_whole else f" of {count}, group {group.number}")
    experts = [study.name(kind, task, group.seed) for task in group.own]
    # In the order of the study, because the order of a group is drawn.
    own = [task for task in study.held_in if task in group.own]
    about = {"model": title, "experts": experts, "kind": kind, "merge": name, "own": own, "count": count}
    return about | {"group": group.number, "seed": group.seed, "seconds": time.perf_counter() - started}


def _merged(
    study: Study,
    merge: Merge,
    experts: Sequence[StoredExpert],
    group: Group,
    place: Path,
    chosen: Mapping[str, Any] | None,
    written: bool,
) -> tuple[Mapping[str, Delta], dict[str, Any]]:
    """Return a merge, which is stored at `place` if it was searched or shall be written, and its chosen settings."""
    paths = [expert.path for expert in experts]
    if merge.searched:
        starts = [make("--merges", MergeMethod, start) for start in merge.merges]
        data = ChoiceRows(_tasks(study, group.own), **study.data)
        rows = ValidationRows(data, merge.rows, study.base, merge.labels)
        if merge.labels == "experts":
            rows = replace(rows, max_new_tokens=study.max_new_tokens)
        done = search(paths, make("--merges", CoefficientSearch, merge.method), rows, place, starts, overwrite=True)
        return done.expert, {"coefficients": done.found.coefficients.mean(0).tolist()}
    chosen = chosen or {"settings": {}, "notes": None}
    method = with_settings(_made("--merges", MergeMethod, json.dumps(merge.method)), chosen["settings"])
    merged = Merged(experts, method)
    settings = chosen["settings"] or describe(method)
    return (write_merged(merged, place, True, notes=chosen["notes"]) if written else dict(merged.items())), settings


class ChoiceRows(TaskMixture):
    """The rows on which settings may be chosen: it gives no test row, and takes no held-out task."""

    def __init__(self, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase | None = None, **reading: Any) -> None:
        if held_out := [task.name for task in tasks if not task.held_in]:
            raise ValueError(
                f"{held_out[0]} is held out, and a held-out task must not choose anything; give held-in tasks"
            )
        super().__init__(tasks, tokenizer, **reading)

    def setup(self, stage: str | None = None) -> None:
        if stage not in ("fit", "validate"):
            raise ValueError(
                f"stage={stage!r} reads test rows, and a test row must not choose anything; take 'validate'"
            )
        super().setup(stage)


def _measured(
    study: Study,
    experts: Sequence[Mapping[str, Delta]],
    tasks: Sequence[str],
    put: Callable[[PreTrainedModel], AbstractContextManager[Any]] | None = None,
) -> dict[str, Any]:
    """Test the base with experts, in place on the one model of this process; afterwards it is the base bit for bit.

    By default the experts are added up; `put` does something else with them.
    Beside the scores this returns the value of every row for each text metric, by task, for intervals.
    """
    trust(*study.trust)
    model, tokenizer = loaded(study.base, study.dtype)
    data = test_rows(study, tasks)
    began = time.perf_counter()
    with put(model) if put else attached(model, experts, check=False):
        switched = time.perf_counter() - began
        data.fit_context(context_length(model))
        metrics = text_metrics(_made("--metrics", dict[str, TextMetric], json.dumps(study.metrics)))
        batches = data.test_dataloader()
        scores = measure(model, tokenizer, batches, data.roles, study.max_new_tokens, metrics, examples=EVERY_ROW)
        began = time.perf_counter()
    switched += time.perf_counter() - began
    answers = scores.pop("examples")
    values = {task: _values(rows, metrics) for task, rows in answers.items()}
    kept = {task: rows[:EXAMPLES] for task, rows in answers.items()}
    return {"scores": scores, "values": values, "answers": kept, "switch_seconds": switched}


def _values(rows: Sequence[Mapping[str, str]], metrics: Mapping[str, TextMetric]) -> dict[str, list[float]]:
    return {name: [round(of(row["answer"], row["target"]), 6) for row in rows] for name, of in metrics.items()}


def loaded(base: str, dtype: DType) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base and its tokenizer, which a process loads once, and again when its files have changed."""
    return load(base, dtype, Base.open(base).identity)


@lru_cache(1)
def load(base: str, dtype: DType, identity: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base of this identity, and its tokenizer."""
    opened = Base.open(base)
    model: Any = opened.load(dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), opened.tokenizer()


def test_rows(study: Study, tasks: Sequence[str]) -> TaskMixture:
    """Return the test rows of tasks, which a process reads and tokenises once."""
    data = _shared_rows(study, TaskMixture, study.tasks, study.data.get("eval_limit")).only(tasks)
    data.setup("test")
    return data


_MIXTURES: dict[Any, TaskMixture] = {}


def _shared_rows(study: Study, kind: type[TaskMixture], tasks: Iterable[str], limit: int | None) -> TaskMixture:
    """Return the mixture from which pieces take their tasks, so that a process reads and tokenises each task once."""
    key = json.dumps([Base.open(study.base).identity, study.data, limit, study.seen(tasks)])
    if (kind, key) not in _MIXTURES:
        model, tokenizer = loaded(study.base, study.dtype)
        _MIXTURES[kind, key] = kind(_tasks(study, tasks), tokenizer, **study.data | {"eval_limit": limit})
        _MIXTURES[kind, key].fit_context(context_length(model))
    return _MIXTURES[kind, key]


def warn_of_copies(study: Study) -> None:
    """Log which test rows of task files are also training rows; the processes of pieces keep such sentences."""
    for name in study.held_in:
        if study.tasks[name].get("path"):
            with suppress(ValueError):  # a piece that reads a bad row fails with the sentence on it
                TaskMixture(_tasks(study, [name]), **study.data).rows("test")


def _tasks(study: Study, names: Iterable[str]) -> list[Task]:
    return [_made("--tasks", list[Task], json.dumps([study.tasks[name]]))[0] for name in names]


@cache
def _made(option: str, kind: Any, settings: str) -> Any:
    """Return the immutable object of settings in JSON, once in a process, because reading them takes 10 ms."""
    return make(option, kind, json.loads(settings))


def _about(expert: StoredExpert) -> dict[str, Any]:
    found = {"name": expert.name, "content_hash": expert.content_hash, "bytes": expert.size_on_disk}
    return {"expert": found | ({"kept": expert.kept_share} if expert.mergeable else {})}
