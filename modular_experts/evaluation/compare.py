"""Compare a base, mixes of experts and whole checkpoints on the same rows, in one call that goes on if interrupted."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from modular_experts.base import Base, DType
from modular_experts.base.apply import AnyExpert, open_several
from modular_experts.base.device import device
from modular_experts.base.files import read_layouts
from modular_experts.data import Batch, TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.tasks import Tasks
from modular_experts.deltas import Delta
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.evaluation.comparison_page import write_comparison
from modular_experts.evaluation.forgetting import Texts, forgotten, read_texts
from modular_experts.evaluation.intervals import compared_means
from modular_experts.evaluation.measure import measure
from modular_experts.evaluation.metrics import Metrics, TextMetric, named_metrics, text_metrics
from modular_experts.injection import context_length
from modular_experts.injection.attach import attached
from modular_experts.injection.task_heads import check_task_heads
from modular_experts.language_model import is_classifier
from modular_experts.library import StoredExpert, is_adapter, warn_of_missing_parents, warn_unlike_training
from modular_experts.library.expert import stored_experts_of
from modular_experts.library.result_key import result_key
from modular_experts.places import check_free
from modular_experts.reports import Results
from modular_experts.reports.json_lines import JSONLines, Key
from modular_experts.reports.progress import progress_by_tenths
from modular_experts.reports.results import (
    Facts,
    MutableFacts,
    examples_of,
    provenance,
)

RESULTS = "results.json"
REPORT = "report.html"
MEASURED = "measured.jsonl"
AnyModel = AnyExpert | Sequence[AnyExpert] | Base
AnyModels = AnyExpert | Sequence[AnyExpert] | Mapping[str, AnyModel]
"""An expert, several that are added up, or a mapping from names of models to such, or to checkpoints."""
EXAMPLES = 3  # test rows of each task whose answers are kept


def evaluate(
    base: str | Path | Base | None,
    experts: AnyModels,
    data: TaskMixture | Tasks,
    max_new_tokens: int | None = 64,
    dtype: DType = "float32",
    metrics: Metrics | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    forgetting: str | Path | None = None,
) -> Results:
    """Measure a base with experts on the test rows of tasks, and return rows that print as a table.

    Lines on stderr, or a bar on a terminal, tell how far it is.

        evaluate("runs/base", {"base": [], "TIES": "library/ties", "sum": ["library/a", "library/b"]}, tasks)

    With `out` there are also files: `results.json`, which `Results.read` reads, `report.html`, and `measured.jsonl`,
    from which an interrupted call goes on, and a call with one more expert measures only that one.

    Args:
        base: The base's directory or hub id, or an opened base, such as `Base.open(place, revision=...)`; None is the
            one that the experts' records name. One that was opened with `quantise` is measured quantised.
        experts: An expert, or a list of experts whose deltas are added up, which may be empty; or a mapping from
            names to such, to compare several. An expert is a directory, an opened expert or a task vector. A checkpoint
            with the base's tokenizer, such as `apply` writes, may stand in the place of a mix: its directory, or an
            opened base.
        data: The tasks, or a mixture with the settings of how to read their rows; the base's tokenizer is used unless
            the mixture was given one.
        max_new_tokens: Length limit of a generated answer; None measures only losses and choices.
        dtype: Data type of the base.
        metrics: Metrics beside exact match and Rouge-L, as `text_metrics` takes them: functions of a generated text
            and its target by name, or their dotted paths, `number`, `json`, or regular expressions.
        out: Directory of the files.
        overwrite: Replace the results in `out`.
        forgetting: A file of texts on which each model's loss is measured, too: how far it rises above the base's
            tells what the model has forgotten. The base must be among the models, as `{"base": []}`.

    Raises:
        FileExistsError: `out` holds results and may not be replaced; nothing was measured.
        FileNotFoundError: The base was not found.
        ValueError: An expert was trained on another base or cannot be put into it, a checkpoint has another tokenizer,
            two models have one name, or a task has no test rows; no row was measured.
    """
    folder = None if out is None else check_free(Path(out, RESULTS), overwrite).parent
    opened, models = open_models(base, experts)
    alone = [model.title for model in models if not model.experts and not model.checkpoint]
    if forgetting is not None and not alone:
        raise ValueError(f"forgetting={str(forgetting)!r} compares with the base; add {{'base': []}} to the models")
    data = data if isinstance(data, TaskMixture) else TaskMixture(data)
    data.take_tokenizer(opened)
    data.setup("test")
    warn_unlike_training([expert for model in models for expert in model.stored], data.reading_of, dtype)
    # A function without a path may be another one in the next call, and so may a task vector that is not stored.
    named = named_metrics(metrics)
    texts = None if forgetting is None else read_texts(forgetting, data.row_tokenizer())
    known = JSONLines(folder / MEASURED) if folder and not any(map(callable, named.values())) else {}
    with progress_by_tenths(line="measuring {}: {} of {} rows{}".format, transient=True) as show:
        scores = _scores(opened, models, data, dtype, max_new_tokens, named, known, show, texts)
    facts = comparison_facts(opened, dtype, models) | {"max_new_tokens": max_new_tokens}
    if data.shots:
        facts |= {"shots": data.shots, "shots_seed": data.shots_seed}
    facts["tasks"] = {task.name: {"role": task.role, "path": task.path or task.hub} for task in data.tasks}
    facts["examples"] = examples_of([(title, own["examples"]) for title, own in scores.items()])
    rows: list[MutableFacts] = []
    for model in models:
        rows += map(dict, Results.of_scores(scores[model.title], model.title, model.names).rows)
    if texts:
        facts["forgetting"] = forgotten(texts, {title: own["texts"] for title, own in scores.items()}, alone[0])
    facts["means"] = compared_means(rows, {title: own["values"] for title, own in scores.items()})
    results = Results(rows, facts)
    if folder:
        results.write(folder / RESULTS)
        write_comparison(results, folder / REPORT)
    return results


def _scores(
    base: Base,
    models: "Sequence[Compared]",
    data: TaskMixture,
    dtype: DType,
    max_new_tokens: int | None,
    metrics: Mapping[str, TextMetric | str],
    known: MutableMapping[Key, Facts],
    show: Callable[[str, float, float], None],
    texts: Texts | None,
) -> dict[str, Facts]:
    """Return the scores of each model by its title: those that are known, and new ones, which join them."""
    examples: Sequence[Example] = data.test_dataloader().dataset.examples  # type: ignore[attr-defined]
    loaded = base.load(dtype)
    tokenizer = data.take_tokenizer(base)
    same: tuple[object, ...] = (base.identity, dtype, max_new_tokens, _digest(examples), data.roles, "values", metrics)
    # A model without a head for a task takes the head of another model.
    lent: list[StoredExpert] = []
    if is_classifier(loaded):
        lent = [expert for model in models for expert in stored_experts_of(model.experts)]
        check_task_heads(lent, list(data.roles))
        if texts:
            raise ValueError("forgetting measures losses of texts, which a classifier does not predict; leave it out")
    about_texts = [texts.digest] if texts else [expert.content_hash for expert in lent]
    functions = text_metrics(metrics)
    keys = {model.title: (result_key(*same, model.hashes, *about_texts),) for model in models}
    new = [model for model in models if keys[model.title] not in known]
    done = 0
    total = len(new) * len(examples)

    def counted(title: str) -> Iterator[Batch]:
        rows = done
        for batch in data.test_dataloader():
            show(title, rows, total)
            yield batch
            rows += len(batch["task"])

    for model in new:
        model.check(loaded)
    scores: dict[str, Facts] = {}
    for title, model in zip(keys, models, strict=True):
        # An earlier model may be the same one under another name.
        if keys[title] in known:
            scores[title] = known[keys[title]]
            continue
        with model.in_place(loaded, dtype, lent) as whole:
            data.fit_context(context_length(whole))
            batches = counted(title)
            scores[title] = measure(
                whole, tokenizer, batches, data.roles, max_new_tokens, functions, EXAMPLES, values=True
            )
            if texts:
                scores[title] = {**scores[title], "texts": texts.losses(whole)}
        if model.hashes is not None:
            known[keys[title]] = scores[title]
        done += len(examples)
        show(title, done, total)
    return scores


@dataclass(frozen=True)
class Compared:
    """A model that is measured, by its name in results: the base with experts, or a checkpoint in their place."""

    title: str
    experts: Sequence[Mapping[str, Delta]]
    checkpoint: Base | None = None

    @property
    def names(self) -> list[str]:
        return list(map(_name, self.experts))

    @property
    def stored(self) -> list[StoredExpert]:
        return [expert for expert in self.experts if isinstance(expert, StoredExpert)]

    @property
    def hashes(self) -> list[str] | None:
        """What identifies it beside the base; None if an expert is not stored, as it may change."""
        if self.checkpoint:
            return [self.checkpoint.identity]
        if len(self.stored) < len(self.experts):
            return None
        return [expert.content_hash for expert in self.stored]

    @property
    def own_tasks(self) -> list[str]:
        """The tasks on which its stored experts were trained, or the experts that they were made of."""
        return list(dict.fromkeys(task for expert in self.stored for task in map(str, expert.record["tasks"])))

    @property
    def members(self) -> list[dict[str, str]]:
        """The name and the place of each expert or of the checkpoint; a task vector has its name in both."""
        if self.checkpoint:
            return [{"name": "checkpoint", "place": _shown(self.checkpoint.place)}]
        return [
            {
                "name": _name(expert),
                "place": _shown(expert.place) if isinstance(expert, StoredExpert) else _name(expert),
            }
            for expert in self.experts
        ]

    def check(self, model: PreTrainedModel) -> None:
        """Raise what stands against measuring it, before any model is measured, because that may take hours."""
        if self.checkpoint:
            read_layouts(self.checkpoint.directory)
        with attached(model, self.experts):
            pass

    @contextmanager
    def in_place(
        self, model: PreTrainedModel, dtype: DType, heads: Sequence[StoredExpert] = ()
    ) -> Iterator[PreTrainedModel]:
        """Yield the loaded base with the experts in place, or the checkpoint, on the device.

        A classifier takes task heads that are missing from the experts `heads`.
        """
        whole = self.checkpoint.load(dtype) if self.checkpoint else model
        # Deltas are added on the CPU, as `apply` adds them.
        with attached(whole, self.experts, check=False, heads=heads):
            whole.to(device())  # type: ignore[arg-type]
            yield whole
            whole.to("cpu")  # type: ignore[arg-type]


def open_models(base: str | Path | Base | None, experts: AnyModels) -> tuple[Base, list[Compared]]:
    """Open a base and the models that are measured beside it; the arguments are as for `evaluate`."""
    models: list[Compared] = []
    for name, asked in _named(experts).items():
        checkpoint = _checkpoint(asked)
        if checkpoint:
            model = Compared(name or Path(checkpoint.place).name, [], checkpoint)
        else:
            mix = open_several(asked, base)  # type: ignore[arg-type]
            model = Compared(name or " + ".join(map(_name, mix)) or "base", mix)
        warn_of_missing_parents(model.stored)
        if model.title in [other.title for other in models]:
            raise ValueError(f"two models are called {model.title}; give each a name of its own")
        models.append(model)
    opened = Base.open(base, [expert for model in models for expert in model.stored])
    for place in [model.checkpoint for model in models if model.checkpoint]:
        if place.tokenizer().get_vocab() != opened.tokenizer().get_vocab():
            raise ValueError(f"{place.place} has another tokenizer than {opened.place}; measure it alone, as the base")
    return opened, models


def comparison_facts(base: Base, dtype: str, models: Sequence[Compared]) -> MutableFacts:
    """Return what holds for all rows of a comparison: the base, and of each model its members and its own tasks."""
    return {
        "base": base.place,
        "fingerprint": base.fingerprint,
        "dtype": f"{dtype}, {base.quantise}" if base.quantise else dtype,
        "models": {model.title: model.members for model in models},
        "own": {model.title: model.own_tasks for model in models},
        "python": platform.python_version(),
        **provenance(),
    }


def _named(experts: AnyModels) -> Mapping[str, AnyModel]:
    """Return the models by name; a single one, which may be a mapping of deltas, has no name."""
    if not isinstance(experts, Mapping) or isinstance(experts, TaskVector):
        return {"": experts}
    if any(isinstance(value, Delta) for value in experts.values()):
        return {"": experts}  # type: ignore[dict-item]
    return experts  # type: ignore[return-value]


def _name(expert: Mapping[str, Delta]) -> str:
    return expert.title if isinstance(expert, TaskVector) else "task vector"


def _shown(place: str | Path) -> str:
    """Return a path from here; what is not here, such as the hub id of an adapter, stays as it is."""
    here = Path(place).expanduser()
    return os.path.relpath(here) if here.exists() else str(place)


def _checkpoint(model: AnyModel) -> Base | None:
    """Return the checkpoint that stands in the place of a mix, alone or in a list; None for experts."""
    place = model[0] if isinstance(model, list | tuple) and len(model) == 1 else model
    if isinstance(place, Base):
        return place
    if not isinstance(place, str | Path):
        return None
    folder = Path(place).expanduser()
    return Base.open(place) if (folder / "config.json").is_file() and not is_adapter(folder) else None


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.task, example.target, example.correct]).encode())
        for tokens in (example.tokens, *example.choices):
            digest.update(json.dumps([tokens.prompt, tokens.ids.tolist()]).encode())
    return digest.hexdigest()
