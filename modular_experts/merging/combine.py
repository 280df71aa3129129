"""Combine experts in several ways, measure what each way keeps of them, and name the best within some bytes.

All files lie in one directory, whose `combine.json` holds the measurements; the same call goes on where an earlier one
was interrupted.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from modular_experts.base import Base, DType
from modular_experts.base.device import device
from modular_experts.data import Batch, Inputs, TaskMixture
from modular_experts.data.rows import SPLITS, content_hash
from modular_experts.evaluation.likelihood import batch_losses, greedy_matches
from modular_experts.injection.attach import attached, describe_router
from modular_experts.library import StoredExpert, check_target, open_expert, open_experts
from modular_experts.library.atomic import new_file
from modular_experts.library.compatibility import open_parents, put_beside
from modular_experts.library.described import describe
from modular_experts.library.record import RECORD_FILE
from modular_experts.library.result_key import result_key
from modular_experts.library.statistics import OF_INPUTS
from modular_experts.merging.distill import distill, without_data
from modular_experts.merging.merged import merge
from modular_experts.merging.objective import Objective, ValidationRows, check_tasks, own_experts
from modular_experts.merging.route import route
from modular_experts.merging.shrink import shrink
from modular_experts.methods import Distilled
from modular_experts.progress import Counted, Progress
from modular_experts.routing import DEFAULT_ROUTER, Router

log = logging.getLogger(__name__)

MEASURED = "combine.json"
ROUTED = "routed"
"""Name of the routed experts, which lie in libraries beside the experts that they choose from."""
SHRINK_ROWS = 32
"""The most inputs of one task on which a shrunk expert is measured."""


@dataclass(frozen=True)
class Way:
    """One way to combine the experts, and its measurements.

    Attributes:
        name: What was done.
        place: Directory of the merged or routed expert.
        needs: What it was made from, beside the experts.
        bytes: Bytes that it takes beside the base: 0 for a merge, which is added to the base, and for a router the
            sum over itself and all experts.
        kept: Its exact match over the exact match of the experts, each on its own task; both are means over tasks.
        loss: Loss in nats a token, a mean over tasks.
        held_out: Exact match on held-out tasks, a mean over tasks in [0, 1]; None without such tasks.
        time: Time of a forward pass (CPU time, or wall-clock time on a GPU), with 1 for the base alone.
    """

    name: str
    place: str
    needs: str
    bytes: int
    kept: float
    loss: float
    held_out: float | None
    time: float


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
    overwrite: bool = False,
    progress: Progress = iter,
    base: str | None = None,
    dtype: DType | None = None,
) -> Combined:
    """Merge experts without data and by `distill`, put them behind a router as they are and shrunk, and measure all.

    Args:
        experts: Directories of the experts, or opened ones; each task is the own one of one expert.
        out: Directory of all that is made.
        data: Their tasks: ways learn from inputs of training rows, and are measured on validation rows. Tasks that are
            held out are measured on test rows. If not given, ways learn from three quarters of the inputs that the
            experts keep, and are measured against the experts' own answers to the others.
        distilled: Settings of `distill`; `rows` also limits the inputs that a router learns from.
        router: The router; `KernelRidge` if not given.
        overwrite: Replace what `out` holds of other experts, rows or settings.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base; as it is stored if not given, but float32 where a router learns.

    Raises:
        FileExistsError: `out` holds something else; nothing has been made yet.
        ValueError: There are no rows, a task has no expert of its own, or two experts have one name or one is called
            routed.
    """
    out = Path(out).expanduser()
    opened, method, router = open_experts(experts, base=base), distilled or Distilled(), router or DEFAULT_ROUTER()
    names = [*(expert.name for expert in opened), ROUTED]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two experts would be called {twice[0]} in one library; rename the directory of one of them")
    data = data or Inputs.kept_by(opened)
    data.read_for(Base.open(base, opened))
    held_in = [task for task, role in data.roles.items() if role == "held_in"]
    others = [task for task in data.roles if task not in held_in]
    own = own_experts(opened, held_in)
    check_tasks(opened, held_in)
    answer, measured = None, data.only(held_in)
    if isinstance(data, Inputs):
        answer, measured = method.max_new_tokens, data.part(True)
        rows: list[Any] = [one.ids.tolist() for prompts in data.prompts.values() for one in prompts]
    else:
        rows = [content_hash(found) for split in SPLITS for found in data.rows(split).values()]
    reading = [data.roles, data.max_length, data.chat_template, data.eval_limit]
    settings = [describe(method), describe_router(router), rows, reading, *[dtype] * bool(dtype)]
    file = _begin(out, result_key([expert.content_hash for expert in opened], settings), overwrite)
    learned = data.part(False) if isinstance(data, Inputs) else Inputs.read_from(data, ["train"], method.rows)
    how: dict[str, Any] = {"progress": progress, "base": base, "dtype": dtype}
    made = _make(opened, out, learned, method, router, how)
    known = json.loads(file.read_text(encoding="utf-8"))
    if left := [name for name in made if name not in known["ways"]]:
        log.info("measuring what %d ways keep", len(left))
        model: Any = Base.open(base, opened).load(dtype)
        measure = _Measure(model, own, measured, data.only(others) if others else None, answer, progress)
        for name in progress(Counted(left, "ways")):
            place, needs = made[name]
            known["ways"][name] = asdict(measure(name, open_expert(place), needs))
            with new_file(file) as temporary:
                temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return Combined([Way(**known["ways"][name] | {"place": str(place)}) for name, (place, _) in made.items()])


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


def _make(
    opened: Sequence[StoredExpert], out: Path, learned: Inputs, method: Distilled, router: Router, how: dict[str, Any]
) -> dict[str, tuple[Path, str]]:
    """Make what is not there yet, and return place and needs of each way by its name."""
    start, count = method.start or without_data(opened), max(map(len, learned.prompts.values()))
    merged, distilled, inputs = out / "merged", out / "distilled", f"{count} inputs a task"
    chooses = type(router).__name__
    if not _is_made(merged):
        log.info("merging without data, by %s", type(start).__name__)
        merge(opened, start, merged, progress=how["progress"])
    beside = [one for one in opened if not _is_made(out / "experts" / one.name)]
    for expert in beside:
        # What is taken of inputs comes from the rows that are learned alone.
        put_beside(expert, out / "experts" / expert.name, without=[f"{kind}.safetensors" for kind in OF_INPUTS])
    whole = [open_expert(out / "experts" / one.name) for one in opened]
    routed, small = out / "experts" / ROUTED, out / "small" / ROUTED
    if not _is_made(routed):
        log.info("putting %s in front of the experts", chooses)
        route(whole, routed, router, data=learned, rows=method.rows, **how)
    left = [one for one in whole if not _is_made(small.parent / one.name)]
    if left:
        log.info("shrinking %d experts", len(left))
    few = ValidationRows(learned, SHRINK_ROWS, how["base"], "experts", {}, method.max_new_tokens, how["dtype"])
    for done in shrink(left, few, small.parent, progress=how["progress"]) if left else ():
        if done.expert is None:
            put_beside(done.source, small.parent / done.source.name)
    if not _is_made(small):
        shrunk = [open_expert(small.parent / one.name) for one in opened]
        route(shrunk, small, router, data=learned, rows=method.rows, **how)
    if not _is_made(distilled):
        log.info("searching for the merge Distilled")
        distill(opened, distilled, method, learned, overwrite=True, **how)
    return {
        type(start).__name__: (merged, "no data"),
        f"{chooses}, experts as they are": (routed, inputs),
        f"{chooses}, shrunk experts": (small, inputs),
        "Distilled": (distilled, f"{inputs}, a search"),
    }


def _is_made(place: Path) -> bool:
    return (place / RECORD_FILE).is_file()


class _Measure:
    """Measures a merged or routed expert on the rows of its tasks, beside the base and each task's own expert.

    If `answer` is given, the experts' own answers, of at most `answer` tokens, take the place of the targets.
    """

    def __init__(
        self,
        model: Any,
        own: Mapping[str, StoredExpert],
        data: TaskMixture,
        held_out: TaskMixture | None,
        answer: int | None,
        progress: Progress,
    ) -> None:
        model.to(device())
        self._objective = Objective(model, data, own if answer else None, answer or 64, progress)
        self._held_out: list[Batch] = []
        if held_out:
            held_out.fit_context(data.context)
            self._held_out = [move_data_to_device(batch, model.device) for batch in held_out.test_dataloader()]
        self._own = 0.0
        for task, expert in own.items():
            with attached(model, expert, check=False):
                self._own += self._objective.losses(_matches, [task])[task] / len(own)
        self._seconds(batch_losses)  # warms up
        self._base = self._seconds(batch_losses)[1]

    def _seconds(self, measure: Callable[..., Any]) -> tuple[dict[str, float], float]:
        clock = time.process_time if device().type == "cpu" else time.perf_counter
        started = clock()
        return self._objective.losses(measure), clock() - started

    @torch.no_grad()
    def __call__(self, name: str, expert: StoredExpert, needs: str) -> Way:
        model, members = self._objective.model, [expert]
        if expert.is_routed:
            members += open_parents(expert)
        with attached(model, expert, check=False):
            losses, seconds = self._seconds(batch_losses)
            matches = fmean(self._objective.losses(_matches).values())
            by_task: dict[str, list[float]] = {}
            for batch in self._held_out:
                for task, right in zip(batch["task"], greedy_matches(model, batch).tolist(), strict=True):
                    by_task.setdefault(task, []).append(right)
        held_out = fmean(map(fmean, by_task.values())) if by_task else None
        size = sum(one.size_on_disk for one in members) if expert.is_routed else 0
        kept = matches / self._own if self._own else 0.0
        return Way(name, str(expert.path), needs, size, kept, fmean(losses.values()), held_out, seconds / self._base)


def _matches(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return for each row whether its target is the greedy answer, and 1, so that their ratio is the exact match."""
    matches = greedy_matches(model, batch).float()
    return matches, torch.ones_like(matches)
