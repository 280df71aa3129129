"""WUDI finds the delta whose output on each expert's input subspace is closest to that expert's own output (Cheng et
al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors", arXiv
2503.08099). The rows of an expert's matrix stand for the inputs that it was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.methods.average import Average
from modular_experts.methods.chunks import weighted_sum, widest_dtype
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import FROM_PRESET, Checks, Presets, at_least, one_of
from modular_experts.methods.spectrum import as_delta, left_factor, spectrum

Solver = Literal["adam", "exact"]

PRESETS: Presets = {
    None: {"power": 1.0, "learning_rate": 1e-5, "steps": 300},
    "vit": {},
    "roberta": {"power": 2.0, "learning_rate": 2e-5},
}


@dataclass(frozen=True)
class WUDI(MergeMethod):
    """WUDI: `scale * t`, where t makes `sum_i |(t - d_i) d_i^T|^2 / |d_i|^power` small (Frobenius norms).

    Solver `exact` gives the minimum of this quadratic loss, `t = (sum_i d_i A_i) (sum_i A_i)^+` with `A_i = d_i^T d_i /
    |d_i|^power`, which can be far longer than any expert where inputs nearly coincide and outputs differ. Solver `adam`
    is the published one: it starts from the sum and stops long before the minimum, because no entry moves further than
    about `steps * learning_rate`. A weight that is not a matrix gets the mean over all experts, as in the paper's code.

    Args:
        power: Power of the norm that divides each expert's loss.
        learning_rate: Learning rate of Adam.
        steps: Number of steps of Adam.
        solver: `adam` as published, or `exact`, which ignores `learning_rate` and `steps`.
        preset: Fills what is not given: `vit` (the default) and `roberta` are the paper's two programs.
    """

    presets = PRESETS
    checks = Checks(solver=one_of(Solver), power=at_least(0), learning_rate=at_least(0), steps=at_least(0))
    needs = Needs(matrices=4.0, matrices_per_expert=4.0, squares=6.0)

    preset: Literal["vit", "roberta"] | None = None
    power: float = FROM_PRESET
    learning_rate: float = FROM_PRESET
    steps: int = FROM_PRESET
    solver: Solver = "adam"
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        movers = [delta.to(dtype=torch.float64) for delta in deltas if not delta.is_empty and delta.norm() > 0]
        if not movers:
            return Sparse.zero(deltas[0].shape, deltas[0].device)
        # The loss of t is `|t X - Y|^2` for X `(in, k)` and Y `(out, k)`.
        rows = [left_factor(delta.T) / delta.norm() ** (self.power / 2) for delta in movers]
        inputs = torch.cat(rows, 1)
        outputs = torch.cat([delta.linear(x.T).T for delta, x in zip(movers, rows, strict=True)], 1)
        if self.solver == "exact":
            basis = spectrum(Dense(inputs))
            return as_delta(self.scale * (outputs @ basis.right.T) / basis.values, basis.left.T, deltas)
        t = torch.nn.Parameter(weighted_sum(movers, 1.0).dense())
        optimizer = torch.optim.Adam([t], lr=self.learning_rate)
        narrow = 2 * inputs.shape[1] < inputs.shape[0]  # the form of the gradient that costs less per step
        square, product = (inputs, outputs) if narrow else (inputs @ inputs.T, outputs @ inputs.T)
        for _ in range(self.steps):
            slope = 2 * (t.detach() @ square - product)
            t.grad = slope @ inputs.T if narrow else slope
            optimizer.step()
        return Dense((self.scale * t.detach()).to(widest_dtype(deltas)))
