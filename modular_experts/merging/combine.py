"""Combine experts in several ways, measure what each way keeps of them, and name the best within some bytes.

All files lie in one directory, whose `combine.json` holds the measurements; the same call goes on where an earlier one
was interrupted. Each way is measured before the next one is made, and the ways that take least time come first.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from modular_experts.base import Base, DType
from modular_experts.base.device import device
from modular_experts.base.verify import logits
from modular_experts.data import Inputs, TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.rows import SPLITS, content_hash
from modular_experts.experts.expert import ExpertFactory, title_of
from modular_experts.injection.attach import describe_router
from modular_experts.injection.task_heads import put_task_heads
from modular_experts.library import StoredExpert, check_target, open_expert, open_experts
from modular_experts.library.atomic import new_file
from modular_experts.library.compatibility import put_beside
from modular_experts.library.described import describe
from modular_experts.library.record import RECORD_FILE
from modular_experts.library.result_key import result_key
from modular_experts.library.statistics import OF_INPUTS
from modular_experts.merging.combine_measure import Measurement, Way, clock
from modular_experts.merging.combine_plan import WayWork, WholeProgress, Work, WorkEstimate, WorkPlan
from modular_experts.merging.distill import distill, distill_into, without_data
from modular_experts.merging.merged import merge
from modular_experts.merging.objective import ValidationRows, check_tasks, objective_on_base, own_experts
from modular_experts.merging.route import route, without_statistics
from modular_experts.merging.shrink import shrink
from modular_experts.merging.statistics import batches_by_length, take_statistics
from modular_experts.methods import Distilled
from modular_experts.progress import Counted, Progress
from modular_experts.routing import DEFAULT_ROUTER, Router
from modular_experts.routing.router import encoder_of
from modular_experts.training.estimate import logging_from

MEASURED = "combine.json"
ROUTED = "routed"
"""Name of the routed experts, which lie in libraries beside the experts that they choose from."""
SHRINK_ROWS = 32
"""The most inputs of one task on which a shrunk expert is measured."""
SHRINK_BATCH = 8
"""How many of them are read at once; a form that loses too much is left after any batch."""
MEASURED_ROWS = 64
"""The most rows of one task that measure a way, unless the data have an `eval_limit`."""
STEPS = 40
"""Steps of the search for `Distilled`, if the caller gives no settings: half of the method's own default."""
JUDGED_BATCHES = 2
"""How many batches of each task tell the loss before and after that search; the measurement of the way follows."""


@dataclass(frozen=True)
class Combined:
    """The ways that `combine` has made and measured."""

    ways: list[Way]

    def best(self, budget: int | None = None) -> Way:
        """Return the way that keeps most and takes at most `budget` bytes beside the base.

        If several keep as much, it is the one with the lowest loss.
        """
        fitting = [way for way in self.ways if budget is None or way.bytes <= budget]
        return max(fitting, key=lambda way: (way.kept, -way.loss))


