"""Measure experts with EleutherAI's lm-evaluation-harness (the package lm-eval), and write our tasks in its format.

`harness` runs benchmarks of the harness, and task files as tasks of the harness, on one loaded base with one mix of
experts after another, and on checkpoints. `export_tasks` writes task files as YAML and JSONL, so that whoever has a
checkpoint measures it with `lm_eval` alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from modular_experts.base import Base, DType
from modular_experts.data import TaskMixture
from modular_experts.data.rows import Row, content_hash
from modular_experts.data.sources import READERS
from modular_experts.data.tasks import Task, Tasks, as_tasks
from modular_experts.data.tokenize import joined
from modular_experts.evaluation.compare import RESULTS, AnyModels, facts_of, open_models
from modular_experts.library import check_target
from modular_experts.library.atomic import new_directory
from modular_experts.reports import Results
from modular_experts.routing.gates import reading
from modular_experts.text import did_you_mean

ABOUT = "HARNESS.md"
"""The file of an export that says how to use the others."""
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


def harness(
    base: str | Path | Base | None,
    experts: AnyModels,
    tasks: Tasks,
    out: str | Path | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    dtype: DType = "float32",
    revision: str | None = None,
    progress: Callable[[str, int, int], None] = lambda model, done, total: None,
) -> Results:
    """Measure a base with experts by the lm-evaluation-harness, and return rows that print as a table.

    The base is loaded once, and each mix of experts is added in place for as long as it is measured; a checkpoint is
    loaded for itself:

        harness("runs/base", {"base": [], "TIES": "library/ties"}, ["arc_easy", "intents.jsonl"])

    The rows of a benchmark have the harness's names of metrics, the role `held_out`, and in `stderr` the standard error
    of the value. Task files become tasks of the harness, and their metrics have the names that `evaluate` gives.

    Args:
        base: The base's directory or hub id, or an opened base; None is the one that the experts' records name.
        experts: As for `evaluate`.
        tasks: Names of the harness's benchmarks or groups of them, and tasks of your own, as for `evaluate`.
        out: Directory of `results.json`, which `Results.read` reads.
        overwrite: Replace the results in `out`.
        limit: The most rows of one task: the first ones of a benchmark; of a task file, spread evenly over it.
        num_fewshot: Examples in the prompt of a benchmark; the benchmark's own number if not given.
        max_new_tokens: Length limit of a generated answer to a row of a task file; benchmarks have their own.
        batch_size: Rows that are measured at once. It changes scores in their last digits.
        dtype: Data type of the base.
        revision: Branch, tag or commit of a hub id.
        progress: Called with the name of a model, how many models are measured, and how many there are.

    Raises:
        FileExistsError: `out` holds results and may not be replaced; nothing was measured.
        FileNotFoundError: The base was not found.
        ValueError: The harness is not installed, does not know a name, or could not load a benchmark; or anything that
            `evaluate` refuses.
    """
    folder = None if out is None else Path(out)
    if folder and (folder / RESULTS).exists() and not overwrite:
        raise FileExistsError(f"{folder / RESULTS} exists already; choose another out, or replace it with --overwrite")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"{batch_size=} and {max_new_tokens=} must be at least 1")
    names, files = benchmarks_and_tasks(tasks)
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the lm-evaluation-harness is not installed ({error}): pip install 'modular-experts[eval]'"
        ) from None
    found, models = open_models(base, experts, revision)
    tokenizer = found.tokenizer()
    ours = harness_tasks(TaskMixture(files, eval_limit=limit), tokenizer, max_new_tokens) if files else {}
    with _quiet():
        suites = [_Suite(loaded, False, None) for loaded in _loaded_files(ours)]
        suites += [_Suite(loaded, None, limit) for loaded in _loaded_benchmarks(names, num_fewshot)]
        facts = facts_of(found, dtype, models) | {"max_new_tokens": max_new_tokens}
        facts["harness"] = {"version": version("lm_eval"), "batch_size": batch_size, "limit": limit, "tasks": {}}
        roles = {task.name: task.role for task in as_tasks(files)} if files else {}
        model: Any = found.load(dtype)
        for one in models:
            one.check(model)
        rows: list[dict[str, Any]] = []
        for done, one in enumerate(models):
            progress(one.title, done, len(models))
            reads_prompts = not all(stored.mergeable for stored in one.stored)
            with one.in_place(model, dtype, "cuda" if torch.cuda.is_available() else "cpu") as whole:
                for suite in suites:
                    measured = _measured(whole, tokenizer, suite, batch_size, alone=reads_prompts)
                    facts["harness"]["tasks"] |= _versions(measured)
                    rows += [{"model": one.title, "experts": one.names, **row} for row in _rows(measured, ours, roles)]
    progress("", len(models), len(models))
    results = Results(rows, facts)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        results.write(folder / RESULTS)
    return results


def export_tasks(
    tasks: Tasks,
    out: str | Path,
    base: str | Path | Base,
    max_new_tokens: int = 64,
    limit: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the test rows of tasks as tasks of the harness: YAML, JSONL, and `HARNESS.md` with the command.

    With these files `lm_eval` measures a checkpoint of the base, such as `apply` writes, without this package.

    Args:
        tasks: The tasks, as for `evaluate`.
        out: Directory of the files.
        base: The base's directory or hub id, or an opened base: its end-of-sequence ends every choice.
        max_new_tokens: Length limit of a generated answer.
        limit: The most rows of one task, spread evenly over its file.
        revision: Branch, tag or commit of a hub id.
        overwrite: Replace a directory that an export wrote.

    Returns:
        The names of the tasks of the harness.

    Raises:
        FileExistsError: `out` exists and may not be replaced.
        ValueError: A task has no test rows, or holds conversations.
    """
    folder = Path(out)
    check_target(folder, overwrite, ABOUT)
    tokenizer = Base.open(base, (), revision).tokenizer()
    found = harness_tasks(TaskMixture(tasks, eval_limit=limit), tokenizer, max_new_tokens)
    with new_directory(folder, overwrite, ABOUT) as temporary:
        for name, task in found.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in task.rows)
            (temporary / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            place = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
            settings = yaml.safe_dump({**task.settings, **place}, sort_keys=False, allow_unicode=True)
            (temporary / f"{name}.yaml").write_text(settings, encoding="utf-8")
        (temporary / ABOUT).write_text(EXPLAINED.format(tasks=",".join(found)), encoding="utf-8")
    return list(found)


EXPLAINED = """# Tasks of the lm-evaluation-harness

modular-experts wrote these files. In this directory, with lm-eval 0.4.13 or a later release of 0.4:

    lm_eval --model hf --model_args pretrained=CHECKPOINT,add_bos_token=False \\
        --include_path . --tasks {tasks}

CHECKPOINT is a model directory or hub id with the tokenizer that the choices end with: each has its end-of-sequence.
"""


def harness_tasks(
    data: TaskMixture, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 64
) -> dict[str, HarnessTask]:
    """Return the test rows of tasks as tasks of the harness, by their names there.

    Each task becomes one that generates an answer, under its own name. Its rows with choices also become one that
    compares their likelihoods, with `_choices` behind the name. Scores are as with `evaluate` for rows that fit the
    model's context, unless the tokenizer splits a text otherwise where the answer follows the prompt.

    Args:
        data: The tasks, with `eval_limit`.
        tokenizer: The model's tokenizer, whose end-of-sequence ends every choice.
        max_new_tokens: Length limit of a generated answer.

    Raises:
        ValueError: A task has no test rows, or holds conversations; or two tasks get one name.
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
        with_choices = [row for row in rows if row.choices]
        if with_choices:
            made[name + CHOICES] = _choice(name + CHOICES, with_choices, tokenizer)
        for taken in made.keys() & found.keys():
            raise ValueError(f"two tasks of the harness would be called {taken!r}; give one another name")
        found |= made
    return found


def _generation(name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, longest: int) -> HarnessTask:
    settings = {
        **_common(name, rows),
        "output_type": "generate_until",
        "doc_to_target": "target",
        # A checkpoint's own generation settings may differ.
        "generation_kwargs": {
            **{"until": [tokenizer.eos_token], "max_gen_toks": longest},
            **{"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0},
        },
        # The whole answer, without white space at its ends, which this filter takes away.
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "regex", "regex_pattern": r"(?s)^.*$"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return HarnessTask(settings, [{"input": row.input, "target": str(row.target).strip()} for row in rows])


def _choice(name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> HarnessTask:
    settings = {
        **_common(name, rows),
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "correct",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    docs = [
        {
            "input": row.input,
            "choices": [joined(row.input, choice) + str(tokenizer.eos_token) for choice in row.choices],
            "correct": row.choices.index(str(row.target)),
        }
        for row in rows
    ]
    return HarnessTask(settings, docs)


def _common(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "task": name,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "input",
        # By default the harness puts a space before each choice, and ours begin with theirs.
        "target_delimiter": "",
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


class _Suite(NamedTuple):
    """What the harness loaded, whether prompts begin with a token of the tokenizer's, and the most rows of a task."""

    loaded: Any
    bos: bool | None
    limit: int | None


def _loaded_files(tasks: Mapping[str, HarnessTask]) -> list[Any]:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    def from_memory(task: HarnessTask) -> dict[str, Any]:
        return {**task.settings, "custom_dataset": lambda **_: {"test": Dataset.from_list(task.rows)}}

    manager = TaskManager(include_defaults=False)
    return [manager.load([from_memory(task) for task in tasks.values()])] if tasks else []


def _loaded_benchmarks(names: Sequence[str], num_fewshot: int | None) -> list[Any]:
    """Load benchmarks with their data, which come from the hub or from its cache on this machine."""
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
    model: Any, tokenizer: PreTrainedTokenizerBase, suite: _Suite, batch_size: int, alone: bool
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

    # Each model gets the same examples in its prompts.
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    lm = Measured(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=suite.bos)
    return evaluate(lm, suite.loaded, limit=suite.limit, log_samples=False)


def _versions(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return of each task its version, the examples in its prompts, and of ours the hash of the rows."""
    found = {}
    for name, task_version in measured["versions"].items():
        metadata = measured["configs"].get(name, {}).get("metadata") or {}
        more = {key: metadata[key] for key in ("content_hash",) if key in metadata}
        found[name] = {"version": task_version, "num_fewshot": measured["n-shot"].get(name), **more}
    return found


def _rows(
    measured: Mapping[str, Any], ours: Mapping[str, HarnessTask], roles: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    for name, scores in {**measured.get("groups", {}), **measured["results"]}.items():
        task = name.removesuffix(CHOICES) if name in ours else name
        count = measured["n-samples"].get(name, {}).get("effective")
        for key, value in scores.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{how}")
            yield {
                "task": task,
                "role": roles.get(task, "held_out"),
                "metric": OURS[metric] if name in ours else metric if how == "none" else key,
                # The harness writes "N/A" where it has no number.
                "value": None if isinstance(value, str) else float(value),
                "stderr": None if error is None or isinstance(error, str) else float(error),
                "rows": count,
            }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from logging what a caller knows: that the model is in memory, and each setting of a task."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
