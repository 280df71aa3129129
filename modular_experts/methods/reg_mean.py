"""RegMean finds the weight whose outputs are closest to each expert's outputs on that expert's data (Jin et al.,
"Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849).

The paper's `W = (sum_i W_i G_i)(sum_i G_i)^-1` with `W_i = W_0 + d_i` is W_0 plus the same formula of the deltas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, add
from modular_experts.methods.average import SparseAverage
from modular_experts.methods.chunks import weighted_sum, widest_dtype
from modular_experts.methods.method import Context, MergeMethod, Needs, known_grams
from modular_experts.methods.settings import Checks, above, at_least, one_of, within
from modular_experts.methods.spectrum import spectrum


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """RegMean: `scale * (sum_i d_i G_i)(sum_i G_i)^-1`, where `G_i` is the Gram matrix `(in, in)` of the layer's inputs
    on the data of expert i, the mean of `x x^T` over tokens, with its off-diagonal multiplied by `reduce`.

    At `reduce` 1 it minimises `sum_i mean_x |d x - d_i x|^2`; where that leaves d open, it is the solution closest to
    the plain average. A weight that is not the matrix of a linear layer (a bias, a norm, an embedding) is averaged. It
    needs `gram` statistics of each expert (`modular-experts statistics --kind gram`). Low-rank experts merge to a
    low-rank one, sparse experts to a dense one.

    Args:
        reduce: Factor of the off-diagonal of the Gram matrices, in [0, 1]. The paper's 0.9 keeps the solution from
            fitting chance correlations; 0 weighs each input by its mean square alone.
        ridge: Strength, at least 0, with which the solution is drawn to `SparseAverage`, as a share of the mean
            diagonal of `sum_i G_i`; it makes the result dense. With 0.01 to 0.03 and `reduce: 1`, a merge of many
            experts loses little on their own tasks and gains on others. The paper has none.
    """

    checks = Checks(reduce=within("[0, 1]"), ridge=at_least(0))
    needs = Needs(statistics="gram", matrices=4.0, squares=6.0)

    scale: float = 1.0
    reduce: float = 0.9
    ridge: float = 0.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        known = known_grams(self, context, deltas)
        if known is None or all(delta.is_empty for delta in deltas):
            return weighted_sum(deltas, self.scale / len(deltas))
        upright, grams, transposed = known
        if self.ridge:
            solved = ridge_solution(upright, [partial(self._reduced, gram) for gram in grams], self.ridge)
        else:
            solved = self._solve(upright, grams)
        merged = solved * self.scale
        return (merged.T if transposed else merged).to(dtype=widest_dtype(deltas))

    def _solve(self, deltas: Sequence[Delta], grams: Sequence[Tensor]) -> Delta:
        """Return `sum_i d_i (1/N + (G_i - S/N) S^+)` with `S = sum_i G_i`, in float64.

        This equals the paper's formula if S has an inverse; otherwise it is the average plus the smallest correction.
        """
        total = torch.zeros(grams[0].shape, dtype=torch.float64, device=grams[0].device)
        for gram in grams:
            total += self._reduced(gram)
        divided = _divider(total, singular=self.reduce == 1)
        count = len(deltas)
        moved = [(delta, gram) for delta, gram in zip(deltas, grams, strict=True) if not delta.is_empty]

        def pulled(rows: Tensor, gram: Tensor) -> Tensor:
            return rows @ self._reduced(gram).sub_(total, alpha=1 / count)

        if all(isinstance(delta, LowRank) for delta, _ in moved):
            factors = [(delta.up.double(), delta.down.double(), gram) for delta, gram in moved]  # type: ignore[attr-defined]
            return add([LowRank(up, down / count + divided(pulled(down, gram))) for up, down, gram in factors])
        mean = torch.zeros(deltas[0].shape, dtype=torch.float64, device=total.device)
        pull = mean.clone()
        for delta, gram in moved:
            values = delta.dense().double()
            mean.add_(values, alpha=1 / count)
            pull += pulled(values, gram)
        return Dense(mean.add_(divided(pull)))

    def _reduced(self, gram: Tensor) -> Tensor:
        reduced = gram.double() * self.reduce
        reduced.diagonal().copy_(gram.diagonal())
        return reduced


def _divider(total: Tensor, singular: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that divides rows `(n, in)` by a sum of Gram matrices from the right.

    The sum is scaled to a unit diagonal first. With a reduced off-diagonal its eigenvalues are at least `1 - reduce`,
    and a Cholesky factor suffices; otherwise directions without any input are left out.
    """
    size = total.diagonal().clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    unit = scale[:, None] * total * scale
    if singular:
        values, vectors = torch.linalg.eigh(unit)
        kept = values > values[-1] * len(values) ** 0.5 * torch.finfo(torch.float32).eps  # stored as float32
        values = values[kept]
        vectors = vectors[:, kept]
        return lambda rows: ((rows * scale) @ vectors / values) @ vectors.T * scale
    unit.diagonal()[size == 0] = 1
    factor = torch.linalg.cholesky(unit)
    return lambda rows: torch.cholesky_solve((rows * scale).T, factor).T * scale


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean++: RegMean, `scale * (sum_i d_i G_i)(sum_i G_i)^-1`, with the Gram matrix `G_i` of the inputs that the
    layer gets on the data of expert i after all transformer blocks before it have been merged (arXiv 2508.03121).

    It needs `merged_gram` statistics, taken of all the experts together with the default `reduce` and scale 1
    (`modular-experts statistics --experts a b --kind merged_gram`), and merges exactly those experts.
    """

    needs = Needs(statistics="merged_gram", together=True, matrices=4.0, squares=6.0)


@dataclass(frozen=True)
class SelfRegMean(MergeMethod):
    """SelfRegMean: `scale` times the d of least `sum_i |(d - d_i) d_i^T|^2 / |d_i|^2 + r |d - c|^2`, where c is
    `SparseAverage` of the experts and r is `ridge` times the mean diagonal of `sum_i d_i^T d_i / |d_i|^2`.

    As far as the directions of the tasks differ, d maps the inputs of each task to the same outputs as the task's own
    expert. A weight that is not a matrix gets c; the result is dense. The method is meant for experts that were trained
    on the whole input of a layer (sparse, tiles, full); the rows of a LoRA's delta lie where its random start put them.
    ACE-Merging (arXiv 2603.02945) also takes `d_i^T d_i` for the Gram matrices, with other constants.

    Args:
        ridge: Strength, above 0, with which d is drawn to c where the experts leave it open.
        inputs: Dimension of the weight along which the layer's inputs are: 1 of `nn.Linear`, 0 of GPT-2's `Conv1D`.
        flatten: How much the singular values are evened out, in [0, 1]: at q, `d = U S V^T` becomes `U S^(1-q) V^T` of
            d's norm, so that weak directions gain on strong ones.
    """

    checks = Checks(ridge=above(0), inputs=one_of(Literal[0, 1]), flatten=within("[0, 1]"))

    ridge: float = 0.1
    scale: float = 1.0
    inputs: int = 1
    flatten: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(matrices=8.0 if self.flatten else 4.0, squares=5.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        dtype = widest_dtype(deltas)
        if len(deltas[0].shape) != 2:
            return (overlap_average(deltas) * self.scale).to(dtype=dtype)
        upright = [delta.T for delta in deltas] if self.inputs == 0 else list(deltas)
        merged = ridge_solution(upright, [partial(_own_gram, delta) for delta in upright], self.ridge)
        merged = (flattened(merged, self.flatten) if self.flatten else merged) * self.scale
        return (merged.T if self.inputs == 0 else merged).to(dtype=dtype)


def flattened(delta: Delta, share: float) -> Delta:
    """Return `U S^(1 - share) V^T` of the norm of a delta `U S V^T`, dense and in float64; noise is left out."""
    whole = spectrum(delta)
    values = whole.values ** (1 - share)
    values *= whole.values.norm() / values.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return Dense(whole.left * values @ whole.right)


def _own_gram(delta: Delta) -> Tensor:
    """Return `d^T d / |d|^2` `(in, in)`, zero for a delta that moves nothing."""
    values = delta.dense().double()
    return values.T @ values / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)


def overlap_average(deltas: Sequence[Delta]) -> Delta:
    """Return the average of each entry over the experts that move it, in float64."""
    return SparseAverage().merge([delta.to(dtype=torch.float64) for delta in deltas])


def ridge_solution(deltas: Sequence[Delta], grams: Sequence[Callable[[], Tensor]], ridge: float) -> Delta:
    """Return the d of least `sum_i tr((d - d_i) G_i (d - d_i)^T) + r |d - c|^2`, dense and in float64.

    c is the overlap-aware average, r is `ridge` times the mean of the diagonal of `sum_i G_i`, and the solution is `c +
    (sum_i (d_i - c) G_i)(sum_i G_i + r I)^-1`. `grams` return the Gram matrices `(in, in)` one at a time.
    """
    center = overlap_average(deltas).dense()
    width = center.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=center.device)
    pull = torch.zeros_like(center)
    for delta, gram in zip(deltas, grams, strict=True):
        values = gram().double()
        total += values
        pull += (delta.dense().double() - center) @ values
    penalty = ridge * total.diagonal().mean().item()
    if penalty <= 0:  # no expert has any inputs
        return Dense(center)
    total.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise ValueError(f"the ridge {ridge:g} is too small to solve with; take a larger one, such as 0.001")
    return Dense(center + torch.cholesky_solve(pull.T, factor).T)