def combine(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    data: TaskMixture | None = None,
    distilled: Distilled | None = None,
    router: Router | None = None,
    into: ExpertFactory | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
    base: str | None = None,
    dtype: DType | None = None,
    planned: Callable[[WorkPlan], None] | None = None,
    measured: Callable[[Way], None] | None = None,
) -> Combined:
    """Merge experts without data and by `distill`, put them behind a router as they are and shrunk, and measure all.

    Args:
        experts: Directories of the experts, or opened ones; each task is the own one of one expert.
        out: Directory of all that is made.
        data: Their tasks: ways learn from inputs of training rows, and are measured on validation rows, at most 64 of
            each task unless the data have an `eval_limit`. Tasks that are held out are measured on test rows. If not
            given, ways learn from three quarters of the inputs that the experts keep, and are measured against the
            experts' own answers to the others.
        distilled: Settings of `distill`; `rows` also limits the inputs that a router learns from. If not given, the
            search takes 40 steps.
        router: The router; `KernelRidge` if not given.
        into: Also train one expert of this type by `distill_into`.
        overwrite: Replace what `out` holds of other experts, rows or settings.
        progress: Wraps the hundredths of the whole work.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base; as it is stored if not given, but float32 where a router learns.
        planned: Gets the plan of the work that is left, before anything is made.
        measured: Gets each way as soon as it is measured; at first the ways that an earlier call measured.

    Raises:
        FileExistsError: `out` holds something else; nothing has been made yet.
        ValueError: There are no rows, a task has no expert of its own, or two experts have one name or one is called
            routed.
    """
    out = Path(out).expanduser()
    opened = open_experts(experts, base=base)
    method = distilled or Distilled(steps=STEPS)
    router = router or DEFAULT_ROUTER()
    names = [*(expert.name for expert in opened), ROUTED]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two experts would be called {twice[0]} in one library; rename the directory of one of them")
    rows = _divide(data or Inputs.kept_by(opened), opened, method, base)
    settings = [describe(method), describe_router(router), rows.content]
    if dtype:
        settings.append(dtype)
    file = _begin(out, result_key([expert.content_hash for expert in opened], settings), overwrite)
    known = json.loads(file.read_text(encoding="utf-8"))
    combining = _Combining(opened, out, rows, method, router, into, base, dtype)
    ways: dict[str, Way] = {}
    for name, making in combining.makings.items():
        if name in known["ways"]:
            # The directory may have moved since the way was measured.
            ways[name] = Way(**known["ways"][name] | {"place": str(making.place)})
            if measured:
                measured(ways[name])
    for way in combining.run([name for name in combining.makings if name not in ways], progress, planned):
        known["ways"][way.name] = asdict(way)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        # As the caller wrote it: the expert's own path is absolute.
        ways[way.name] = replace(way, place=str(combining.makings[way.name].place))
        if measured:
            measured(ways[way.name])
    return Combined([ways[name] for name in combining.makings])


def _begin(out: Path, key: str, overwrite: bool) -> Path:
    """Return the file of measurements of this work, and make an empty one if there is none."""
    file = out / MEASURED
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["key"] == key:
        return file
    check_target(out, overwrite, MEASURED)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    file.write_text(json.dumps({"key": key, "ways": {}}), encoding="utf-8")
    return file


def _is_made(place: Path) -> bool:
    return (place / RECORD_FILE).is_file()


@dataclass(frozen=True)
class _Rows:
    """The rows of a combination.

    Attributes:
        own: The own expert of each held-in task.
        learned: The inputs that ways learn from.
        measured: The rows that measure the ways.
        held_out: Held-out tasks, which are tested, if there are such.
        answer: The most tokens of the experts' own answers, if these are the targets of the measurement.
        content: What changes with any row, and with how rows become tokens.
    """

    own: Mapping[str, StoredExpert]
    learned: Inputs
    measured: TaskMixture
    held_out: TaskMixture | None
    answer: int | None
    content: list[object]


def _divide(data: TaskMixture, opened: Sequence[StoredExpert], method: Distilled, base: str | None) -> _Rows:
    """Divide the rows of some tasks into those that ways learn from and those that measure them."""
    data.read_for(Base.open(base, opened))
    held_in = [task for task, role in data.roles.items() if role == "held_in"]
    others = [task for task in data.roles if task not in held_in]
    own = own_experts(opened, held_in)
    check_tasks(opened, held_in)
    limit = data.eval_limit or MEASURED_ROWS
    reading = [data.roles, data.max_length, data.chat_template, limit]
    if isinstance(data, Inputs):
        ids = [prompt.ids.tolist() for prompts in data.prompts.values() for prompt in prompts]
        rows = _Rows(own, data.part(False), data.part(True), None, method.max_new_tokens, [ids, reading])
    else:
        learned = Inputs.read_from(data, ["train"], method.rows)
        held_out = data.only(others) if others else None
        hashes = [content_hash(part) for split in SPLITS for part in data.rows(split).values()]
        rows = _Rows(own, learned, data.only(held_in), held_out, None, [hashes, reading])
    rows.measured.eval_limit = limit
    if rows.held_out:
        rows.held_out.eval_limit = limit
    return rows


@dataclass(frozen=True)
class _Making:
    """How one way is made.

    Attributes:
        place: Directory of its expert.
        needs: What it is made from, beside the experts.
        make: Makes it, where it is not there yet.
        units: The share of the work that a loop of `make` over such items is.
    """

    place: Path
    needs: str
    make: Callable[[Progress], None]
    units: Mapping[str, float]


