"""Measure experts with the lm-evaluation-harness (the package lm-eval), on its benchmarks and on task files."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base, DType
from modular_experts.base.quantised import Quantise
from modular_experts.data import TaskMixture
from modular_experts.data.row_tokenizer import as_continuation
from modular_experts.data.rows import Row, content_hash
from modular_experts.data.sources import READERS
from modular_experts.data.tasks import Task, Tasks
from modular_experts.evaluation.compare import RESULTS, AnyModels, comparison_facts, open_models
from modular_experts.language_model import reads_prompts_apart
from modular_experts.places import check_free
from modular_experts.reports import Results
from modular_experts.reports.results import Facts, MutableFacts
from modular_experts.routing.gates import reading
from modular_experts.text import did_you_mean

if TYPE_CHECKING:
    from modular_experts.data.tasks import AnyTask

CHOICES = "_choices"
"""What the name of a harness task that scores choices has behind the name of the task."""
FEWSHOT_SEED = 1234
"""The harness's own seed of the examples in a prompt."""
# The harness's names of the two metrics that `evaluate` calls otherwise.
OURS = {"exact_match": "exact_match", "acc": "choice_accuracy"}


class HarnessTask(NamedTuple):
    """A task of the harness: its settings, but for where its rows come from, and the rows."""

    settings: MutableFacts
    rows: list[MutableFacts]


class Suite(NamedTuple):
    """Tasks that the harness measures together, as its `TaskManager` loads them.

    Attributes:
        loaded: The tasks and their groups.
        add_bos: Whether prompts begin with a token of the tokenizer's; None leaves that to the tokenizer.
        limit: The most rows of a task.
    """

    loaded: Facts
    add_bos: bool | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Measuring:
    """How the harness measures.

    Args:
        limit: The most rows of one task. They are the first ones of a benchmark, and spread evenly over a task file.
        shots: Demonstrations before each row; by default as many as a benchmark asks for, and none of a task file.
        max_new_tokens: Length limit of a generated answer to a row of a task file; benchmarks have their own.
        batch_size: Rows that are measured at once. It changes scores in their last digits.
        dtype: Data type of the base.
        quantise: Form in which the base is quantised, such as nf4.
    """

    limit: int | None = None
    shots: int | None = None
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
        progress: Called before each model with its name, how many are measured, and how many there are.

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
    opened, models = open_models(base, experts)
    opened = copy.copy(opened)  # the caller's stays in its form
    opened.quantise = measuring.quantise or opened.quantise
    tokenizer = opened.tokenizer()
    limit = measuring.limit
    ours: dict[str, HarnessTask] = {}
    roles: dict[str, str] = {}
    if files:
        mixture = TaskMixture(files, eval_limit=limit, shots=measuring.shots or 0)
        ours = harness_tasks(mixture, tokenizer, measuring.max_new_tokens)
        roles = mixture.roles
    facts = comparison_facts(opened, measuring.dtype, models) | {"max_new_tokens": measuring.max_new_tokens}
    facts["harness"] = {"version": version("lm_eval"), "batch_size": measuring.batch_size, "limit": limit, "tasks": {}}
    # It would log what a caller knows: that the model is in memory, and each setting of a task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    suites = [Suite(_loaded_files(ours), add_bos=False)] if ours else []
    if names:
        suites.append(Suite(_loaded_benchmarks(names, measuring.shots), limit=limit))
    rows: list[MutableFacts] = []
    loaded = opened.load(measuring.dtype)
    if reads_prompts_apart(loaded):
        raise ValueError(f"{opened.place} is not a causal language model, and only these are asked; use evaluate")
    for model in models:
        model.check(loaded)
    for done, model in enumerate(models):
        progress(model.title, done, len(models))
        alone = not all(expert.mergeable for expert in model.stored)
        with model.in_place(loaded, measuring.dtype) as whole:
            for suite in suites:
                measured = _measured(whole, tokenizer, suite, measuring.batch_size, alone)
                facts["harness"]["tasks"] |= _tasks_of(measured)
                rows += [{"model": model.title, "experts": model.names, **row} for row in _rows(measured, ours, roles)]
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
    tasks: dict[str, HarnessTask] = {}
    for name, rows in data.rows("test").items():
        if not rows:
            raise ValueError(f"task {name!r} has no test rows; give some of its rows the split 'test'")
        if any(row.messages for row in rows):
            raise ValueError(
                f"task {name!r} holds conversations, and tasks of the harness hold inputs and targets; measure it with "
                "modular-experts evaluate"
            )
        if data.shots:
            pairs = zip(rows, data.demonstrations(name, rows), strict=True)
            rows = [replace(row, input=_shown(shown, tokenizer) + row.input) for row, shown in pairs]
        made = {name: _generation(name, rows, tokenizer, max_new_tokens)}
        if with_choices := [row for row in rows if row.choices]:
            made[name + CHOICES] = _choice(name + CHOICES, with_choices, tokenizer)
        for taken in made.keys() & tasks.keys():
            raise ValueError(f"two tasks of the harness would be called {taken!r}; give one another name")
        tasks |= made
    return tasks


