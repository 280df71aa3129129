"""Store experts as other papers do, beside the forms of `modular_experts.merging.shrink`.

`studies/bytes.yaml` names them by dotted path, and runs from the root of the repository.
"""

from dataclasses import dataclass, replace

import torch

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.library.form import Form
from modular_experts.masks import top_k


@dataclass(frozen=True)
class OneScale(Form):
    """Signs of the largest entries of a weight, and one scale for all of them, their mean size.

    With all entries of a full expert it is the form of BitDelta (arXiv 2402.10193), whose scales are distilled
    afterwards; with a share of them the form of ComPEFT (arXiv 2311.13171), whose scale is one for all weights and
    tuned on validation rows. The file repeats the scale in each row, which takes 3 to 6 % more bytes.
    """

    encoding: str = "sign"

    def cut(self, delta: Delta) -> Delta:
        if isinstance(delta, Dense) and self.keep < 1:
            count = max(1, round(self.keep * delta.values.numel()))
            indices = top_k(delta.values.abs().flatten(), count).sort().values
            delta = Sparse(indices.to(torch.int32), delta.values.flatten()[indices.long()], delta.shape)
        delta = super().cut(delta)
        if isinstance(delta, LowRank):
            return LowRank(_signs(delta.up), _signs(delta.down))
        if isinstance(delta, Sparse | BlockSparse | Dense):
            return replace(delta, values=_signs(delta.values))
        return delta


def _signs(values: torch.Tensor) -> torch.Tensor:
    return values.sign() * values.abs().mean() if values.numel() else values
