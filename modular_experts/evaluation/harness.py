"""Measure experts with the lm-evaluation-harness (the package lm-eval), on its benchmarks and on task files."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from modular_experts.base import Base, DType
from modular_experts.base.quantised import Quantise
from modular_experts.data import TaskMixture
from modular_experts.data.rows import Row, content_hash
from modular_experts.data.sources import READERS
from modular_experts.data.tasks import Task, Tasks, as_tasks
from modular_experts.data.tokenize import as_continuation
from modular_experts.evaluation.compare import RESULTS, AnyModels, comparison_facts, open_models
from modular_experts.places import check_free
from modular_experts.reports import Results
from modular_experts.routing.gates import reading
from modular_experts.text import did_you_mean

CHOICES = "_choices"
"""What the name of a harness task that scores choices has behind the name of the task."""
FEWSHOT_SEED = 1234
"""The harness's own seed of the examples in a prompt."""
# The harness's names of the two metrics that `evaluate` calls otherwise.
OURS = {"exact_match": "exact_match", "acc": "choice_accuracy"}


class HarnessTask(NamedTuple):
    """A task of the harness: its settings, but for where its rows come from, and the rows."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Measuring:
    """How the harness measures.

    Args:
        limit: The most rows of one task. They are the first ones of a benchmark, and spread evenly over a task file.
        num_fewshot: Examples in the prompt of a benchmark; the benchmark's own number by default.
        max_new_tokens: Length limit of a generated answer to a row of a task file; benchmarks have their own.
        batch_size: Rows that are measured at once. It changes scores in their last digits.
        dtype: Data type of the base.
        quantise: Form in which the base is quantised, such as nf4.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    dtype: DType = "float32"
    quantise: Quantise | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and max_new_tokens={self.max_new_tokens} must be at least 1"
            )


def harness(
    base: str | Path | Base | None,
    experts: AnyModels,
    tasks: Tasks,
    out: str | Path | None = None,
    overwrite: bool = False,
    measuring: Measuring = Measuring(),
    progress: Callable[[str, int, int], None] = lambda model, done, total: None,
) -> Results:
    """Measure a base with experts by the lm-evaluation-harness, and return rows that print as a table.

        harness("runs/base", {"base": [], "TIES": "library/ties"}, ["arc_easy", "intents.jsonl"])

    The rows of a benchmark have the harness's names of metrics, the role `held_out`, and in `stderr` the standard error
    of the value. A benchmark whose group has a mean has no role, so that means count the group alone. Task files become
    tasks of the harness, and their metrics have the names that `evaluate` gives.

    Args:
        base: The base's directory or hub id, or an opened base; None is the one that the experts' records name.
        experts: As for `evaluate`.
        tasks: Names of the harness's benchmarks or groups of them, and tasks of your own, as for `evaluate`.
        out: Directory of `results.json`, which `Results.read` reads.
        overwrite: Replace the results in `out`.
        progress: Called with the name of a model, how many models are measured, and how many there are.

    Raises:
        FileExistsError: `out` holds results and may not be replaced; nothing was measured.
        ValueError: The harness is not installed, does not know a name, or could not load a benchmark; or anything that
            `evaluate` refuses.
    """
    file = None if out is None else check_free(Path(out, RESULTS), overwrite)
    names, files = benchmarks_and_tasks(tasks)
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval is not installed ({error}): pip install 'modular-experts[eval]'") from None
    found, models = open_models(base, experts)
    found = copy.copy(found)  # the caller's stays in its form
    found.quantise = measuring.quantise or found.quantise
    tokenizer, limit, dtype = found.tokenizer(), measuring.limit, measuring.dtype
    mixture = TaskMixture(files, eval_limit=limit) if files else None
    ours = harness_tasks(mixture, tokenizer, measuring.max_new_tokens) if mixture else {}
    roles = {task.name: task.role for task in as_tasks(files)} if files else {}
    facts = comparison_facts(found, dtype, models) | {"max_new_tokens": measuring.max_new_tokens}
    facts["harness"] = {"version": version("lm_eval"), "batch_size": measuring.batch_size, "limit": limit, "tasks": {}}
    rows: list[dict[str, Any]] = []
    # It would log what a caller knows: that the model is in memory, and each setting of a task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # What is loaded, whether prompts begin with a token of the tokenizer's, and the most rows of a task.
    suites: list[Any] = [(loaded, False, None) for loaded in _loaded_files(ours)]
    suites += [(loaded, None, limit) for loaded in _loaded_benchmarks(names, measuring.num_fewshot)]
    model: Any = found.load(dtype)
    for one in models:
        one.check(model)
    for done, one in enumerate(models):
        progress(one.title, done, len(models))
        alone = not all(stored.mergeable for stored in one.stored)
        with one.in_place(model, dtype) as whole:
            for suite in suites:
                measured = _measured(whole, tokenizer, suite, measuring.batch_size, alone)
                for name, task_version in measured["versions"].items():
                    metadata = measured["configs"].get(name, {}).get("metadata") or {}
                    more = {key: metadata[key] for key in ("content_hash",) if key in metadata}
                    about = {"version": task_version, "num_fewshot": measured["n-shot"].get(name), **more}
                    facts["harness"]["tasks"][name] = about
                rows += [{"model": one.title, "experts": one.names, **row} for row in _rows(measured, ours, roles)]
    progress("", len(models), len(models))
    results = Results(rows, facts)
    if file:
        results.write(file)
    return results


