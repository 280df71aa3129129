"""Write the page of a comparison: means by model, every task, the answers to some rows, and how it was made."""

from functools import partial
from pathlib import Path

from modular_experts.evaluation.forgetting import forgetting_table
from modular_experts.reports import Results
from modular_experts.reports.page import Section, answers_section, telling_example, write_page
from modular_experts.reports.results import METRICS, ROLES, SHARES, format_of, leads
from modular_experts.reports.tables import Column, Line, Table, element, listed, note


def write_comparison(results: Results, file: Path) -> None:
    """Write the page of the results of `evaluate`, for one model or several."""
    facts = results.facts
    metric = results.main_metric
    models = results.values("model")
    rows = facts["examples"]
    sections = [Section("All models", "Means over the tasks of each role", [results.html(), note(_about(results))])]
    if len(models) > 1:
        title = f"{METRICS.get(metric, metric)} of each model, task by task"
        parts = [every_task(results).html()]
        if any(_is_own(results, model, task) for model in models for task in results.values("task")):
            parts.append(note("Underlined: a task on which the model, or an expert in it, was trained."))
        sections.append(Section("Every task", title, parts))
    if "forgetting" in facts:
        texts = facts["forgetting"]
        told = note(f"The loss of {texts['tokens']} tokens in nats per token, and its rise above the base's.")
        sections.append(Section("Forgetting", "What the models forget", [forgetting_table(texts).html(), told]))
    lede = [element("p", "On the base ", element("code", str(facts["base"])), class_="lede")]
    if rows:
        sections.append(answers_section(rows, metric))
        lede += telling_example(rows, metric, models[0], models[1:] or models)
    about = {"base": facts["base"], "data type": facts["dtype"]}
    # The base alone has no members, and may be called "base" itself.
    about |= {
        model: " + ".join(member["place"] for member in members)
        for model, members in facts["models"].items()
        if members
    }
    write_page(file, results, _leader(results, metric), sections, about, lede)


def _is_own(results: Results, model: str, task: str) -> bool:
    return task in results.facts.get("own", {}).get(model, ())


def every_task(results: Results) -> Table:
    """Return a table with a line for each task, grouped by roles, and a column for each model: its main metric."""
    metric = results.main_metric

    def column(model: str) -> Column:
        return Column(
            model,
            partial(Results.mean, metric=metric, model=model),
            format_of(metric),
            metric in SHARES,
            best=partial(leads, metric=metric, model=model),
            underlined=lambda rows: _is_own(rows, model, rows.values("task")[0]),
        )

    groups = [
        [Line(task, results.where(task=task)) for task in results.where(role=role).values("task")]
        for role in ROLES
        if role in results.values("role")
    ]
    columns = [column(model) for model in results.values("model")]
    return Table(columns, groups, f"{METRICS.get(metric, metric)} of every task")


def _leader(results: Results, metric: str) -> str:
    role = next(role for role in ROLES if role in results.values("role"))
    values = {model: results.mean(metric, model=model, role=role) for model in results.values("model")}
    first = next(iter(values))
    unit = " %" if metric in SHARES else ""
    texts = {model: format_of(metric)(value) + unit for model, value in values.items() if value is not None}
    means = {mean["model"]: mean for mean in results.facts["means"] if (mean["role"], mean["metric"]) == (role, metric)}
    top = [model for model in texts if means[model]["leads"]]
    shown = listed([*dict.fromkeys(texts[model] for model in top or texts)])
    beside = f", {first} {texts[first]}" if top and first not in top else ""
    what = f"{ROLES[role]} tasks: {METRICS.get(metric, metric).removesuffix(' %')} {shown}{beside}"
    if len(values) == 1:
        return f"{first} on {what}"
    leaders = f"{listed(top)} are level and lead" if len(top) > 1 else f"{''.join(top)} is best"
    return f"{leaders if top else 'All models are level'} on {what}"


def _about(results: Results) -> str:
    rows = {task: results.where(task=task).rows[0]["rows"] for task in results.values("task")}
    tokens = results.facts["max_new_tokens"]
    answers = f" Answers are greedy, and at most {tokens} tokens long." if tokens else ""
    shots = results.facts.get("shots")
    shown = f" Up to {shots} demonstrations of its task stand before each row." if shots else ""
    return (
        f"Each number is a mean over tasks, of {sum(rows.values())} test rows in all; ± is half the 95 % interval over "
        "such rows: Wilson's where a row is right or wrong, else a bootstrap. Bold: best, or not significantly worse "
        f"(paired 95 % interval). The loss is in nats per target token.{answers}{shown}"
    )
