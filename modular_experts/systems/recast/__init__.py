"""RECAST trains how much each layer takes of templates that it shares with others (arXiv 2411.16870)."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modular_experts.base.quantised import read_weight
from modular_experts.deltas import Dense
from modular_experts.experts.expert import Expert
from modular_experts.experts.site import Factory, LayerPlan, Site, as_patterns, by_pattern


class RecastExpert(Expert):
    """Adds `sum_t change_t * T_t`, where the templates `T_t` are sums of the base weights of a group of layers.

    The base weight is about `sum_t c0_t T_t`. A task moves the coefficients from `c0` to `c0 + change`, which starts at
    zero. No template is stored: `T_t = sum_j mixing_tj W_j`, and the weights `W_j` are in the model. So the state is
    the change and the mixing, a few numbers for each layer, while the delta is dense, because merges read no base.

    The default learning rate suits larger bases; small ones learn better at 0.09 or 0.27.

    Args:
        weight: The base weight `(out, in)`.
        layers: The layers or sites of the group, in the order of the columns of `mixing`; each has an expert.
        mixing: How much of each weight a template holds, `(templates, layers)`.
    """

    learning_rate: ClassVar[float] = 3e-2
    delta_of_base = True

    def __init__(self, weight: Tensor, layers: Sequence[Any], mixing: Tensor) -> None:
        super().__init__()
        # In a tuple they are not submodules of this one.
        self._layers: tuple[Any, ...] = tuple(layers)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.change = nn.Parameter(torch.zeros(len(mixing), dtype=dtype, device=weight.device))
        self.mixing: Tensor
        self.register_buffer("mixing", mixing.to(weight.device, dtype))

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Dense:
        # Adding weights up takes less memory than making templates first.
        shares = self.change.to(self.mixing.dtype) @ self.mixing
        return Dense(
            sum(share * layer.matrix.to(share.dtype) for share, layer in zip(shares, self._layers, strict=True))
        )

    def state(self) -> dict[str, Tensor]:
        """Return the change and the mixing, which the dense delta does not give back."""
        return dict(self.state_dict())


class TemplateBanks(LayerPlan):
    """Gives each group of consecutive layers of a kind common templates, whose coefficients a task trains (RECAST).

    Layers of a kind have the same name in other transformer blocks, such as `self_attn.q_proj`. The templates of a
    group are the best by squared error: the truncated SVD of its weights, each flattened to a row. With as many
    templates as layers they give the weights exactly. A shorter group at the end has at most one template for each of
    its layers.

    Args:
        modules: Patterns of the layers that take part: ends of names, regular expressions, or `all-linear`.
        group: Number of consecutive layers that share templates.
        templates: Number of templates of a group, from 1 to `group`; a layer trains one number for each.
    """

    def __init__(self, modules: str | Sequence[str] = "all-linear", group: int = 2, templates: int = 2) -> None:
        if group < 1:
            raise ValueError(f"TemplateBanks: group={group} must be at least 1 layer")
        if not 1 <= templates <= group:
            raise ValueError(
                f"TemplateBanks: templates={templates} is outside 1..{group}, the layers of a group, whose weights so "
                "many templates give exactly; give fewer templates or a larger group"
            )
        self.modules = as_patterns(modules)
        self.group = group
        self.templates = templates

    def __call__(self, sites: Sequence[Site]) -> Mapping[Site, Factory]:
        kinds: dict[str, list[Site]] = {}
        for site in by_pattern(dict.fromkeys(self.modules, RecastExpert), "modules")(sites):
            kinds.setdefault(re.sub(rf"\b{site.depth}\b", "*", site.name, count=1), []).append(site)
        planned: dict[Site, Factory] = {}
        for alike in kinds.values():
            # By number, because `layers.10` comes before `layers.2` by name.
            alike.sort(key=lambda site: site.depth or 0)
            for first in range(0, len(alike), self.group):
                together = alike[first : first + self.group]
                mixing = best_mixing(together, min(self.templates, len(together)))
                layers = [site if site.parameter else site.module for site in together]
                planned |= dict.fromkeys(together, partial(RecastExpert, layers=layers, mixing=mixing))
        return planned


def best_mixing(sites: Sequence[Site], templates: int) -> Tensor:
    """Return `U` `(templates, layers)`, whose rows are the first left singular vectors of the stack of flat weights.

    The templates are `U @ stack`, the best by squared error, and `U[:, l]` the coefficients that give layer `l` best.
    """
    weights = [(site.matrix if site.parameter else read_weight(site.module)).detach() for site in sites]
    for site, weight in zip(sites, weights, strict=True):
        if weight.shape != weights[0].shape:
            raise ValueError(
                f"TemplateBanks: {site.name} has a weight of shape {tuple(weight.shape)} and {sites[0].name} of its "
                f"group {tuple(weights[0].shape)}; only equal shapes share templates: name fewer layers in modules, or "
                "give group=1, templates=1"
            )
    # The left singular vectors are the eigenvectors of this product, which has only (layers, layers) entries.
    stack = torch.stack([weight.flatten().double() for weight in weights])
    return torch.linalg.eigh(stack @ stack.T).eigenvectors.flip(1)[:, :templates].T.contiguous()
