"""Merge by WUDI: find the delta whose output on each expert's input subspace is closest to that expert's own output
(Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
arXiv 2503.08099).

The rows of an expert's matrix lie in the space of the inputs that it was trained on, so they stand for these inputs and
the method needs no data. The paper's two programs, FusionBench and mttl use different settings; these are the presets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.methods.average import Average
from modular_experts.methods.chunks import weighted_sum, widest_dtype
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import FROM_PRESET, check_choices, check_finite, with_presets
from modular_experts.methods.spectrum import as_delta, left_factor, spectrum

__all__ = ["WUDI"]

Solver = Literal["adam", "exact"]

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"power": 1.0, "learning_rate": 1e-5, "steps": 300, "average": False},
    "vit": {},
    "roberta": {"power": 2.0, "learning_rate": 2e-5},
    "fusion_bench": {"power": 2.0, "steps": 400},
    "mttl": {"power": 2.0, "average": True},
}


@with_presets(PRESETS)
@dataclass(frozen=True)
class WUDI(MergeMethod):
    """WUDI: `scale * t`, where t makes `sum_i |(t - d_i) d_i^T|^2 / |d_i|^power` small (Frobenius norms).

    The loss is quadratic. Solver `exact` gives its minimum, `t = (sum_i d_i A_i) (sum_i A_i)^+` with `A_i = d_i^T d_i /
    |d_i|^power`; of several minima the one of least norm, which plain gradient descent from the sum also reaches.
    Solver `adam` is the published one: it starts from the sum and stops long before the minimum, because no entry moves
    further than about `steps * learning_rate` (0.003 at the defaults). The minimum keeps experts apart that read
    different inputs (independent rows, as those of LoRAs of few directions); where their inputs nearly coincide and
    their outputs differ, it can be far longer than any expert.

    A weight that is not a matrix gets the mean over all experts, as in the paper's code; an expert that does not move a
    matrix does not enter its loss. With `exact`, one expert merges to itself, copies of it too, and scaling all scales
    the result. With `adam`, one expert merges to itself up to a few times the learning rate, since Adam takes whole
    steps along rounding errors too; copies merge to something between the expert and their sum, and a common factor
    changes how far Adam gets. The order of the experts does not matter. With `exact`, low-rank experts stay in factors
    and the result is low-rank where that is smaller; with `adam` it is dense. Sparse experts give a dense result. The
    method holds all experts' matrices of one weight at once, and Adam a few matrices more.

    Args:
        preset: Fills the settings that are not given: `vit` (the default) and `roberta` are the paper's two programs,
            `fusion_bench` and `mttl` other packages (mttl also stops when the loss hardly changes; here every step is
            taken).
        power: Power of the norm that divides each expert's loss: 1 in the paper's ViT program, 2 in the others.
        learning_rate: Learning rate of Adam: 1e-5, or 2e-5 for `roberta`.
        steps: Number of steps of Adam: 300, or 400 for `fusion_bench`.
        average: Whether to divide the result by the number of experts, as `mttl` does.
        solver: `adam` as published, or `exact`, which ignores `learning_rate` and `steps`.
        scale: Factor of the result.
    """

    needs = Needs(matrices=4.0, matrices_per_expert=4.0, squares=6.0)

    preset: Literal["vit", "roberta", "fusion_bench", "mttl"] | None = None
    power: float = FROM_PRESET
    learning_rate: float = FROM_PRESET
    steps: int = FROM_PRESET
    average: bool = FROM_PRESET
    solver: Solver = "adam"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        for field in ("power", "learning_rate", "steps"):
            check_finite(self, field, getattr(self, field))
            if getattr(self, field) < 0:
                raise ValueError(f"WUDI: {field} must be at least 0, got {getattr(self, field)}")
        check_choices(self, solver=Solver)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        movers = [delta.to(dtype=torch.float64) for delta in deltas if not delta.is_empty and delta.norm() > 0]
        if not movers:
            return Sparse.zero(deltas[0].shape, deltas[0].device)
        inputs, outputs = self._loss(movers)
        scale = self.scale / len(deltas) if self.average else self.scale
        if self.solver == "exact":
            found = spectrum(Dense(inputs))
            return as_delta(scale * (outputs @ found.right.T) / found.values, found.left.T, deltas)
        total = weighted_sum(movers, [1.0] * len(movers)).dense()
        return Dense((scale * self._descend(total, inputs, outputs)).to(widest_dtype(deltas)))

    def _loss(self, movers: Sequence[Delta]) -> tuple[Tensor, Tensor]:
        """Return X `(in, k)` and Y `(out, k)` for which the loss of t is `|t X - Y|^2`.

        `|(t - d) d^T|` stays the same if a right factor of d, which has the same `d^T d`, replaces `d^T`.
        """
        inputs = [left_factor(delta.T) / delta.norm() ** (self.power / 2) for delta in movers]
        outputs = [delta.linear(x.T).T for delta, x in zip(movers, inputs, strict=True)]
        return torch.cat(inputs, 1), torch.cat(outputs, 1)

    def _descend(self, start: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return t after the steps of Adam."""
        gradient, place = _gradient(inputs, outputs), torch.nn.Parameter(start)
        optimizer = torch.optim.Adam([place], lr=self.learning_rate)
        for _ in range(self.steps):
            place.grad = gradient(place.detach())
            optimizer.step()
        return place.detach()


def _gradient(inputs: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the gradient of `|t X - Y|^2` as a function of t, in the form that costs less per step."""
    if 2 * inputs.shape[1] < inputs.shape[0]:
        return lambda place: 2 * (place @ inputs - outputs) @ inputs.T
    square, product = inputs @ inputs.T, outputs @ inputs.T
    return lambda place: 2 * (place @ square - product)
