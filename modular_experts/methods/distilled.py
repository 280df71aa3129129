"""Merge with a coefficient for each row, which a search learns from the experts' answers.

ProDistill (Xu et al., ICML 2025) learns one for each entry, also without labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, above, at_least


@dataclass(frozen=True)
class Distilled(MergeMethod):
    """Distilled: `sum_i c_i d_i`, d_0 being the merge by `start`, with a coefficient for each row of each weight.

    A search finds the coefficients on inputs of each task, by Adam with a rate that falls linearly to 0. It lowers the
    divergence `KL(expert || merge)` between what the task's own expert and the merged model predict at each token of
    the expert's answer. So it needs the base and inputs, and no labels: `merge --method Distilled`, in Python
    `distill`, takes the inputs that the experts keep, or reads them from task files.

    Args:
        start: The merge that the search starts from. Default: `IsoC` if all experts are LoRAs, otherwise `SelfRegMean`
            with `flatten` 0.5.
        steps: Steps of Adam, each on the next `batch` inputs of every task.
        batch: Inputs of one task in a step.
        learning_rate: Adam's first rate.
        rows: The most inputs of one task; with fewer than `steps` times `batch`, inputs come again.
        max_new_tokens: The most tokens of an expert's answer.
    """

    checks = Checks(**dict.fromkeys(("steps", "batch", "rows", "max_new_tokens"), at_least(1)))
    checks |= Checks(learning_rate=above(0))
    needs = Needs(inputs=True)

    start: MergeMethod | None = None
    steps: int = 80
    batch: int = 4
    learning_rate: float = 0.02
    rows: int = 320
    max_new_tokens: int = 64

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        raise ValueError("Distilled compares whole models on inputs, and cannot merge one weight; call distill")
