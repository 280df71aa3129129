"""Measure a way of `combine` on the rows of its tasks, beside the base and each task's own expert."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.base.device import device
from modular_experts.data import Batch, TaskMixture
from modular_experts.evaluation import answer_logits, row_sums
from modular_experts.injection.attach import attached
from modular_experts.library import StoredExpert
from modular_experts.library.compatibility import open_parents
from modular_experts.merging.objective import Objective
from modular_experts.progress import Counted, Progress


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
        time: Time of a forward pass (CPU time, or wall-clock time on a GPU) over one batch of each task, with 1 for the
            base alone.
    """

    name: str
    place: str
    needs: str
    bytes: int
    kept: float
    loss: float
    held_out: float | None
    time: float


def clock() -> float:
    """Return the time that passes count in, in seconds: CPU time, or wall-clock time on a GPU."""
    return time.process_time() if device().type == "cpu" else time.perf_counter()


class Measurement:
    """Measures ways on one loaded base, with one pass over each row.

    If `answer` is given, the experts' own answers, of at most `answer` tokens, take the place of the targets.

    Attributes:
        model: The base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        own: Mapping[str, StoredExpert],
        data: TaskMixture,
        held_out: TaskMixture | None,
        answer: int | None,
        progress: Progress,
    ) -> None:
        self.model = model
        self._batches = Objective(model, data, own if answer else None, answer or 64, progress).batches
        self._held_out: list[Batch] = []
        if held_out:
            held_out.fit_context(data.context)
            self._held_out = [move_data_to_device(batch, model.device) for batch in held_out.test_dataloader()]
        self._own = 0.0
        for task in progress(Counted(own, "tasks")):
            with attached(model, own[task], check=False):
                self._own += self._read(task).matches / len(own)
        # The experts' passes have warmed up.
        self._base = sum(_Passed.of(model, batches[:1]).seconds for batches in self._batches.values())

    def __call__(self, name: str, expert: StoredExpert, needs: str, progress: Progress = iter) -> Way:
        members = [expert]
        if expert.is_routed:
            members += open_parents(expert)
        with attached(self.model, expert, check=False):
            read = [self._read(task) for task in progress(Counted(self._batches, "tasks"))]
            by_task: dict[str, list[bool]] = {}
            for batch in self._held_out:
                for task, right in zip(batch["task"], _scores(self.model, batch).matches.tolist(), strict=True):
                    by_task.setdefault(task, []).append(right)
        matches = fmean(task.matches for task in read)
        return Way(
            name,
            str(expert.path),
            needs,
            bytes=sum(member.size_on_disk for member in members) if expert.is_routed else 0,
            kept=matches / self._own if self._own else 0.0,
            loss=fmean(task.loss for task in read),
            held_out=fmean(map(fmean, by_task.values())) if by_task else None,
            time=sum(task.seconds for task in read) / self._base,
        )

    def _read(self, task: str) -> "_Passed":
        return _Passed.of(self.model, self._batches[task])


class _Scores(NamedTuple):
    """The summed loss of each row, its number of labelled tokens, and whether its greedy answer is the target."""

    losses: Tensor
    tokens: Tensor
    matches: Tensor


@torch.no_grad()
def _scores(model: nn.Module, batch: Batch) -> _Scores:
    logits, labels = answer_logits(model, batch)
    wrong, _ = row_sums(batch, (logits.argmax(-1) != labels).int())
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses, tokens = row_sums(batch, F.cross_entropy(wide, labels, reduction="none"))
    return _Scores(losses, tokens, wrong == 0)


class _Passed(NamedTuple):
    """The loss of a task in nats a token, the share of its rows that match, and the seconds of its first batch."""

    loss: float
    matches: float
    seconds: float

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> "_Passed":
        started = clock()
        read = [_scores(model, batches[0])]
        # Waits for a GPU.
        read[0].losses.sum().item()
        seconds = clock() - started
        read += [_scores(model, batch) for batch in batches[1:]]
        summed = math.fsum(scores.losses.sum().item() for scores in read)
        tokens = sum(int(scores.tokens.sum()) for scores in read)
        matches = torch.cat([scores.matches for scores in read]).double().mean().item()
        return cls(summed / tokens, matches, seconds)
