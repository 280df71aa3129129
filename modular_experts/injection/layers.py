"""Layers that keep an expert beside the base's own weight and bias, and parameters that keep one."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.base.quantised import read_weight
from modular_experts.base.structure import is_transposed
from modular_experts.deltas import Delta
from modular_experts.experts.expert import Expert, InPlaceExpert, trains_weight
from modular_experts.experts.selectable import Selectable
from modular_experts.experts.site import Site, parameter_of
from modular_experts.native.kernel import kept_weight


class ExpertLayer(nn.Module):
    """A linear layer that keeps an `expert` beside the base's own `weight` and `bias`."""

    expert: Expert
    weight: Any
    bias: Any
    base_class: type[nn.Module]
    base_dtype: torch.dtype
    """The data type in which the base was read."""
    converted: torch.dtype | None = None
    """The data type that `double()` or the like has given the base since then."""
    is_transposed: bool = False
    """Whether the base stores the weight as `(in, out)`."""
    is_idle: bool = False
    """Whether passes leave the expert out; of one in the weight, somebody has restored that."""

    @property
    def computing_dtype(self) -> torch.dtype:
        """The data type of the base's weights beside a trained one."""
        return self.converted or self.base_dtype

    @property
    def matrix(self) -> Tensor:
        """The weight as the expert sees it, `(out, in)`, sharing the layer's memory."""
        return self.weight.T if self.is_transposed else self.weight

    def oriented(self, delta: Delta) -> Delta:
        """Return an expert's delta in the orientation in which the base stores the weight."""
        return delta.T if self.is_transposed else delta

    def weight_name(self, name: str) -> str:
        """Return the weight's full name, given the layer's own."""
        return f"{name}.weight"

    def forward(self, x: Tensor) -> Tensor:
        if self.is_idle:
            return F.linear(x, self.matrix, self.bias)
        return self.expert(x, self.matrix, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.converted = fn(torch.empty(0, dtype=self.computing_dtype)).dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # The weight holds the entries of a support that is about to be replaced: give the base's back first.
        if isinstance(self.expert, InPlaceExpert) and not trains_weight(self.expert):
            self.expert.restore(self.matrix, lambda: self.matrix)
        super()._load_from_state_dict(*args, **kwargs)


class ExpertLinear(ExpertLayer, nn.Linear):
    """An `nn.Linear` with an expert."""


class ExpertConv1D(ExpertLayer):
    """A transformers `Conv1D`, which stores its weight as (in, out), with an expert."""

    is_transposed = True


class ExpertQuantised(ExpertLinear):
    """A linear layer with an expert beside a quantised weight, which the expert reads dequantised."""

    @property
    def is_transposed(self) -> bool:  # type: ignore[override]
        return is_transposed(self)

    @property
    def matrix(self) -> Tensor:
        return read_weight(self, self.base_dtype)

    # torch.compile cannot trace a tensor that is made anew at each reading.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ExpertParameter(ExpertLayer):
    """A parameter with an expert that no linear layer multiplies: embeddings, tied heads, norms, biases, routers.

    It is a module of its own in the first of its owners, of a name such as `weight[:]`. While an owner runs, the
    expert's moved weight stands in the parameter's place. A tied parameter has several owners and one expert, so that
    all of its uses see the same numbers and their gradients add up.
    """

    bias = None
    _now: tuple[tuple[object, ...], Tensor] | None = None
    """The moved weight of the pass at hand, and the state of the expert of which it was made."""

    def __init__(self, site: Site, expert: Expert, owners: list[nn.Module]) -> None:
        super().__init__()
        # In a list, because `nn.Module.__setattr__` would make the owners a part of their part.
        self.owners = owners
        self.parameter = site.parameter
        self.base_dtype = self.weight.dtype
        self.expert = expert
        if trains_weight(expert):
            self.weight.data = self.weight.data.to(torch.promote_types(self.base_dtype, torch.float32))
            self.weight.requires_grad_(True)

    @property
    def weight(self) -> nn.Parameter:
        return parameter_of(self.owners[0], self.parameter)

    def weight_name(self, name: str) -> str:
        return name.removesuffix("[:]")

    def put(self) -> None:
        """Become a part of the first owner, and stand in for the parameter while an owner runs."""
        self.owners[0].add_module(f"{self.parameter}[:]", self)
        # Bound methods, which a copied or pickled model takes along.
        self._hooks = [owner.register_forward_pre_hook(self._enter) for owner in self.owners]
        self._hooks += [owner.register_forward_hook(self._leave, always_call=True) for owner in self.owners]

    def take_out(self) -> None:
        """Leave the owners as they were."""
        for hook in self._hooks:
            hook.remove()
        del self.owners[0]._modules[f"{self.parameter}[:]"]

    def _enter(self, owner: nn.Module, arguments: object) -> None:
        versions = [parameter._version for parameter in self.parameters()]
        state = (torch.is_grad_enabled(), getattr(self.expert, "probe", None), *versions)
        # The first owner begins a pass, whose other uses share its graph: their gradients add up before they are read.
        if owner is self.owners[0] or self._now is None or self._now[0] != state:
            self._now = (state, self._moved().to(self.computing_dtype))
        owner.__dict__[self.parameter] = self._now[1]

    def _moved(self) -> Tensor:
        expert = self.expert
        weight = self.weight
        if isinstance(expert, Selectable) and expert.probe is not None:
            expert.probe.is_reached = True
            return kept_weight(expert.scored(weight)[0], expert.probe.leaf, expert.probe)
        if isinstance(expert, InPlaceExpert):
            return expert.moved(weight)
        return weight + expert.delta(weight, lambda: weight).dense().to(weight.dtype)

    def _leave(self, owner: nn.Module, arguments: object, output: object) -> None:
        owner.__dict__.pop(self.parameter, None)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_now": None}
