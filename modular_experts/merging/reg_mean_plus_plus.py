"""RegMean++: RegMean with the inputs that the layers meet in the merged model (Nguyen et al., "RegMean++", arXiv
2508.03121).

RegMean takes a layer's inputs from each expert by itself, but in the merged model the layers before are merged too.
Here the layers of one transformer block are merged, then the inputs of the next block are taken from the blocks merged
so far. That walk needs the model and data: `modular_experts.statistics` goes it and stores the Gram matrices that it
met. The solution is RegMean's, and repeats that of the walk.
"""

from __future__ import annotations

from dataclasses import dataclass

from modular_experts.merging.reg_mean import RegMean

__all__ = ["RegMeanPlusPlus"]


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean++: RegMean, `scale * (sum_i d_i G_i)(sum_i G_i)^-1`, with the Gram matrix `G_i` of the inputs that the
    layer meets on the data of expert i after all blocks before it have been merged.

    It needs `merged_gram` statistics, taken of all the experts together
    (`modular-experts statistics --experts '[...]' --kind merged_gram`), and merges exactly those experts: of the same
    Gram matrices, all properties are those of RegMean. They are taken with the default `reduce` and scale 1; other
    settings are solved with the same Gram matrices, not with those that they would have led to.

    Args:
        scale: Factor of the result.
        reduce: Factor of the off-diagonal of the Gram matrices, in [0, 1].
        ridge: Draws the solution to the overlap-aware average, as for RegMean.
    """

    statistics = "merged_gram"
