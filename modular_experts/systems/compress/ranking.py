"""Rank the removable parts of a model by how much they matter on a text, or by the size of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modular_experts.systems.compress.reform import BlockByBlock, oriented
from modular_experts.systems.compress.removable import Kept, Kind, Part, Removable


@dataclass(frozen=True)
class Ranking:
    """How much each part matters; the higher, the more.

    Attributes:
        blocks: For each block how much it turns the hidden states, `1 - cos(input, output)`, as a mean over tokens.
        contribution: For each block the squared length that a group or channel adds to its layer's outputs, over the
            text: `sum_ij G_ij W_i . W_j` over its inputs, with the Gram matrix G of the inputs.
        compensated: The squared error of a removal for which the layer's other inputs make up: the same sum with the
            inverse of these inputs' part of `G^-1` in the place of G (optimal brain surgeon, Hassibi and Stork, 1993).
        entrywise: The paper's score: the sum of `W_ij^2 / [(2 G)^-1]_jj` over all entries that a removal takes, rows of
            the layers that make a group or channel and columns of the layer that reads it, each with the Gram matrix G
            of its own layer's inputs.
    """

    blocks: list[float]
    contribution: Mapping[Kind, list[Tensor]]
    compensated: Mapping[Kind, list[Tensor]]
    entrywise: Mapping[Kind, list[Tensor]]


@torch.no_grad()
def rank(
    removable: Removable, text: Tensor, damping: float = 0.01, progress: Callable[[], None] = lambda: None
) -> Ranking:
    """Rank the parts of a model on a text.

    Args:
        removable: The parts.
        text: Token ids `(rows, tokens)`.
        damping: Share of the mean of a Gram matrix's diagonal that is added to the diagonal before it is inverted.
        progress: Called after each block.
    """
    steps = BlockByBlock(removable, removable.model, text)
    hidden, turned = steps.embedded, []
    contribution: dict[Kind, list[Tensor]] = {kind: [] for kind in removable.readers}
    compensated: dict[Kind, list[Tensor]] = {kind: [] for kind in removable.readers}
    entrywise: dict[Kind, list[Tensor]] = {kind: [] for kind in removable.readers}
    for place, block in enumerate(steps.blocks):
        firsts = [removable.makers(kind)[0] for kind in removable.readers]
        grams, after = steps.grams(place, hidden, [*firsts, *removable.readers.values()])
        for name, gram in grams.items():
            grams[name] = gram.double()
            grams[name].diagonal().add_(damping * grams[name].diagonal().mean())
        for kind, reader in removable.readers.items():
            weight, count = oriented(removable.reader(block, kind)).double(), getattr(removable, kind)
            gram = grams[reader]
            inverse = torch.linalg.inv(gram)
            own, others = _removal_errors(weight, gram, inverse, count)
            contribution[kind].append(own.cpu())
            compensated[kind].append(others.cpu())
            makers, total = removable.makers(kind), torch.zeros(count, dtype=gram.dtype)
            known = torch.linalg.inv(grams[makers[0]]).diagonal()
            for name in (*makers, reader):
                # Rows of a layer that makes the parts, columns of the one that reads them.
                dim, spread = (0, inverse.diagonal()) if name == reader else (1, known)
                entries = 2 * oriented(block.get_submodule(name)).double().square() / spread
                total += _by_member(entries.sum(dim).cpu(), removable.parts[f"{name}.weight"], count)
            entrywise[kind].append(total)
        pairs = zip(hidden, after, strict=True)
        alike = torch.cat([nn.functional.cosine_similarity(one, other, dim=-1).flatten() for one, other in pairs])
        turned.append(1 - alike.double().mean().item())
        hidden = after
        progress()
    return Ranking(turned, contribution, compensated, entrywise)


def _removal_errors(weight: Tensor, gram: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `contribution` and `compensated` of a layer's inputs, which are `count` groups or channels."""
    unit = len(gram) // count
    if unit == 1:
        squares = weight.square().sum(0)
        own, others = gram.diagonal() * squares, squares / inverse.diagonal()
        return own, others
    own, others = torch.empty(count, dtype=gram.dtype), torch.empty(count, dtype=gram.dtype)
    for member in range(count):
        these = slice(member * unit, (member + 1) * unit)
        products = weight[:, these].T @ weight[:, these]
        own[member] = (gram[these, these] * products).sum()
        others[member] = (torch.linalg.inv(inverse[these, these]) * products).sum()
    return own, others


@torch.no_grad()
def magnitudes(removable: Removable) -> dict[Kind, list[Tensor]]:
    """Return the squared length of all weights that belong to each group and each channel, by block."""
    found: dict[Kind, list[Tensor]] = {kind: [] for kind in removable.readers}
    for block in removable.modules(removable.model):
        weights = dict(block.named_parameters())
        for kind, listed in found.items():
            total = torch.zeros(getattr(removable, kind), dtype=torch.float64)
            for name, part in removable.parts.items():
                if part.kind == kind:
                    squares = (
                        weights[name].detach().double().square().transpose(0, part.dim).flatten(1).sum(1).cpu()
                        if weights[name].dim() > 1
                        else weights[name].detach().double().square().cpu()
                    )
                    total += _by_member(squares, part, len(total))
            listed.append(total)
    return found


def _by_member(values: Tensor, part: Part, count: int) -> Tensor:
    """Return for each of `count` groups or channels the sum of the values at its entries along a part's dimension."""
    stretches = values.split([unit * count for unit in part.units])
    return torch.stack([stretch.view(count, -1).sum(1) for stretch in stretches]).sum(0)


def best(
    removable: Removable, blocks: tuple[int, ...], groups: int, channels: int, scores: Callable[[int, Kind], Tensor]
) -> Kept:
    """Return the parts with the highest scores: the same numbers of groups and channels in each of these blocks."""

    def of(kind: Kind, count: int) -> dict[int, Tensor]:
        if kind not in removable.readers:
            return {block: torch.arange(getattr(removable, kind)) for block in blocks}
        return {block: scores(block, kind).topk(count).indices.sort().values for block in blocks}

    return Kept(blocks, of("groups", groups), of("channels", channels))