def harness_tasks(
    data: TaskMixture, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 64
) -> dict[str, HarnessTask]:
    """Return the test rows of tasks as tasks of the harness, by their names there.

    Each task generates an answer. Rows with choices also become a task that compares their likelihoods, with `_choices`
    behind the name. Scores are as with `evaluate` for rows that fit the model's context, unless the tokenizer splits a
    text otherwise where the answer follows the prompt.
    """
    found: dict[str, HarnessTask] = {}
    for name, rows in data.rows("test").items():
        if not rows:
            raise ValueError(f"task {name!r} has no test rows; give some of its rows the split 'test'")
        if any(row.messages for row in rows):
            raise ValueError(
                f"task {name!r} holds conversations, and tasks of the harness hold inputs and targets; measure it with "
                "modular-experts evaluate"
            )
        made = {name: _generation(name, rows, tokenizer, max_new_tokens)}
        if with_choices := [row for row in rows if row.choices]:
            made[name + CHOICES] = _choice(name + CHOICES, with_choices, tokenizer)
        for taken in made.keys() & found.keys():
            raise ValueError(f"two tasks of the harness would be called {taken!r}; give one another name")
        found |= made
    return found


def _generation(name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, longest: int) -> HarnessTask:
    whole = {"function": "regex", "regex_pattern": r"(?s)^.*$"}
    settings = {
        **_common(name, rows, "generate_until", "exact_match"),
        "doc_to_target": "target",
        # A checkpoint's own generation settings may differ.
        "generation_kwargs": {
            **{"until": [tokenizer.eos_token], "max_gen_toks": longest},
            **{"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0},
        },
        # The whole answer, without white space at its ends, which this filter takes away.
        "filter_list": [{"name": "none", "filter": [whole, {"function": "take_first"}]}],
    }
    return HarnessTask(settings, [{"input": row.input, "target": str(row.target).strip()} for row in rows])


def _choice(name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> HarnessTask:
    settings = _common(name, rows, "multiple_choice", "acc")
    settings |= {"doc_to_choice": "choices", "doc_to_target": "correct"}
    docs = [
        {
            "input": row.input,
            "choices": [as_continuation(row.input, choice) + str(tokenizer.eos_token) for choice in row.choices],
            "correct": row.choices.index(str(row.target)),
        }
        for row in rows
    ]
    return HarnessTask(settings, docs)


def _common(name: str, rows: Sequence[Row], kind: str, metric: str) -> dict[str, Any]:
    return {
        "task": name,
        "test_split": "test",
        "output_type": kind,
        "num_fewshot": 0,
        "doc_to_text": "input",
        # By default the harness puts a space before each choice, and ours begin with theirs.
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "content_hash": content_hash(rows)},
    }


def benchmarks_and_tasks(tasks: Tasks) -> tuple[list[str], list[Any]]:
    """Divide tasks into names of benchmarks, perhaps several with commas between them, and tasks of one's own.

    A word is a path if something is there, or if it has a folder or the suffix of a task file.
    """
    names, files = list[str](), list[Any]()
    for given in [tasks] if isinstance(tasks, Task | Mapping | str | os.PathLike) else tasks:
        path = not isinstance(given, str) or given.startswith(("[", "{")) or "/" in given or Path(given).exists()
        if path or Path(str(given)).suffix.lower() in READERS:
            files.append(given)
        else:
            names += [name.strip() for name in str(given).split(",") if name.strip()]
    return list(dict.fromkeys(names)), files


def _loaded_files(tasks: Mapping[str, HarnessTask]) -> list[Any]:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    def from_memory(task: HarnessTask) -> dict[str, Any]:
        return {**task.settings, "custom_dataset": lambda **_: {"test": Dataset.from_list(task.rows)}}

    return [TaskManager(include_defaults=False).load(list(map(from_memory, tasks.values())))] if tasks else []


def _loaded_benchmarks(names: Sequence[str], num_fewshot: int | None) -> list[Any]:
    from lm_eval.tasks import TaskManager

    if not names:
        return []
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise ValueError(f"{name!r} is neither a file nor a task of the harness{near}; lm_eval ls tasks lists them")
    try:
        loaded = manager.load(list(names))
    # What the hub, its cache and the loaders of datasets raise.
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the harness could not load {', '.join(names)} ({' '.join(str(error).split())[:200]}); it reads their "
            "data from the Hugging Face hub, or without a network from the cache of datasets"
        ) from error
    for task in loaded["tasks"].values():
        # As the harness's own command does: a benchmark that insists on 0 keeps it.
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return [loaded]


