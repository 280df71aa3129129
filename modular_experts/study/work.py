"""Do the pieces of a study in a process of their own: train an expert, take statistics, test.

A piece leaves its expert in the library and returns what its line of `pieces.jsonl` holds. The same settings give the
same numbers, whatever ran before in the process.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.base.base import DType
from modular_experts.base.device import device
from modular_experts.data import Task, TaskMixture
from modular_experts.deltas import Delta
from modular_experts.evaluation import measure, text_metrics
from modular_experts.evaluation.compare import EXAMPLES
from modular_experts.injection import context_length
from modular_experts.injection.attach import attached
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.compatibility import put_beside
from modular_experts.library.described import trust
from modular_experts.library.record import Record
from modular_experts.library.result_key import named_contents, result_key
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.statistics import take_statistics
from modular_experts.reports.results import Facts
from modular_experts.study.lightning import run_of
from modular_experts.study.parser import make
from modular_experts.study.plan import Measure, Study
from modular_experts.study.short_forms import stored_in
from modular_experts.training.fit import estimate_run, quiet, run_fit
from modular_experts.training.log_progress import lines_shown

LONG = 60.0
"""Seconds of a training from which on it prints lines of its own."""
# A training inside of a study writes its expert and nothing else, unless its config asks for more.
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def do(work: Callable[..., Facts], study: Study, *arguments: object) -> Facts:
    """Do a piece, and return its result with the seconds that it took."""
    started = time.perf_counter()
    trust(*study.trust)
    return {**work(study, *arguments), "seconds": time.perf_counter() - started}


def train(study: Study, out: Path, configs: Sequence[Facts], tasks: Sequence[str], name: str, seed: int) -> Facts:
    """Train an expert on held-in tasks, as `modular-experts fit` does, and put it into the library."""
    started = time.perf_counter()
    target = out / "library" / name
    layers = training_settings(study, out / "runs" / name, configs, tasks, seed)

    def show(line: str, share: float) -> None:
        # On a terminal the bar of the study has the last line.
        if time.perf_counter() - started >= share * LONG and not sys.stderr.isatty():
            print(f"training {name}: {line}", file=sys.stderr, flush=True)

    with lines_shown(show), quiet():
        run = run_of([*layers, {"out": str(target), "overwrite": True}])
        try:
            run_fit(run)
        finally:
            run.release()
    return about_expert(open_expert(target))


def put(study: Study, out: Path, place: Path, name: str) -> Facts:
    """Put an expert that is there into the library, instead of a training."""
    return about_expert(put_beside(open_expert(place), out / "library" / name, overwrite=True))


def training_settings(
    study: Study, place: Path, configs: Sequence[Facts], tasks: Sequence[str], seed: int
) -> list[Facts]:
    """Return the configs of a training, of which a later one beats those before it; its files go to `place`."""
    own = {
        "seed_everything": seed,
        "model": {"base": study.base},
        "data": study.data | {"tasks": [study.held_in[task] for task in tasks]},
        "trainer": {"default_root_dir": str(place)},
    }
    return [{"trainer": QUIET, "model": {"dtype": study.dtype}}, *configs, own]


def training_bytes(study: Study, out: Path, configs: Sequence[Facts]) -> int:
    """Return what a training takes in memory beside imported packages, as shapes predict it; 0 where they cannot."""
    if stored_in(configs):
        return 0
    task = next(iter(study.held_in))
    layers = training_settings(study, out / "runs", configs, [task], study.seeds[0])
    try:
        with quiet():
            estimate = estimate_run(lambda changed: run_of([*layers, changed]), sys.maxsize)
        return estimate.peak - estimate.bytes["Python and its libraries"]
    except ValueError:  # a base or an expert of which shapes do not tell it
        return 0


def take(study: Study, out: Path, kind: str, of: str, seed: int) -> Facts:
    """Take statistics of all experts of a kind on validation rows of their own tasks."""
    experts = [out / "library" / study.name(kind, task, seed) for task in study.held_in]
    data = ChoiceRows(tasks_of(study, study.held_in), **study.data)
    stored = take_statistics(experts, of, ValidationRows(data, 256, study.base), overwrite=True)
    files = [str(statistics.file.relative_to(out / "library")) for statistics in stored]
    return {"files": files, "made_of": hashes(map(open_expert, experts))}


def measure_experts(study: Study, out: Path, kind: str, name: str, seed: int) -> Facts:
    """Measure the experts of a kind by a function of the user's, which returns a number for each."""
    experts = [open_expert(out / "library" / study.name(kind, task, seed)) for task in study.held_in]
    function: Measure = make("`measures=`", dict[str, Measure], {name: study.measures[name]})[name]
    values = map(float, function(experts))
    about: dict[str, object] = dict.fromkeys(("merge", "count", "group", "interval"))
    about |= {"kind": kind, "seed": seed, "role": "held_in", "own": True, "metric": name}
    rows = [
        {"model": expert.name, "experts": [expert.name], "task": task, "value": value, **about}
        for expert, task, value in zip(experts, study.held_in, values, strict=True)
    ]
    return {"rows": rows, "made_of": hashes(experts)}


def test(study: Study, out: Path, title: str, experts: Sequence[str], tasks: Sequence[str], about: Facts) -> Facts:
    """Test the base, or the base with experts of the library, on tasks."""
    opened = [open_expert(out / "library" / name) for name in experts]
    model = {"made_of": hashes(opened), "model": title, "experts": [*experts], "own": []}
    return {**measured(study, opened, tasks), **model, **about}


