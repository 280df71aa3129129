"""Run `evaluate` and `harness`, which compare a base and experts on tasks and on benchmarks, and `look` at tasks."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement

from modular_experts.base import Base, DType
from modular_experts.base.quantised import Quantise
from modular_experts.cli.format import open_page, table_of
from modular_experts.cli.option_names import as_options
from modular_experts.data import TaskMixture
from modular_experts.data.look import look as look_at
from modular_experts.data.tasks import Tasks, as_tasks
from modular_experts.evaluation import evaluate as evaluate_experts
from modular_experts.evaluation.compare import REPORT, RESULTS, open_models
from modular_experts.evaluation.comparison_page import every_task
from modular_experts.evaluation.forgetting import forgetting_table
from modular_experts.evaluation.harness import Measuring
from modular_experts.evaluation.harness import harness as measure_by_harness
from modular_experts.study.options import UsageError


@dataclass(frozen=True)
class Reading:
    """How test rows are read and answered.

    Args:
        eval_limit: The most test rows of one task; they are spread evenly over its file.
        max_new_tokens: Length limit of a generated answer.
        batch_size: Rows that are measured at once; changes the speed only.
        shots: Demonstrations before each row; they are training rows of its task with their targets, the same for
            every model.
        shots_seed: Seed of the draw of demonstrations.
        label_choices: Compare labels by likelihood; they are the targets of a task's training rows where these come
            again, and stand in for `choices` that rows lack.
        metrics: Metrics beside exact match and Rouge-L: number, json, year=/[0-9]{4}/, mine.length. An answer must have
            the target's last number, the same JSON, or the same text where the regular expression finds one; a function
            of yours gets answer and target.
    """

    eval_limit: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    max_length: int = 1024
    chat_template: bool = False
    dtype: DType = "float32"
    quantise: Quantise | None = None
    metrics: list[str] | None = None
    shots: int = 0
    shots_seed: int = 0
    label_choices: bool = False


def evaluate(
    tasks: Tasks,
    reading: Reading,
    out: str | None = None,
    base: str | None = None,
    experts: list[str] | None = None,
    held_out: Tasks | None = None,
    overwrite: bool = False,
    open: bool = False,
    forgetting: str | None = None,
) -> None:
    """Measure a base, experts and checkpoints on the test rows of tasks, and compare them in a table and on a page.

    With --out, the directory then holds `results.json` and `report.html`. The same command goes on with an interrupted
    comparison, and with one more expert it measures only that one. Without --out, nothing is written.

    Args:
        reading: How rows are read.
        out: Directory of the results and of the page.
        experts: Directories of experts, such as library/a, and of checkpoints. To name one in the table:
            ties=library/x; to add several experts up: sum=library/a+library/b.
        held_out: Further tasks, which no expert was trained on; their means are apart.
        overwrite: Replace the results in `out`.
        open: Show the page in the browser at the end.
        forgetting: File of texts; the rise of the loss on them tells what a model forgot.

    Examples:
        modular-experts evaluate --base DIR --experts library/a library/both \\
            --tasks a.jsonl b.jsonl --out runs/comparison
        modular-experts evaluate --experts ties=library/ab sum=library/a+library/b \\
            --tasks a.jsonl b.jsonl --held_out c.jsonl --out runs/ways
    """
    if open and out is None:
        raise UsageError("--open shows the page, which evaluate writes only with --out DIR")
    mixes = mixes_of(experts or [])
    outside = [] if held_out is None else [{**vars(task), "role": "held_out"} for task in as_tasks(held_out)]
    data = TaskMixture(
        [*as_tasks(tasks), *outside],
        eval_batch_size=reading.batch_size,
        max_length=reading.max_length,
        eval_limit=reading.eval_limit,
        chat_template=reading.chat_template,
        shots=reading.shots,
        shots_seed=reading.shots_seed,
        label_choices=reading.label_choices,
    )
    opened: str | Base | None = base
    if reading.quantise:
        opened, _ = open_models(base, mixes)
        opened.quantise = reading.quantise
    results = evaluate_experts(
        opened, mixes, data, reading.max_new_tokens, reading.dtype, reading.metrics, out, overwrite, forgetting
    )
    console = Console(width=80)
    console.print(results.table())
    if len(mixes) > 1 and len(results.values("task")) > 1:
        table = every_task(results).text()
        if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
            console.print("", table)
    if forgetting:
        console.print("", forgetting_table(results.facts["forgetting"]).text())
    if out is None:
        return
    print(f"\nthe results are in {Path(out, RESULTS)}\nthe page is {Path(out, REPORT)}")
    if open:
        open_page(Path(out, REPORT))


def mixes_of(experts: list[str]) -> dict[str, list[str]]:
    """Return the directories of the experts of each model by its name: the base, and each word of `--experts`."""
    mixes: dict[str, list[str]] = {"base": []}
    for word in experts:
        label, equals, places = word.partition("=")
        if not equals or "/" in label:
            # A directory may have the sign in its name.
            label = ""
            places = word
        members = [places] if Path(places).is_dir() else places.split("+")
        name = label or " + ".join(Path(place).name for place in members)
        if name in mixes:
            raise UsageError(f"two models are called {name}; name one of them: --experts {name}-2={places}")
        mixes[name] = members
    return mixes


def look(
    tasks: Tasks,
    base: str,
    page: str | None = None,
    overwrite: bool = False,
    max_length: int = 1024,
    chat_template: bool = False,
    validation_ratio: float = 0.1,
    test_ratio: float = 0.1,
    split_seed: int = 0,
    shots: int = 0,
    shots_seed: int = 0,
) -> None:
    """Show how `fit` reads the rows of tasks: as which tokens, what it learns, how long they are, which repeat.

    No model is loaded. Off a terminal the same text can be kept in a file.

    Args:
        base: The base's directory or hub id, whose tokenizer and context are taken.
        page: File of a page that shows the same, such as look.html.
        overwrite: Replace the page.
        validation_ratio: Share of a task's rows without a `split` that go to validation.
        test_ratio: Share of a task's rows without a `split` that go to the test.
        split_seed: Seed of this division.
        shots: Demonstrations before each row; they are other training rows of its task with their targets.
        shots_seed: Seed of the draw of demonstrations.

    Examples:
        modular-experts look a.jsonl b.csv --base DIR
        modular-experts look --base DIR --tasks chats.jsonl --page look.html
    """
    ratios = {"validation_ratio": validation_ratio, "test_ratio": test_ratio, "split_seed": split_seed}
    shown = {"shots": shots, "shots_seed": shots_seed}
    seen = look_at(base, tasks, page, overwrite, max_length=max_length, chat_template=chat_template, **ratios, **shown)
    print(as_options(str(seen)))
    if page:
        print(f"\nthe page is {page}")


def harness(
    tasks: Tasks,
    out: str,
    measuring: Measuring,
    base: str | None = None,
    experts: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Measure a base, experts and checkpoints by the lm-evaluation-harness: on its benchmarks, and on task files.

    It needs lm-eval (`pip install 'modular-experts[eval]'`). The base is loaded once, and experts are added to it in
    turn.

    Args:
        tasks: Names of benchmarks or of groups of them, such as arc_easy,hellaswag (`lm_eval ls tasks` lists them),
            and task files, or tasks with settings, as for `fit`.
        out: Directory of the results.
        measuring: How the harness measures.
        experts: Directories of the experts, named and added up as for `evaluate`, and of checkpoints.
        overwrite: Replace the results in `out`.

    Examples:
        modular-experts harness --base DIR --experts library/a library/both \\
            --tasks arc_easy,hellaswag a.jsonl --out runs/benchmarks
    """

    def show(model: str, done: int, total: int) -> None:
        print(f"measuring {model}, {done + 1} of {total}", flush=True)

    results = measure_by_harness(base, mixes_of(experts or []), tasks, out, overwrite, measuring, show)
    pairs = dict.fromkeys((row["task"], row["metric"]) for row in results.rows)
    names = results.values("model")
    table = table_of("task and metric", *names)
    for task, metric in pairs:
        rows = {row["model"]: row["value"] for row in results.where(task=task, metric=metric).rows}
        table.add_row(f"{task} {metric}", *["" if rows[name] is None else f"{rows[name]:.4f}" for name in names])
    Console(markup=False, emoji=False).print(table)
    print(f"\nthe results are in {Path(out, RESULTS)}")
