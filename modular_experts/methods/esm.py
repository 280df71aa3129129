"""ESM merges what each expert changes in a layer's outputs, in the few directions that change most (Li et al., "Model
Merging in the Essential Subspace", arXiv 2602.20208 and 2606.19164).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense
from modular_experts.deltas.tiles import kept_count
from modular_experts.methods.average import Average
from modular_experts.methods.method import Context, MergeMethod, Needs, known_grams
from modular_experts.methods.settings import Checks, at_least, within
from modular_experts.methods.spectrum import NOISE, as_delta, spectrum


@dataclass(frozen=True)
class ESM(MergeMethod):
    """ESM: `scale * P([E_1 w_1 .. E_N w_N]) P([w_1 E_1^T d_1; ..; w_N E_N^T d_N])`, of the strongest directions of each
    expert's outputs.

    The columns of `E_i` are the eigenvectors of `d_i G_i d_i^T` with the largest eigenvalues, where `G_i` is the Gram
    matrix `(in, in)` of the layer's inputs on the data of expert i. `w_i` are the `power`-th powers of the eigenvalues,
    divided by their mean. `P(X) = mean(S) U V^T` of the singular value decomposition `U S V^T` makes the directions
    orthogonal and equally strong. This is the authors' program for RoBERTa (github.com/kiddo127/ESM) without the scales
    of its last step, which need all weights at once.

    It needs `gram` statistics of each expert (`modular-experts statistics --kind gram`; with `--labels experts` inputs
    suffice). A weight that is not the matrix of a linear layer gets the mean over all experts.

    Args:
        share: Share of a matrix's output directions that all experts together keep, in (0, 1]; each at least one.
        power: Power of the eigenvalues by which stronger directions count more, at least 0; 0 counts all alike.
    """

    checks = Checks(share=within("(0, 1]", "is a part of the directions"), power=at_least(0))
    needs = Needs(statistics="gram", matrices=10.0, matrices_per_expert=2.0, squares=2.0)

    scale: float = 1.0
    share: float = 1.0
    power: float = 0.15

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        known = known_grams(self, context, deltas)
        if known is None:
            return Average(scale=self.scale).merge(deltas)
        upright, grams, transposed = known
        movers = [(delta, gram) for delta, gram in zip(upright, grams, strict=True) if delta.norm() > 0]
        count = kept_count(self.share / max(1, len(movers)), upright[0].shape[0])
        parts = [self._essential(delta.to(dtype=torch.float64), gram.double(), count) for delta, gram in movers]
        nothing = torch.zeros(upright[0].shape[0], 0, dtype=torch.float64, device=upright[0].device)
        outputs = _evened(torch.cat([nothing, *(left for left, _ in parts)], 1))
        inputs = _evened(torch.cat([nothing.new_zeros(0, upright[0].shape[1]), *(right for _, right in parts)]))
        merged = as_delta(self.scale * outputs, inputs, upright)
        return merged.T if transposed else merged

    def _essential(self, delta: Delta, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return `E w` `(out, count)` and `w E^T d` `(count, in)` of one expert."""
        values, vectors = torch.linalg.eigh(delta.linear(delta.linear(gram).T))
        strongest = values.argsort(descending=True)[:count]
        strongest = strongest[values[strongest] > NOISE * values[-1].clamp(min=0)]
        weights, directions = values[strongest] ** self.power, vectors[:, strongest]
        weights = weights / weights.mean()
        return directions * weights, weights[:, None] * delta.T.linear(directions.T)


def _evened(matrix: Tensor) -> Tensor:
    found = spectrum(Dense(matrix))
    return found.values.mean() * found.left @ found.right