class _Combining:
    """Makes and measures the ways of one combination; what is there already stays."""

    def __init__(
        self,
        opened: Sequence[StoredExpert],
        out: Path,
        rows: _Rows,
        method: Distilled,
        router: Router,
        into: ExpertFactory | None,
        base: str | None,
        dtype: DType | None,
    ) -> None:
        self._opened = opened
        self._rows = rows
        self._router = router
        self._base = base
        self._dtype = dtype
        self._routed_rows = method.rows
        # Inputs that no step of the search sees would be answered for nothing.
        self._method = replace(method, rows=min(method.rows, method.steps * method.batch))
        self._start = method.start or without_data(opened)
        self._out = out
        self._whole = out / "experts"
        self._small = out / "small"
        self._measurement: Measurement | None = None
        chooses = type(router).__name__
        inputs = f"{max(map(len, rows.learned.prompts.values()))} inputs a task"
        # Forms are tried expert by expert, in a loop of their own.
        shrinking = {"tasks": 0.2, "forms": 0.8 / len(opened)}
        distilling = {"tasks": 0.2, "weights": 0.05, "steps": 0.5}
        put_router = partial(self._put_router, self._whole)
        self.makings = {
            type(self._start).__name__: _Making(out / "merged", "no data", self._merge, {"": 1.0}),
            f"{chooses}, experts as they are": _Making(self._whole / ROUTED, inputs, put_router, {}),
            f"{chooses}, shrunk experts": _Making(self._small / ROUTED, inputs, self._shrink, shrinking),
            "Distilled": _Making(out / "distilled", f"{inputs}, a search", self._distill, distilling),
        }
        if into:
            title = f"{title_of(into)} distilled"
            place = out / f"one-{result_key(title)[:8]}"
            train = partial(self._train_one, into, place)
            self.makings[title] = _Making(place, f"{inputs}, a training", train, {"tasks": 0.3, "steps": 0.7})

    def run(self, left: Sequence[str], progress: Progress, planned: Callable[[WorkPlan], None] | None) -> Iterator[Way]:
        """Make and measure the ways that are left, one after the other."""
        if not left:
            return
        work = self._work(left)
        if planned:
            planned(work.plan(self._seconds_of_a_token()))
        whole = WholeProgress(progress, work.tokens)
        # Before the measurement loads the base, which would lie in memory twice.
        with whole.part(work.prompts, {"batches": 1 / len(self._opened)}) as shown:
            self._read_prompts(shown)
        for name, way_work in work.ways.items():
            making = self.makings[name]
            with whole.part(way_work.making, making.units) as shown:
                if not _is_made(making.place):
                    making.make(shown)
            measure = self._measuring(whole, work)
            with whole.part(way_work.measuring, {"tasks": 1.0}) as shown:
                way = measure(name, open_expert(making.place), making.needs, shown)
            yield way
        whole.end()

    def _work(self, left: Sequence[str]) -> Work:
        """Return how many tokens the ways that are left read."""
        rows = self._rows
        structure = Base.open(self._base, self._opened).structure.model
        parameters = sum(parameter.numel() for parameter in structure.parameters())
        lengths = [len(example.tokens.ids) for example in self._measuring_examples()]
        reading = WorkEstimate(self._opened, rows.learned, self._method, parameters, lengths, rows.answer is not None)
        merged, routed, small, distilled, *one = self.makings
        # To make the way, and to measure it.
        tokens = {
            merged: (reading.merge(), reading.measure()),
            routed: (0.0, reading.routed()),
            small: (reading.shrink(SHRINK_ROWS), reading.routed()),
            distilled: (reading.distill(), reading.measure()),
        } | {name: (reading.train_one(), reading.measure()) for name in one}
        ways = {name: WayWork(self.makings[name].needs, *tokens[name]) for name in left}
        prompts = 0.0
        if routed in left or small in left:
            prompts = reading.prompts(self._router, self._routed_rows)
        return Work(ways, prompts, reading.own())

    def _measuring_examples(self) -> list[Example]:
        by_task = self._rows.measured.validation_examples(targets=self._rows.answer is None)
        return [example for examples in by_task.values() for example in examples]

    def _load(self) -> PreTrainedModel:
        model = Base.open(self._base, self._opened).load(self._dtype).to(device())  # type: ignore[arg-type]
        put_task_heads(model, self._opened)
        return model

    def _seconds_of_a_token(self) -> float:
        """Return how long the base takes for a token of the rows that measure, by a batch of them."""
        model = self._load()
        batches = batches_by_length(self._measuring_examples(), self._rows.measured)
        ids = batches[len(batches) // 2]["input_ids"].to(model.device)
        seconds = 0.0
        # The first pass warms up, and the second one counts.
        for _ in range(2):
            started = clock()
            logits(model, ids)
            seconds = clock() - started
        return seconds / ids.numel()

    def _measuring(self, whole: WholeProgress, work: Work) -> Measurement:
        if self._measurement is None:
            rows = self._rows
            with whole.part(work.own, {"tasks": 0.5}) as shown:
                self._measurement = Measurement(
                    self._load(), rows.own, rows.measured, rows.held_out, rows.answer, shown
                )
        return self._measurement

    def _read_prompts(self, progress: Progress) -> None:
        """Put the experts beside their routed one, and take there what the router learns from.

        A router reads prompts at its own depths alone, which takes a quarter of a pass by default.
        """
        # What is taken of inputs comes from the rows that are learned alone.
        without = [f"{kind}.safetensors" for kind in OF_INPUTS]
        for expert in self._opened:
            if not _is_made(self._whole / expert.name):
                put_beside(expert, self._whole / expert.name, without=without)
        kind = self._router.needs
        if kind not in OF_INPUTS:
            return
        lacking = without_statistics(self._beside(self._whole), self._router)
        if lacking:
            rows = ValidationRows(self._rows.learned, self._routed_rows, self._base, dtype=self._dtype)
            encoder = encoder_of(self._router)
            renew = encoder is not None
            take_statistics(lacking, kind, rows, renew, progress, depths=self._router.depths, encoder=encoder)

    def _beside(self, library: Path) -> list[StoredExpert]:
        return [open_expert(library / expert.name) for expert in self._opened]

    def _merge(self, progress: Progress) -> None:
        merge(self._opened, self._start, self._out / "merged", progress=progress)

    def _put_router(self, library: Path, progress: Progress) -> None:
        route(
            self._beside(library),
            library / ROUTED,
            self._router,
            data=self._rows.learned,
            rows=self._routed_rows,
            progress=progress,
            base=self._base,
            dtype=self._dtype,
        )

    def _shrink(self, progress: Progress) -> None:
        left = [expert for expert in self._beside(self._whole) if not _is_made(self._small / expert.name)]
        if left:
            data = self._rows.learned.only(list(self._rows.learned.roles))
            data.eval_batch_size = SHRINK_BATCH
            rows = ValidationRows(
                data, SHRINK_ROWS, self._base, "experts", {}, self._method.max_new_tokens, self._dtype
            )
            objective = objective_on_base(left, rows, progress=progress, model=self._model)
            for done in shrink(left, objective, self._small, progress=progress, stops_early=True):
                if done.expert is None:
                    put_beside(done.source, self._small / done.source.name)
        self._put_router(self._small, progress)

    def _distill(self, progress: Progress) -> None:
        distill(
            self._opened,
            self._out / "distilled",
            self._method,
            self._rows.learned,
            overwrite=True,
            progress=progress,
            base=self._base,
            dtype=self._dtype,
            read=partial(objective_on_base, model=self._model, judged=JUDGED_BATCHES),
        )

    def _train_one(self, into: ExpertFactory, place: Path, progress: Progress) -> None:
        # The whole progress stands in the place of a dozen lines about the training.
        with logging_from(logging.WARNING, "modular_experts"):
            distill_into(
                self._opened,
                place,
                into,
                tasks=self._rows.learned,
                rows=self._routed_rows,
                max_new_tokens=self._method.max_new_tokens,
                base=self._base,
                dtype=self._dtype or "float32",
                progress=progress,
                overwrite=True,
                trainer={"logger": False, "enable_checkpointing": False, "callbacks": [_Steps(progress)]},
            )

    @property
    def _model(self) -> PreTrainedModel | None:
        """The base that measures, if it is loaded already."""
        return None if self._measurement is None else self._measurement.model


class _Steps(Callback):
    """Shows the steps of a training in a progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._left = iter(self._progress(Counted(range(int(trainer.estimated_stepping_batches)), "steps")))

    def on_train_batch_end(self, *arguments: object) -> None:
        next(self._left, None)
