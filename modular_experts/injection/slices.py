"""Experts of the matrices that a mixture-of-experts base keeps in one parameter `(experts, ., .)`.

The base's forward pass takes one matrix after the other: `F.linear(x, self.down_proj[3])`. Where matrices have experts,
`Slices` stands in the parameter's place, and each product is the expert's own. So every kind of expert trains as in a
linear layer, and an expert of a matrix that no token reaches costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.experts.expert import Expert
from modular_experts.experts.site import Site, parameter_of
from modular_experts.injection.layers import ExpertLayer
from modular_experts.routing.gates import CurrentGates, Gates

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertSlice(ExpertLayer):
    """A matrix of a parameter with an expert; a module of its own, such as `down_proj[3]`, in the one that owns it."""

    bias = None
    owner: nn.Module

    def __init__(self, site: Site, expert: Expert) -> None:
        super().__init__()
        # `nn.Module.__setattr__` would make the owner a part of its part.
        object.__setattr__(self, "owner", site.module)
        self.parameter = site.parameter
        self.number = site.number
        self.is_transposed = site.is_transposed
        self.base_dtype = self.whole.dtype
        self.expert = expert

    @property
    def whole(self) -> nn.Parameter:
        """The parameter `(experts, ., .)`."""
        return parameter_of(self.owner, self.parameter)

    @property
    def weight(self) -> Tensor:
        # `data`, because autograd would take a write into one matrix for a change of all.
        return self.whole.data[self.number]

    def weight_name(self, name: str) -> str:
        return name

    def put(self) -> None:
        """Become a part of the owner, whose forward pass then takes its matrices one by one."""
        owner = self.owner
        owner.add_module(f"{self.parameter}[{self.number}]", self)
        # Attributes of an object are found before its parameters and its class's methods.
        owner.__dict__[self.parameter] = Slices(owner, self.parameter)
        owner.__dict__["forward"] = partial(_one_by_one, owner)

    def take_out(self) -> None:
        """Leave the owner, which is as it was when its last expert leaves."""
        owner = self.owner
        del owner._modules[f"{self.parameter}[{self.number}]"]
        left = {layer.parameter for layer in owner.children() if isinstance(layer, ExpertSlice)}
        if self.parameter not in left:
            del owner.__dict__[self.parameter]
            self.whole.data = self.whole.data.contiguous()
        if not left:
            owner.__dict__.pop("forward", None)


class Slices:
    """Stands for a parameter `(experts, ., .)` in the forward pass of its module; by number it gives the matrices."""

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        self.owner = owner
        self.parameter = parameter

    def __getitem__(self, number: int | Tensor) -> Tensor | _Factor:
        layer = self.owner._modules.get(f"{self.parameter}[{int(number)}]")
        if isinstance(layer, ExpertSlice):
            return _Factor(layer)
        return parameter_of(self.owner, self.parameter)[number]


class _Factor:
    """A matrix with an expert, as the right factor of a product."""

    def __init__(self, layer: ExpertSlice) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Tensor],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        is_product = len(args) == 2 and not kwargs and isinstance(args[1], cls)
        if not is_product or func not in (_PRODUCTS if args[1].layer.is_transposed else (F.linear,)):
            raise NotImplementedError(
                f"the base takes {func} of a matrix that has an expert, which is not the product of a linear layer; "
                "leave the layers of its mixture of experts out"
            )
        return args[1].layer(args[0])


def _one_by_one(owner: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """Run a module of experts matrix by matrix, and keep where each token goes for as long as it runs."""
    owner.__dict__["goes_to"] = next(value for value in (*args, *kwargs.values()) if not value.is_floating_point())
    try:
        # The class's own method; transformers 5 wraps it in a choice of kernels that take all matrices at once.
        return type(owner).forward.__wrapped__(owner, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        del owner.__dict__["goes_to"]


class GatesOfSlice(CurrentGates):
    """The gates of the tokens that reach a matrix, each of which takes its row's."""

    def __init__(self, current: CurrentGates, site: Site) -> None:
        self._current = current
        self._owner = site.module
        assert site.number is not None
        self._number = site.number

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return self._current.packs

    @property
    def kept(self) -> Set[int]:  # type: ignore[override]
        return self._current.kept

    @property
    def gates(self) -> Gates | None:  # type: ignore[override]
        gates = self._current.gates
        if gates is None:
            return None
        chosen = cast(Tensor, self._owner.goes_to)
        # The forward pass takes a matrix's tokens by the rank of the choice first.
        _, tokens = torch.where(chosen.eq(self._number).T)
        rows = tokens * len(gates.ids) // len(chosen)
        return Gates(gates.ids[rows], gates.weights[rows])
