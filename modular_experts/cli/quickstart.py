"""Run `modular-experts quickstart`, which trains, merges, tests and reports on a small generated suite."""

import json
import shlex
import textwrap
from pathlib import Path

from rich.progress import BarColumn, TaskProgressColumn

from modular_experts.cli.format import progress_by_tenths
from modular_experts.cli.study import check_finished, study_progress, write_results
from modular_experts.quickstart import Plan, prepare_base, run_plan
from modular_experts.quickstart.run import FACTS
from modular_experts.reports.page import Section
from modular_experts.reports.tables import element, percent
from modular_experts.study.report import REPORT, figure_of


def quickstart(seed: int = 0, out: str = "runs/quickstart", tasks: int = 20) -> None:
    """Train a small base and experts of four kinds on generated text tasks, merge them, and report what that lost.

    Everything is trained from a seed, on the CPU, in about four minutes on two cores. The same command resumes an
    interrupted run. The directory then holds `base/` (a Llama checkpoint), `quickstart.svg`, and what `study` makes:
    `library/` (the experts and merges), `results.json`, `report.html`, `pieces.jsonl` and `runs/`.

    Args:
        seed: Seed of the words, the weights and the order of training.
        out: Directory of the run.
        tasks: How many of the 20 held-in tasks get experts, for a shorter run; at least 2.

    Examples:
        modular-experts quickstart
        modular-experts quickstart --seed 1 --out runs/quickstart-1
        modular-experts quickstart --tasks 5 --out runs/short
    """
    place, plan = Path(out), Plan(seed=seed, tasks=tasks)
    what, columns = "training a small base", ("{task.description}", BarColumn(None), TaskProgressColumn())
    with progress_by_tenths(*columns, line=lambda *now: f"{now[0]}: {now[1]:.0%}", transient=True) as bar:
        prepare_base(plan, place, lambda share: bar(what, share, 1))
    with study_progress() as show:
        study, state = run_plan(plan, place, show)
    check_finished(state, place)
    about, steps = _about_base(place), next_steps(plan, place)
    commands = [element("pre", element("code", command)) for command in steps]
    more = Section("Try next", "Look into the library, and merge two of these experts yourself", commands)
    results = write_results(study, place, state, [plan.tasks], [element("p", about, class_="lede")], [more])
    (place / "quickstart.svg").write_text(figure_of(results, dark=False), encoding="utf-8")
    print(f"a browser shows the page at\n  {(place / REPORT).absolute().as_uri()}\n\n{textwrap.fill(about, 80)}\n")
    print("to go on:")
    for command in steps:
        print(textwrap.indent(command, "  "))


def _about_base(place: Path) -> str:
    facts = json.loads((place / "base" / FACTS).read_text(encoding="utf-8"))
    latent, missed = percent(facts["latent"]["held_in"]["exact_match"]), not facts["target_reached"]
    return (
        f"The base is a small Llama ({facts['parameters']:,} parameters). It has learned all tasks, but mostly in a "
        f"format of its own, in which it answers {latent} % of the held-in test words."
        + " It ran out of steps before it reached its target."
        * missed
    )


def next_steps(plan: Plan, place: Path) -> list[str]:
    """Return commands to try next: look into the library, merge two experts of the run, and compare the three."""
    library, kind, tasks = place / "library", plan.kinds[0], list(plan.held_in.items())[:2]
    first, second = (shlex.quote(str(library / f"{kind}-{name}")) for name, _ in tasks)
    merged, compared = shlex.quote(str(library / "two")), shlex.quote(str(place / "two"))
    words = [f"{{name: {name}, source: {task.__name__}}}" for name, task in tasks]
    return [
        f"modular-experts list {shlex.quote(str(library))}",
        f"modular-experts merge --method TIES --out {merged} \\\n  --experts {first} \\\n  {second}",
        f"modular-experts evaluate --out {compared} \\\n  --tasks '[{', '.join(words)}]' \\\n"
        f"  --experts {first} \\\n  {second} {merged}",
    ]