def _measured(
    model: Any, tokenizer: PreTrainedTokenizerBase, suite: tuple[Any, Any, Any], batch_size: int, alone: bool
) -> dict[str, Any]:
    """Let the harness measure a loaded model; with `alone` row by row, so that routers see a prompt and no padding."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Measured(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            score = super()._loglikelihood_tokens
            if not alone:
                return score(requests, disable_tqdm, override_bs)
            found = []
            for request in requests:
                _, context, answer = request
                length = min(len(context) + len(answer) - 1, self.max_length)
                prompt = torch.arange(length, device=self.device)[None] < length - len(answer) + 1
                with reading(prompt):
                    found += score([request], True, 1)
            return found

        def _model_generate(self, context, max_length, stop, **settings):
            with reading(settings["attention_mask"].bool()):
                return super()._model_generate(context, max_length, stop, **settings)

    loaded, bos, limit = suite
    # Each model gets the same examples in its prompts.
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    lm = Measured(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos)
    return evaluate(lm, loaded, limit=limit, log_samples=False)


def _rows(
    measured: Mapping[str, Any], ours: Mapping[str, HarnessTask], roles: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    groups = measured.get("groups", {})
    inside = {member for name in groups for member in measured["group_subtasks"].get(name, ())}
    for name, scores in {**groups, **measured["results"]}.items():
        task = name.removesuffix(CHOICES) if name in ours else name
        for key, value in scores.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{how}")
            yield {
                "task": task,
                "role": None if name in inside else roles.get(task, "held_out"),
                "metric": OURS[metric] if name in ours else metric if how == "none" else key,
                # The harness writes "N/A" where it has no number.
                "value": None if isinstance(value, str) else float(value),
                "stderr": None if error is None or isinstance(error, str) else float(error),
                "rows": measured["n-samples"].get(name, {}).get("effective", scores.get("sample_len")),
            }