def _shown(demonstrations: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return demonstrations as text, each with the end that training gives a target."""
    texts = [row.input + as_continuation(row.input, str(row.target)) for row in demonstrations]
    return "".join(text + str(tokenizer.eos_token) for text in texts)


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


def _common(name: str, rows: Sequence[Row], kind: str, metric: str) -> MutableFacts:
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


def benchmarks_and_tasks(tasks: Tasks) -> tuple[list[str], "list[AnyTask]"]:
    """Divide tasks into names of benchmarks, perhaps several with commas between them, and tasks of one's own.

    A word is a path if something is there, or if it has a folder or the suffix of a task file.
    """
    names: list[str] = []
    files: list[AnyTask] = []
    for task in [tasks] if isinstance(tasks, Task | Mapping | str | os.PathLike) else tasks:
        is_path = not isinstance(task, str) or task.startswith(("[", "{")) or "/" in task or Path(task).exists()
        if is_path or Path(str(task)).suffix.lower() in READERS:
            files.append(task)
        else:
            names += [name.strip() for name in str(task).split(",") if name.strip()]
    return list(dict.fromkeys(names)), files


def _loaded_files(tasks: Mapping[str, HarnessTask]) -> Facts:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    def from_memory(task: HarnessTask) -> MutableFacts:
        return {**task.settings, "custom_dataset": lambda **_: {"test": Dataset.from_list(task.rows)}}

    return TaskManager(include_defaults=False).load(list(map(from_memory, tasks.values())))


def _loaded_benchmarks(names: Sequence[str], shots: int | None) -> Facts:
    from lm_eval.tasks import TaskManager

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
        if task.get_config("num_fewshot") is None or (shots is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
    return loaded


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite, batch_size: int, alone: bool
) -> Facts:
    """Let the harness measure a loaded model; with `alone` row by row, so that routers see a prompt and no padding."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Measured(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            score = super()._loglikelihood_tokens
            if not alone:
                return score(requests, disable_tqdm, override_bs)
            scores = []
            for request in requests:
                _, context, answer = request
                length = min(len(context) + len(answer) - 1, self.max_length)
                prompt = torch.arange(length, device=self.device)[None] < length - len(answer) + 1
                with reading(prompt):
                    scores += score([request], True, 1)
            return scores

        def _model_generate(self, context, max_length, stop, **settings):
            with reading(settings["attention_mask"].bool()):
                return super()._model_generate(context, max_length, stop, **settings)

    # Each model gets the same examples in its prompts.
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    lm = Measured(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=suite.add_bos)
    return evaluate(lm, suite.loaded, limit=suite.limit, log_samples=False)


def _tasks_of(measured: Facts) -> MutableFacts:
    """Return for each task its version, the examples in a prompt, and the hash of a task file's rows."""
    tasks: MutableFacts = {}
    for name, task_version in measured["versions"].items():
        tasks[name] = {"version": task_version, "num_fewshot": measured["n-shot"].get(name)}
        metadata = measured["configs"].get(name, {}).get("metadata") or {}
        if "content_hash" in metadata:
            tasks[name]["content_hash"] = metadata["content_hash"]
    return tasks


def _rows(measured: Facts, ours: Mapping[str, HarnessTask], roles: Mapping[str, str]) -> Iterator[MutableFacts]:
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