class ChoiceRows(TaskMixture):
    """The rows on which settings may be chosen: it gives no test row, and takes no held-out task."""

    def __init__(self, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase | None = None, **reading: Any) -> None:
        if held_out := [task.name for task in tasks if not task.held_in]:
            raise ValueError(f"{held_out[0]} is held out, and must not choose anything; give held-in tasks")
        super().__init__(tasks, tokenizer, **reading)

    def setup(self, stage: str | None = None) -> None:
        if stage not in ("fit", "validate"):
            raise ValueError(f"stage={stage!r} reads test rows, which must not choose anything; take 'validate'")
        super().setup(stage)


Put = Callable[[PreTrainedModel], AbstractContextManager[object]]
"""Puts experts in place otherwise than by adding them up, until the end of a `with` block."""


def measured(
    study: Study,
    experts: Sequence[Mapping[str, Delta]],
    tasks: Sequence[str],
    put: Put | None = None,
) -> Record:
    """Test the base with experts, in place on the one model of this process; afterwards it is the base bit for bit.

    Beside the scores this returns the value of every row for each text metric, by task. `put` puts the experts in place
    otherwise than by adding them up.
    """
    model, tokenizer = loaded(study.base, study.dtype)
    data = shared_rows(study, TaskMixture, study.tasks, study.data.get("eval_limit")).only(tasks)
    data.setup("test")
    began = time.perf_counter()
    with put(model) if put else attached(model, experts, check=False):
        switched = time.perf_counter() - began
        data.fit_context(context_length(model))
        metrics = text_metrics(study.metrics)
        scores = measure(
            model, tokenizer, data.test_dataloader(), data.roles, study.max_new_tokens, metrics, EXAMPLES, True
        )
        began = time.perf_counter()
    switched += time.perf_counter() - began
    answers = scores.pop("examples")
    values = scores.pop("values")
    return {"scores": scores, "values": values, "answers": answers, "switch_seconds": switched}


def loaded(base: str, dtype: DType) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base and its tokenizer, which a process loads once, and again when its files have changed."""
    return load(base, dtype, Base.open(base).identity)


@lru_cache(1)
def load(base: str, dtype: DType, identity: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base of this identity, and its tokenizer."""
    opened = Base.open(base)
    model: Any = opened.load(dtype)
    return model.to(device()), opened.tokenizer()


_MIXTURES: dict[tuple[type[TaskMixture], str], TaskMixture] = {}


def shared_rows(study: Study, kind: type[TaskMixture], tasks: Iterable[str], limit: int | None) -> TaskMixture:
    """Return the mixture from which pieces take their tasks, so that a process reads and tokenises each task once."""
    key = result_key(Base.open(study.base).identity, study.data, limit, study.settings_of(tasks))
    if (kind, key) not in _MIXTURES:
        model, tokenizer = loaded(study.base, study.dtype)
        _MIXTURES[kind, key] = kind(tasks_of(study, tasks), tokenizer, **study.data | {"eval_limit": limit})
        _MIXTURES[kind, key].fit_context(context_length(model))
    return _MIXTURES[kind, key]


def warn_of_copies(study: Study) -> None:
    """Log which test rows of task files are also training rows; the processes of pieces keep such sentences."""
    for name in study.held_in:
        if study.tasks[name].get("path"):
            with suppress(ValueError):  # a piece that reads a bad row fails with the sentence on it
                TaskMixture(tasks_of(study, [name]), **study.data).rows("test")


def check_templates(study: Study) -> None:
    """Raise ValueError if tasks need a chat template that the base's tokenizer lacks, so that nothing runs in vain."""
    for of_seed in [study.at(seed) for seed in study.seeds]:
        if Base.open(of_seed.base).tokenizer().chat_template is None:
            _refuse_chats(of_seed)


def _refuse_chats(study: Study) -> None:
    advice = "take a base with one, such as its instruction-tuned sibling"
    if study.data.get("chat_template"):
        raise ValueError(f"data.chat_template is set, but the tokenizer of {study.base} has no chat template; {advice}")
    for name, settings in study.tasks.items():
        if not settings.get("path"):
            continue
        try:
            rows, _ = tasks_of(study, [name])[0].read()
        except ValueError:
            continue  # a piece that reads the task fails with this sentence
        if rows and rows[0].messages:
            raise ValueError(
                f"the rows of {name} are conversations, and the tokenizer of {study.base} has no chat template; "
                f"{advice}, or rows of input and target"
            )


def tasks_of(study: Study, names: Iterable[str]) -> list[Task]:
    return [made("`tasks=`", list[Task], [study.tasks[name]])[0] for name in names]


def made(option: str, kind: Any, settings: object) -> Any:
    """Return the immutable object of settings, once in a process, because reading them takes 10 ms."""
    return _made(option, kind, json.dumps(settings), json.dumps(named_contents(settings)))


@cache
def _made(option: str, kind: Any, settings: str, contents: str) -> Any:
    return make(option, kind, json.loads(settings))


def hashes(experts: Iterable[StoredExpert]) -> dict[str, str]:
    """Return the content hash of each expert by its name: what a result counts for."""
    return {expert.name: expert.content_hash for expert in experts}


def about_expert(expert: StoredExpert) -> Facts:
    """Return what the line of a piece holds of the expert that it put into the library."""
    about = {"name": expert.name, "content_hash": expert.content_hash, "bytes": expert.size_on_disk}
    if expert.mergeable:
        about["kept"] = expert.kept_share
    return {"expert": about}
