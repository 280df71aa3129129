"""TT-LoRA trains the delta as a tensor train, a chain of small cores (Anjum et al., arXiv 2408.01008)."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import LowRank
from modular_experts.experts.expert import Expert
from modular_experts.experts.lora import check_low_rank


class TTLoRAExpert(Expert):
    """Adds `alpha * D`, where the entries of `D` are products of matrices that are picked from small cores.

    The outputs of the layer are numbered by several axes, `out = o_1 * ... * o_n`, its inputs by `in = i_1 * ... *
    i_m`, the last axis running fastest. Each axis of size `k` has a core `(left, k, right)`, the outputs' axes first;
    neighbours share a bond, and the chain ends with bonds of 1. An entry of `D` is the product of the matrices `(left,
    right)` that its places on the axes pick, so `D` is exactly a low-rank product, whose rank is the bond between
    outputs and inputs. The last core starts at zero, the others with orthonormal columns.

    Args:
        weight: The base weight `(out, in)`.
        rank: Size of the bonds, from 1 to min(out, in); a bond that could not use this size is smaller.
        alpha: Scale of the delta; it is not divided by the rank.
        axes: Number of axes on each side. They are as even as the divisors of the size allow; a size with too few prime
            factors, such as a prime number, gets axes of 1.
        out_factors: Sizes of the axes of the outputs, instead of `axes`: 64 4 3 for 768 outputs.
        in_factors: Sizes of the axes of the inputs, instead of `axes`: 3 4 64 for 768 inputs.
    """

    learning_rate: ClassVar[float] = 1.5e-2

    def __init__(
        self,
        weight: Tensor,
        rank: int = 5,
        alpha: float = 16.0,
        axes: int = 3,
        out_factors: Sequence[int] | None = None,
        in_factors: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        check_low_rank(weight, rank)
        if axes < 1:
            raise ValueError(f"axes={axes} must be at least 1")
        # The largest axes stand at the ends of the chain, where cores have one bond only.
        outs = _checked("out_factors", out_factors, rows, "outputs") or even_factors(rows, axes)
        ins = _checked("in_factors", in_factors, columns, "inputs") or even_factors(columns, axes)[::-1]
        sizes = [*outs, *ins]
        bonds = [min(rank, math.prod(sizes[:place]), math.prod(sizes[place:])) for place in range(len(sizes) + 1)]
        self.rank = rank
        self.scale = float(alpha)
        self._border = len(outs)
        self.chain = " | ".join("x".join(map(str, side)) for side in (outs, ins))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.cores = nn.ParameterList(
            torch.empty(left, size, right, dtype=dtype, device=weight.device)
            for left, size, right in zip(bonds, sizes, bonds[1:], strict=False)
        )
        with torch.no_grad():
            for core in self.cores[:-1]:
                core.copy_(nn.init.orthogonal_(torch.empty_like(core).flatten(0, 1)).view_as(core))
            self.cores[-1].zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the products `(out, bond)` of the outputs' cores and `(bond, in)` of the inputs', without alpha."""
        cores = list(self.cores)
        up = reduce(_joined, cores[: self._border])
        down = reduce(_joined, cores[self._border :])
        return up.flatten(0, 1), down.flatten(1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        # Contracting each side's cores with one another first costs less than contracting them with every token.
        up, down = self.factors()
        return base + F.linear(self.scale * F.linear(x.to(down.dtype), down), up).to(base.dtype)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> LowRank:
        up, down = self.factors()
        return LowRank(self.scale * up, down)

    def state(self) -> dict[str, Tensor]:
        """Return the cores, which the low-rank factors do not determine."""
        return dict(self.state_dict())


def even_factors(size: int, axes: int) -> list[int]:
    """Return `axes` whole numbers whose product is `size`, largest first, as even as its divisors allow.

    576 has the factors 9, 8, 8; a prime number p has p, 1, 1.
    """
    found = []
    for left in range(axes, 0, -1):
        found.append(next(one for one in range(1, size + 1) if size % one == 0 and one**left >= size))
        size //= found[-1]
    return sorted(found, reverse=True)


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """Return the cores `(a, n, b)` and `(b, k, c)` contracted over their bond: `(a, n * k, c)`."""
    return (left.flatten(0, 1) @ right.flatten(1)).view(left.shape[0], -1, right.shape[2])


def _checked(name: str, factors: Sequence[int] | None, size: int, side: str) -> list[int]:
    given = list(factors or [])
    if given and (min(given) < 1 or math.prod(given) != size):
        raise ValueError(
            f"{name}={given} must be numbers above 0 whose product is {size}, the {side} of the layer, such as "
            f"{even_factors(size, 3)}; give layers of other sizes factors of their own, or leave {name} out"
        )
    return given
