"""Run `modular-experts merge` and `remove`, which merge experts into one, and take one out of a merge again.

The option `--data` does not import `TaskMixture`, so that a plain merge does without Lightning.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from modular_experts.base import Base, DType, Origin
from modular_experts.base.base import find_base
from modular_experts.base.files import MANIFEST, found_or_fetched, weight_files
from modular_experts.base.verify import Check
from modular_experts.cli.format import counted, expert_line, print_check, share_text, table_of, value_text
from modular_experts.library import StoredExpert, check_target, open_expert, open_experts
from modular_experts.library.described import describe
from modular_experts.library.form import Form
from modular_experts.library.record import RECORD_FILE, Facts
from modular_experts.merging.estimate import WeightEstimate, check_memory, estimate_merge, largest
from modular_experts.merging.merged import Merged, warn_of_own_parents, write_merged
from modular_experts.merging.remove import remove as remove_expert
from modular_experts.methods import MergeMethod
from modular_experts.reports.progress import progress_bar
from modular_experts.study.parser import make
from modular_experts.text import bytes_of, bytes_text, in_any_block

if TYPE_CHECKING:
    from modular_experts.data import TaskMixture
    from modular_experts.merging.tune import Tuned


@dataclass(frozen=True)
class Rows:
    """The tasks whose rows tell what to merge.

    Args:
        tasks: Task files, or tasks with settings, as for `fit`.
        max_length: The most tokens of a row.
        chat_template: Put the input through the tokenizer's chat template.
        eval_batch_size: Rows that are measured at once; changes the speed only.
        eval_limit: The most validation rows of one task.
    """

    tasks: list  # of any type a parser would read YAML in texts
    max_length: int = 1024
    chat_template: bool = False
    eval_batch_size: int = 16
    eval_limit: int | None = None


@dataclass(frozen=True)
class Tuning:
    """How the settings of a merge method are chosen.

    Args:
        rows: The most rows of one task, spread evenly over its validation rows.
        grid: Values to try, by setting of the method: {keep: [0.1, 0.2]}; one value fixes it: {scale: [1]}.
        labels: Take the targets of the `rows`, or the answers of the `experts` to the inputs of their own tasks.
        expert_of: Directory of the expert of each task, such as {dates: library/dates}; by default the record tells it.
        max_new_tokens: The most tokens of an expert's answer.
    """

    rows: int = 64
    grid: dict[str, list[Any]] = field(default_factory=dict)
    labels: Literal["rows", "experts"] = "rows"
    expert_of: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Output:
    """What a merge writes, and how much memory it may take.

    Args:
        output: `checkpoint` writes base plus merge for transformers; the checkpoint is checked by loading it.
        dtype: Data type of a checkpoint, by default the base's; or of an expert's values: float32, the default, or
            bfloat16.
        rank: The most directions of each matrix of an expert. They are the nearest, by singular values; by default all.
        tolerance: Largest accepted difference of a logit between a checkpoint and the model in memory.
        max_memory: Refuse to begin if more memory is needed, such as 2GB. It counts beside Python's own memory and, for
            a checkpoint, beside the base that it is checked with.
    """

    output: Literal["expert", "checkpoint"] = "expert"
    base: str | None = None
    dtype: DType | None = None
    rank: int | None = None
    tolerance: float = 1e-3
    max_memory: str | None = None

    @property
    def is_checkpoint(self) -> bool:
        return self.output == "checkpoint"

    def __post_init__(self) -> None:
        if self.is_checkpoint and self.rank is not None:
            raise ValueError("--rank is for an expert, and a checkpoint holds whole matrices; leave out one of the two")
        if not self.is_checkpoint and self.tolerance != 1e-3:
            raise ValueError("tolerance is a setting of a checkpoint; add --output checkpoint")
        if not self.is_checkpoint and self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"an expert is stored in float32 or bfloat16, not {self.dtype}, which a checkpoint takes")

    @property
    def form(self) -> Form:
        """How an expert is stored."""
        return Form(self.dtype or "float32", rank=self.rank)


def merge(
    experts: list[str],
    out: str,
    method: MergeMethod | None = None,
    per_weight: dict[str, MergeMethod | None] | None = None,
    overwrite: bool = False,
    tune: Tuning | None = None,
    dry_run: bool = False,
    data: Rows | None = None,
    written: Output = Output(),
    skip: bool = False,
) -> None:
    """Merge experts of one base into a new expert, or straight into a checkpoint.

    Which method? With inputs of each task, Distilled; with labelled rows, `search` or --tune; without, IsoC for LoRAs
    and SelfRegMean for others.

    The experts may be of any kinds. The result is an expert like any other: test it with `test --experts`,
    make it a checkpoint with `apply`, or merge it again. The same command resumes a merge that was interrupted.

    Args:
        out: Directory of the merged expert; its last part is the name. Or the directory of the checkpoint.
        method: A merge method, which makes the deltas of one weight one; or the dotted path of a class of your own,
            such as my_methods.Median in the current directory.
        per_weight: Methods by a regular expression for a weight's name. It matches the whole name, and null keeps the
            weight at the base. The first match counts; without `method`, weights without a match stay at the base.
        tune: Choose the method's settings on rows of --tasks. The lowest loss on validation rows decides about the
            scale, the exponent if there is one, and the settings in `tune.grid`. Without a method, it tunes IsoC
            for LoRAs, and SelfRegMean for other experts.
        dry_run: Only show the method and the memory of each weight; nothing is tuned.
        data: Tasks for --tune, and for a method that needs inputs, such as Distilled. --tune measures their validation
            rows; Distilled reads inputs of training and validation rows. Default: the inputs that the experts keep.
        written: What is written, and the most memory.
        skip: Leave out experts that cannot be merged. The log names them, such as an adapter with a trained head of a
            tied base; without this option they stop the merge.

    Examples:
        modular-experts merge --experts library/a library/b --method SparseAverage --out library/ab
        modular-experts merge --experts library/a library/b --tune --tasks a.jsonl b.jsonl --out library/ab
        modular-experts merge --experts library/a library/b --method TIES --method.keep 0.1 --out library/ab
    """
    if method and method.needs.inputs:
        if per_weight or tune or dry_run or written != Output(base=written.base):
            kind = type(method).__name__
            raise ValueError(f"{kind} searches, and writes an expert; give out, base, overwrite, skip and data alone")
        check_target(out, overwrite)
        _distill(open_experts(experts, base=written.base, skip=skip), out, method, data, overwrite, written.base)
        return
    if data and not tune:
        raise ValueError("--tasks are for --tune, and for a method that needs inputs, such as Distilled; add --tune")
    if tune and per_weight:
        raise ValueError("tuning chooses the settings of one method for all weights; leave per_weight out")
    if not dry_run:
        check_target(out, overwrite, MANIFEST if written.is_checkpoint else RECORD_FILE)
    opened = open_experts(experts, base=written.base, skip=skip, on_answers=not written.is_checkpoint)
    warn_of_own_parents(opened)
    if tune and method is None:
        from modular_experts.merging.distill import without_data

        method = without_data(opened)
    merged = Merged(opened, method, per_weight)
    if written.base:
        Base.open(written.base, merged.stored)  # which refuses another base than theirs
    if written.max_memory:
        check_memory(estimate_merge(merged), bytes_of(written.max_memory))
    if dry_run:
        _print_plan(merged)
    elif tune and method:
        tuned = _tuned(merged, method, tune, _mixture(data), written)
        _write_and_print(Merged(merged.stored, tuned.method), out, written, overwrite, tuned, "scale" in tune.grid)
    else:
        _write_and_print(merged, out, written, overwrite)


def _write_and_print(
    merged: Merged,
    out: str,
    written: Output,
    overwrite: bool,
    tuned: "Tuned | None" = None,
    is_scale_given: bool = False,
) -> None:
    """Write a merge, and tell what it is, first how its settings were found."""
    notes = tuned.notes if tuned else {}
    check = None
    if written.is_checkpoint:
        check = _write_checkpoint(merged, out, written, overwrite, notes)
    else:
        write_merged(merged, out, overwrite, progress_bar("merging"), notes, written.form)
    if tuned:
        _report(tuned, not is_scale_given, out)
    texts = Counter(map(_method_text, merged.rules.values()))
    for text, number in texts.items():
        weights = f" in {counted(number, 'weight')}" if len(texts) > 1 else ""
        print(f"merged {counted(len(merged.experts), 'expert')} with {text}{weights}")
    _print_kept(merged)
    if not written.is_checkpoint:
        _print_experts(merged, out)
        return
    print_check(check)
    print(f"{out}: a checkpoint of the base and the merge")
    if merged.beside():
        print("the experts of the tasks are not part of a checkpoint; merge into an expert to get them")


def _write_checkpoint(merged: Merged, out: str, written: Output, overwrite: bool, notes: Facts) -> Check | None:
    record = merged.record()
    origin = Origin({name: record[name] for name in ("parents", "method", "per_weight")} | {**notes}, merged.key())
    return Base.open(written.base, merged.stored).write(
        merged,
        out,
        dtype=written.dtype,
        tolerance=written.tolerance,
        overwrite=overwrite,
        progress=progress_bar("merging"),
        origin=origin,
    )


def _report(tuned: "Tuned", searched: bool, out: str) -> None:
    """Print the best trials, and whether a scale that was searched is at an end; write them all into the result."""
    from modular_experts.merging.objective import mean_loss, write_trials
    from modular_experts.merging.tune import SCALES

    table = table_of(*tuned.best.settings, "validation loss", left=0)
    for trial in sorted(tuned.trials, key=lambda trial: trial.loss)[:8]:
        loss = "not finite" if trial.loss == math.inf else f"{trial.loss:.4f}"
        table.add_row(*map(value_text, trial.settings.values()), loss)
    Console(markup=False, emoji=False).print(table)
    base = mean_loss(tuned.base)
    best = tuned.best.loss
    where = f"on validation rows of {', '.join(tuned.base)}"
    print(f"chose the best of {len(tuned.trials)} settings {where}: loss {best:.4f}, and {base:.4f} of the base alone")
    if tuned.stored != best:
        print(f"as it is stored, in fewer bytes, the merge has a loss of {tuned.stored:.4f} there")
    if best >= base:
        print("no setting lowers the loss of the base: these experts do not help on these tasks")
    scale = tuned.best.settings.get("scale")
    if searched and scale in (SCALES[0], SCALES[-1]):
        print(f"the best scale, {scale:g}, is at the end of the search; name scales beyond it in --tune.grid.scale")
    print(f"all trials are in {write_trials(out, tuned.trials)}")


def _distill(
    experts: list[StoredExpert], out: str, method: Any, data: Rows | None, overwrite: bool, base: str | None
) -> None:
    from modular_experts.merging.distill import distill

    done = distill(experts, out, method, _mixture(data), overwrite, progress_bar("distilling"), base)
    print(f"merged {counted(len(experts), 'expert')} with {_method_text(method)}")
    for line in done.report():
        print(line)
    print(f"{out}: {expert_line(done.expert)}")


def _mixture(rows: Rows | None) -> "TaskMixture | None":
    from modular_experts.data import TaskMixture

    return make("--data", TaskMixture, vars(rows)) if rows else None


def _tuned(merged: Merged, method: MergeMethod, tune: Tuning, data: "TaskMixture | None", written: Output) -> "Tuned":
    from modular_experts.merging.objective import ValidationRows
    from modular_experts.merging.tune import tune as tune_settings

    rows = ValidationRows(data, tune.rows, written.base, tune.labels, tune.expert_of, tune.max_new_tokens)
    form = Form() if written.is_checkpoint else written.form
    return tune_settings(merged.stored, method, rows, grid=tune.grid, progress=progress_bar("tuning"), form=form)


def _print_experts(merged: Merged, out: str) -> None:
    stored = open_expert(out)
    print(f"{out}: {expert_line(stored)}")
    if cut := (stored.record["hyperparameters"] or {}).get("cut"):
        print(f"rank {cut['rank']} keeps {share_text(cut['squared_norm_kept'])} of the merge's squared norm")
    with suppress(OSError, ValueError):  # the base is on another machine
        files = ["*.json", "*.safetensors"]
        base = str(find_base(merged.stored))
        place = found_or_fetched("base", base, merged.base["revision"], files, "", local_only=True)
        size = sum(file.stat().st_size for file in weight_files(place))
        if 2 * stored.size_on_disk > size:
            print(
                f"it takes {bytes_text(stored.size_on_disk)}, and its base {bytes_text(size)}. In fewer bytes: "
                "--output checkpoint (base and merge in one), --dtype bfloat16, --rank 16 (16 directions), or "
                f"modular-experts shrink {out} --out small --tasks ... (the fewest bytes that keep its loss)"
            )
    for name in merged.beside():
        print(f"{out}-{name}: for the tasks of {name}, {expert_line(open_expert(f'{out}-{name}'))}")


def remove(merged: str, expert: str, out: str, overwrite: bool = False) -> None:
    """Take an expert out of a merge by Average or TaskArithmetic; the other experts are not needed.

    A merge of the others would give the same result, but for rounding. Other methods are not linear: merge again.

    Args:
        merged: Directory of the merged expert.
        expert: Directory of the expert to take out, one of its parents.
        out: Directory of the result.

    Examples:
        modular-experts remove --merged library/abc --expert library/c --out library/ab
    """
    left = remove_expert(merged, expert, out, overwrite, progress_bar("removing"))
    count = len(left.record["parents"])
    print(f"took {expert} out of {merged}; {count} expert{'s are' if count > 1 else ' is'} left")
    print(f"{out}: {expert_line(left)}")


def _print_plan(merged: Merged) -> None:
    weights = estimate_merge(merged)
    table = table_of("weight", "shape", "method", "experts", "to read", "memory", left=3)
    texts = dict.fromkeys(_method_text(weight.method) for weight in weights)
    numbers = {text: number for number, text in enumerate(texts, 1)}
    # Weights that differ in the number of their layer alone share a row.
    groups: dict[tuple[str, Sequence[int], str], list[WeightEstimate]] = {}
    for weight in weights:
        groups.setdefault((in_any_block(weight.name), weight.shape, _method_text(weight.method)), []).append(weight)
    for (name, shape, method), members in groups.items():
        name = (members[0].name if len(members) == 1 else name).removesuffix(".weight")
        few = min(weight.experts for weight in members)
        many = max(weight.experts for weight in members)
        table.add_row(
            f"{len(members)} x {name}" if len(members) > 1 else name,
            " x ".join(map(str, shape)),
            f"{numbers[method]}: {method.partition('(')[0]}",
            str(few) if few == many else f"{few} to {many}",
            bytes_text(sum(weight.read for weight in members)),
            bytes_text(max(weight.peak for weight in members)),
        )
    Console(markup=False, emoji=False).print(table)
    for text, number in numbers.items():
        print(f"method {number}: {text}")
    _print_kept(merged)
    most = largest(weights)
    read = bytes_text(sum(weight.read for weight in weights))
    print(f"{len(weights)} weights of {len(merged.experts)} experts, {read} to read")
    print(f"memory beside Python's own: about {bytes_text(most.peak)}, for {most.name}")
    print("nothing was written")


def _print_kept(merged: Merged) -> None:
    if kept := sorted({name for expert in merged.experts for name in expert} - set(merged)):
        others = " and others" if len(kept) > 1 else ""
        print(f"at the base stay {counted(len(kept), 'weight')}: {kept[0]}{others}")


def _method_text(method: MergeMethod) -> str:
    return value_text(describe(method))
