"""SelfRegMean: RegMean without data, in which each expert's own delta tells which inputs matter to it.

A gradient of a linear layer is a sum of outer products with the layer's inputs, so the rows of a trained delta lie
where the inputs of its task were, and `d^T d` can stand for their Gram matrix. That is the observation of WUDI (arXiv
2503.08099), whose objective, minimised exactly, is this one without a ridge. The ridge is this package's: it draws what
no expert's inputs determine to the overlap-aware average of arXiv 2507.07140 instead of to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.merging.method import MergeMethod, check_finite
from modular_experts.merging.parts import widest_dtype
from modular_experts.merging.ridge import overlap_average, ridge_solution

__all__ = ["SelfRegMean"]


@dataclass(frozen=True)
class SelfRegMean(MergeMethod):
    """SelfRegMean: `scale` times the d of least `sum_i |(d - d_i) d_i^T|^2 / |d_i|^2 + r |d - c|^2`, where c is the
    overlap-aware average and r is `ridge` times the mean diagonal of `sum_i d_i^T d_i / |d_i|^2`.

    So d does to the inputs of each task what the task's own expert does, as far as their directions differ. Weights
    that are no matrices are averaged as c is. The result is dense. One expert merges to itself, and so do copies of it,
    an expert that moves nothing changes nothing, and the order of the experts does not matter. A common factor of all
    deltas is one of the result. It is meant for experts that were trained on the whole input of a layer (sparse, tiles,
    full): the rows of a LoRA's delta lie where its random start put them.

    Args:
        ridge: How strongly d is drawn to the overlap-aware average where experts leave it open, above 0.
        scale: Factor of the result.
        inputs: Dimension of the weight along which the layer's inputs are: 1 of `(out, in)`, as `nn.Linear` stores its
            weight, 0 of `(in, out)`, as GPT-2's `Conv1D` does.
    """

    matrices = 4.0, 0.0
    squares = 5.0

    ridge: float = 0.1
    scale: float = 1.0
    inputs: int = 1

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_finite(self, "ridge", self.ridge)
        if self.ridge <= 0:
            raise ValueError(f"SelfRegMean: ridge must be above 0, got {self.ridge}")
        if self.inputs not in (0, 1):
            raise ValueError(f"SelfRegMean: inputs is a dimension of the weight, 0 or 1, got {self.inputs}")

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        dtype = widest_dtype(deltas)
        if len(deltas[0].shape) != 2:
            return (overlap_average(deltas) * self.scale).to(dtype=dtype)
        upright = [delta.T for delta in deltas] if self.inputs == 0 else list(deltas)
        merged = ridge_solution(upright, [lambda delta=delta: _own_gram(delta) for delta in upright], self.ridge)  # type: ignore[misc]
        merged = merged * self.scale
        return (merged.T if self.inputs == 0 else merged).to(dtype=dtype)


def _own_gram(delta: Delta) -> Tensor:
    """Return `d^T d / |d|^2`, zero for a delta that moves nothing."""
    values = delta.dense().double()
    return values.T @ values / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
