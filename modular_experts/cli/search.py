"""Run the commands that use rows: `adapt`, `combine`, `distill`, `search`, `statistics`, `route`, `shrink`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console
from torch import Tensor

from modular_experts.base import DType
from modular_experts.cli.format import call_text, counted, duration_text, expert_line, statistics_text, table_of
from modular_experts.data import TaskMixture
from modular_experts.discovery import import_systems
from modular_experts.experts import Expert, SparseExpert
from modular_experts.injection.attach import describe_router
from modular_experts.library import is_adapter
from modular_experts.library.form import Form
from modular_experts.merging.adapt import adapt as adapt_experts
from modular_experts.merging.combine import combine as combine_experts
from modular_experts.merging.combine_measure import Way
from modular_experts.merging.combine_plan import WorkPlan
from modular_experts.merging.distill import distill_into
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.route import route as route_experts
from modular_experts.merging.search import SearchAlgorithm
from modular_experts.merging.shrink import shrink as shrink_experts
from modular_experts.merging.statistics import take_statistics
from modular_experts.methods import Distilled, MergeMethod
from modular_experts.reports.progress import progress_bar
from modular_experts.routing import DEFAULT_ROUTER, Router
from modular_experts.text import bytes_of, bytes_text
from modular_experts.training.fit import FitSettings, quiet

# So that a config names the searches of related systems by their class alone.
import_systems("search")


def search(
    experts: list[str],
    measured: ValidationRows,
    out: str,
    algorithm: SearchAlgorithm | None = None,
    merges: list[MergeMethod] | None = None,
    overwrite: bool = False,
) -> None:
    """Find how much of each expert to merge, by the loss on validation rows, and merge.

    The merged expert holds the trials, and the same command makes it again.

    Args:
        measured: The rows on which the loss is measured.
        out: Directory of the merged expert; its last part is the name.
        algorithm: ATLAS or AdaMerging, the search of a related system, or the dotted path of a class of your own.
            ATLAS and AdaMerging take gradients, and learn a coefficient for each weight of an expert, or row of it.
            Default: ATLAS.
        merges: Methods whose merges the search combines with the experts, such as RegMean SparseAverage. The merges
            come before the experts, and each is also written as an expert, named after `out` and the method.

    Examples:
        modular-experts search --experts library/a library/b --tasks a.jsonl b.jsonl --out library/ab
        modular-experts search --experts library/a library/b --merges RegMean SparseAverage \\
            --tasks a.jsonl b.jsonl --out library/ab
    """
    algorithm = algorithm or ATLAS()
    done = algorithm.run(experts, measured, out, merges or (), overwrite, progress_bar("searching"))
    print(f"searched with {call_text(type(algorithm).__name__, vars(algorithm))}")
    for line in done.report():
        print(line)
    print(f"{out}: {expert_line(done.expert)}")


def adapt(
    experts: list[str],
    data: TaskMixture,
    out: str,
    expert: Callable[[Tensor], Expert] | None = None,
    modules: str | list[str] = "all-linear",
    steps: int = 16,
    learning_rate: float | None = None,
    folds: int = 3,
    neighbours: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    base: str | None = None,
    dtype: DType = "float32",
) -> None:
    """Train an expert of a new task on few rows, from the base or from a weighted sum of experts of other tasks.

    The nearest experts have the lowest losses on the rows; each gets a coefficient by gradient descent. The loss on
    rows that were left out chooses the start and the number of steps.

    Args:
        experts: Directories of experts of other tasks, such as library/*, which the shell expands.
        data: The new task. Its training and validation rows are divided into folds; its test rows are not read.
        out: Directory of the expert, which holds start and training in one delta.
        expert: The type of expert that is trained on top of the start. Default: SparseExpert.
        modules: The layers that it trains.
        steps: The most steps of training; the folds choose 0, a quarter, a half, three quarters or all of them.
        learning_rate: Peak rate; the type's own if not given.
        folds: How many parts of the rows are left out in turn, from 2 to 4.
        neighbours: How many of the nearest experts get a coefficient.
        seed: Seed of the folds and of the trainings.
        dtype: Data type of the base.

    Examples:
        modular-experts adapt --experts library/a library/b --tasks new.jsonl --out library/new
        modular-experts evaluate --experts library/new --tasks new.jsonl --out runs/new
    """
    how = (steps, learning_rate, folds, neighbours, seed, overwrite, base, dtype)
    done = adapt_experts(experts, data, out, expert or SparseExpert, modules, *how, progress_bar("adapting"))
    print(f"loss on {counted(done.rows, 'row')} of {done.expert.record['tasks'][0]}, each while it was left out")
    table = table_of("start", "loss", "after training", "steps")
    for name, start in done.starts.items():
        table.add_row(name, f"{start.loss(0):.4f}", f"{start.loss(start.best_steps):.4f}", str(start.best_steps))
    Console(markup=False, emoji=False).print(table)
    print(f"chosen: {done.chosen}, trained for {counted(done.steps, 'step')}")
    for place, weight in done.weights.items():
        print(f"  {weight:.3f} of {place}, whose loss alone is {done.alone[place]:.4f}")
    print(f"{out}: {expert_line(done.expert)}")


def distill(
    experts: list[str],
    out: str,
    into: Callable[[Tensor], Expert] | None = None,
    modules: str | list[str] = "all-linear",
    data: TaskMixture | None = None,
    rows: int = 400,
    max_new_tokens: int = 64,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    base: str | None = None,
    dtype: DType = "float32",
) -> None:
    """Train one expert that does what many experts do, without labels.

    Each expert answers inputs of its own task, and the new expert learns what it predicts at each token. That takes
    about as long as training the experts did, and keeps more of them than a merge. The method Distilled of `merge`
    learns coefficients from the same answers, which is faster.

    Args:
        experts: Directories of the experts, such as library/*, which the shell expands.
        out: Directory of the new expert.
        into: The type of the new expert: SparseExpert, LoRAExpert, FullExpert, or another. Default: SparseExpert.
        modules: The layers that it trains.
        data: The experts' tasks, whose training inputs are taken. Default: the inputs that the experts keep (`fit
            --keep_inputs`).
        rows: The most inputs of one task.
        max_new_tokens: The most tokens of an expert's answer.
        steps: Optimizer steps; three epochs if not given.
        learning_rate: Peak rate; the type's own if not given.
        batch_size: Rows of a step.
        seed: Seed of all random numbers.
        dtype: Data type of the base.

    Examples:
        modular-experts distill --experts library/a library/b --into LoRAExpert --out library/one
        modular-experts distill --experts library/a library/b --tasks a.jsonl b.jsonl --out library/one
    """
    given: FitSettings = {"batch_size": batch_size, "seed": seed, "overwrite": overwrite}
    if steps is not None:
        given["steps"] = steps
    if learning_rate is not None:
        given["learning_rate"] = learning_rate
    how = (rows, max_new_tokens, base, dtype, progress_bar("answering"))
    made = distill_into(experts, out, into or SparseExpert, modules, data, *how, **given)
    print(f"{out}: {expert_line(made)}")


def statistics(
    experts: list[str],
    kind: Literal["fisher", "gates", "gram", "merged_gram", "prompt_parts", "prompts"],
    data: TaskMixture | None = None,
    rows: int = 256,
    base: str | None = None,
    overwrite: bool = False,
    labels: Literal["rows", "experts"] = "rows",
    max_new_tokens: int = 64,
    dtype: DType = "float32",
    steps: int | None = None,
    encoder: str | None = None,
) -> None:
    """Measure statistics of experts that are to be merged or routed, and store them beside each expert.

    The merge methods Fisher, RegMean and RegMeanPlusPlus and some routers need them. Each expert is measured on
    the validation rows of the tasks that it was trained on (`prompts` and `prompt_parts` also on training inputs),
    never on test rows, at every weight that any of the experts moves.

    Args:
        kind: Fisher needs `fisher`, RegMean `gram`, RegMeanPlusPlus `merged_gram`, the router Centroid
            `prompts`, and KernelRidge and Classifier `prompt_parts`. `fisher` is one number per entry; `gram` one per
            pair of a layer's inputs; `merged_gram` the same in the course of the merge of exactly these experts;
            `prompts` the base's hidden states of each input, and its n-grams of tokens; `prompt_parts` adds the same
            of each input without its instruction, or without a part of its front. Phatgoose needs `gates`, one
            for each weight of an expert, which are trained with the expert frozen.
        data: The tasks of all these experts, and how their rows are read: what you gave to `fit`. Default: the inputs
            that the experts keep (`fit --keep_inputs`).
        overwrite: Replace statistics of this kind.
        labels: Take the targets of the `rows`, or the answers of the `experts` to the inputs of their own tasks.
        max_new_tokens: The most tokens of an expert's answer.
        steps: Steps of AdamW that train `gates`, each on a batch of rows; 100 by default.
        encoder: An encoder of sentences that reads the prompts, too, for a router that has it (`--router.encoder`).

    Examples:
        modular-experts statistics --experts library/a library/b --kind gram --tasks a.jsonl b.jsonl
        modular-experts merge --experts library/a library/b --method RegMean --out library/ab
    """
    bar = progress_bar("measuring")
    measured = ValidationRows(data, rows, base, labels, max_new_tokens=max_new_tokens, dtype=dtype)
    taken = take_statistics(experts, kind, measured, overwrite, bar, steps, encoder=encoder)
    for directory, stored in zip(experts, taken, strict=True):
        place = stored.file if is_adapter(Path(directory)) else Path(directory, *stored.file.parts[-2:])
        print(f"{place}: {kind} statistics of {statistics_text(stored)}")


def route(
    experts: list[str],
    out: str,
    router: Router | None = None,
    fallback: str | None = None,
    data: TaskMixture | None = None,
    rows: int = 256,
    overwrite: bool = False,
    base: str | None = None,
    dtype: DType = "float32",
) -> None:
    """Put experts behind a router, which chooses by the prompt or the token, and write both as one routed expert.

    A merge keeps part of its experts' skill; a router keeps each whole, and costs the memory of all of them. The
    result is an expert for test, predict, generate, evaluate, show, verify and push. It needs the experts, which lie
    beside it in the library; experts of another library are put there.

    Args:
        out: Directory of the routed expert.
        router: For each prompt, KernelRidge (the expert whose prompts are most alike, in meaning and in words),
            Centroid (the nearest mean of the experts' prompts), Classifier (trained on whose a prompt is) or Oracle
            (the expert of the row's task); for each token at each layer, Arrow and Energy (by the deltas alone) or
            Phatgoose (by gates trained after the experts); for every input the same, Constant (a weighted sum); or the
            dotted path of a class of your own. Default: KernelRidge.
        fallback: Directory of an expert, such as a merge, for prompts that are unlike the prompts of all experts.
            KernelRidge, Centroid, Classifier and Oracle find such prompts; other routers take no fallback. Default: the
            base alone.
        data: The experts' tasks, whose rows KernelRidge, Centroid, Classifier and Phatgoose learn from; not needed if
            `statistics` took what they need, or the experts keep inputs (`fit --keep_inputs`).
        dtype: Data type of the base where statistics are taken; bfloat16 takes half the memory.

    Examples:
        modular-experts route --experts library/a library/b --tasks a.jsonl b.jsonl --out library/routed
        modular-experts evaluate --experts library/routed --tasks a.jsonl b.jsonl --out runs/routed
    """
    chosen = router or DEFAULT_ROUTER()
    bar = progress_bar(f"taking {chosen.needs}")
    made = route_experts(experts, out, chosen, fallback, data, rows, overwrite, bar, base, dtype)
    count = len(made.record["parents"]) - (fallback is not None)
    settings = {
        name: value for name, value in describe_router(chosen).items() if name not in ("router", "select", "tasks")
    }
    behind = f", and {fallback} for prompts that it rejects" if fallback else ""
    print(f"{call_text(type(chosen).__name__, settings)} chooses among {counted(count, 'expert')}{behind}")
    print(f"{out}: routed, {made.size_on_disk:,} bytes beside its experts")


def shrink(
    experts: list[str],
    measured: ValidationRows,
    out: str,
    to: Literal["bfloat16", "int8", "int4", "magnitudes4", "magnitudes2", "sign"] | None = None,
    keep: float = 1.0,
    rank: int | None = None,
    bound: float = 0.01,
    overwrite: bool = False,
) -> None:
    """Store each expert in the fewest bytes that keep its loss, in another library.

    The command measures forms from the smallest upwards: values in few bits, for a low-rank or a full expert after a
    cut to fewer directions, for a sparse one perhaps without its smaller entries. It writes the first whose loss on the
    expert's tasks rises by at most the bound, and no expert if all forms lose more. It first fits the scales of values
    in one or two bits to the layers' outputs on these rows.

    Args:
        measured: The rows on which the loss is measured.
        out: The library of the shrunk experts, which keep their names.
        to: The one encoding that is tried; by default all that fit the expert.
        keep: With `to`, the share of the entries or tiles that stay, the largest ones.
        rank: With `to`, the most directions of each matrix.
        bound: How much the loss may rise, in nats a target token.
        overwrite: Replace experts in `out`.

    Examples:
        modular-experts shrink --experts library/a library/b --out small --tasks a.jsonl b.jsonl
        modular-experts shrink --experts library/a --to sign --keep 0.5 --bound 0.1 --out small --tasks a.jsonl
    """
    if to is None and (keep != 1 or rank is not None):
        raise ValueError("--keep and --rank belong to one encoding; name it, such as --to int4")
    form = Form(to, keep, rank) if to else None
    before: list[int] = []
    after: list[int] = []
    missed = []
    for shrunk in shrink_experts(experts, measured, out, form, bound, overwrite, progress_bar("shrinking")):
        table = table_of("form", "bytes", "loss")
        table.add_row("as it was", bytes_text(shrunk.before.bytes), f"{shrunk.before.loss:.4f}")
        for tried in shrunk.tried:
            mark = " (written)" if tried is shrunk.chosen else ""
            table.add_row(f"{tried.form}{mark}", bytes_text(tried.bytes), f"{tried.loss:.4f}")
        print(f"{shrunk.source.name}: loss on validation rows, at most {shrunk.before.loss + bound:.4f}")
        Console(markup=False, emoji=False).print(table)
        if shrunk.chosen:
            before.append(shrunk.before.bytes)
            after.append(shrunk.chosen.bytes)
        else:
            missed.append(shrunk.source.name)
    if after:
        sizes = f"{bytes_text(sum(after))} instead of {bytes_text(sum(before))}"
        print(f"{counted(len(after), 'expert')} in {out}: {sizes}")
    if missed:
        names = ", ".join(missed)
        raise ValueError(f"no smaller form of {names} keeps the loss within {bound:g}; allow more with --bound")


def combine(
    experts: list[str],
    out: str,
    data: TaskMixture | None = None,
    budget: str | None = None,
    distilled: Distilled | None = None,
    router: Router | None = None,
    into: Callable[[Tensor], Expert] | None = None,
    overwrite: bool = False,
    base: str | None = None,
    dtype: DType | None = None,
) -> None:
    """Make one model of many experts in four ways, measure what each keeps, and name the best.

    The ways are the best merge without data, a router in front of the experts as they are and of shrunk experts, and
    the merge Distilled. The command first tells how long each will take, and shows each as soon as it is measured. The
    same command goes on where it was interrupted.

    Args:
        experts: Directories of the experts, such as library/*, which the shell expands.
        out: Directory of all that is made.
        data: The experts' tasks: the ways learn from inputs of training rows, and are measured on at most 64 validation
            rows of each task (or `--eval_limit`); tasks with {role: held_out} on test rows. Default: the inputs that
            the experts keep (`fit --keep_inputs`), of which a quarter measures, against the experts' own answers.
        budget: The most bytes beside the base, such as 50MB; a merge takes none.
        distilled: Settings of the merge Distilled, such as --distilled.steps 80; 40 steps if you give none.
        router: The router, as for `route`.
        into: Also train one expert of this type on the experts' answers, as `distill` does, such as SparseExpert.
        overwrite: Replace what `out` holds of other experts, rows or settings.
        dtype: Data type of the base; by default as it is stored, but float32 where a router learns.

    Examples:
        modular-experts combine --experts library/* --out combined
        modular-experts combine --experts library/a library/b --tasks a.jsonl b.jsonl --budget 5MB --out combined
    """
    most = bytes_of(budget) if budget else None
    table = _GrowingTable(router or DEFAULT_ROUTER(), data is not None and "held_out" in data.roles.values())
    with quiet():
        bar = progress_bar("combining")
        how = distilled, router, into, overwrite, bar, base, dtype, _print_plan, table.add
        done = combine_experts(experts, out, data, *how)
    print("kept: exact match, 100 % for each task's own expert; bytes: beside the base; time: of a pass, base 1")
    within = f" within {budget}" if budget else ""
    best = done.best(most)
    print(f"best{within}: {best.name}, in {best.place}")
    command = f'generate "..." --experts {best.place}' if best.bytes else f"apply {best.place} --out checkpoint"
    print(f"next: modular-experts {command}")


def _print_plan(plan: WorkPlan) -> None:
    print(
        f"about {duration_text(plan.seconds)} in all: {duration_text(plan.before)} to measure each expert alone, then"
    )
    for way in plan.ways:
        print(f"  {way.name}: {duration_text(way.seconds)} ({way.needs})")
    print("each line below stays if you interrupt; the same command then goes on from there", flush=True)


class _GrowingTable:
    """Prints a line for each way as soon as it is measured, below a head; columns have a fixed width."""

    def __init__(self, router: Router, held_out: bool) -> None:
        # The longest name of a way.
        self._width = len(f"{type(router).__name__}, experts as they are")
        self._held_out = held_out
        self._has_head = False

    def add(self, way: Way) -> None:
        """Print the line of a way."""
        if not self._has_head:
            self._print("way", "kept", "loss", "held out", "bytes", "time", "needs")
        self._has_head = True
        held_out = "" if way.held_out is None else f"{way.held_out:.1%}"
        size = bytes_text(way.bytes)
        self._print(way.name, f"{way.kept:.1%}", f"{way.loss:.3f}", held_out, size, f"{way.time:.2f}", way.needs)

    def _print(self, name: str, kept: str, loss: str, held_out: str, size: str, time: str, needs: str) -> None:
        tested = f"  {held_out:>8}" if self._held_out else ""
        print(f"{name:<{self._width}}  {kept:>6}  {loss:>6}{tested}  {size:>8}  {time:>5}  {needs}", flush=True)
