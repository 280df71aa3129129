"""Rank the removable parts of a model by how much they matter on a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modular_experts.systems.compress.reform import DAMPING, BlockByBlock, oriented
from modular_experts.systems.compress.removable import Kind, Removable


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
    removable: Removable, text: Tensor, damping: float = DAMPING, progress: Callable[[int], None] = lambda done: None
) -> Ranking:
    """Rank the parts of a model on a text of token ids `(rows, tokens)`.

    The share `damping` of the mean of a Gram matrix's diagonal is added to the diagonal before it is inverted.
    """
    steps = BlockByBlock(removable, removable.model, text)
    hidden, turned = steps.embedded, list[float]()
    found = [{kind: list[Tensor]() for kind in removable.readers} for _ in range(3)]
    for place, block in enumerate(steps.blocks):
        firsts = [removable.makers(kind)[0] for kind in removable.readers]
        grams, after = steps.grams(place, hidden, [*firsts, *removable.readers.values()])
        for name, gram in grams.items():
            grams[name] = gram.double()
            grams[name].diagonal().add_(damping * grams[name].diagonal().mean())
        inverses = {name: torch.linalg.inv(gram) for name, gram in grams.items()}
        for kind, reader in removable.readers.items():
            weight, count = oriented(block.get_submodule(reader)).double(), getattr(removable, kind)
            own, others = _removal_errors(weight, grams[reader], inverses[reader], count)
            makers, total = removable.makers(kind), torch.zeros(count, dtype=torch.float64)
            for name in (*makers, reader):
                # Rows of a layer that makes the parts, columns of the one that reads them.
                dim, source = (0, reader) if name == reader else (1, makers[0])
                entries = 2 * oriented(block.get_submodule(name)).double().square() / inverses[source].diagonal()
                # In each stretch the groups or channels have their entries one behind the other.
                units = removable.parts[f"{name}.weight"].units
                stretches = entries.sum(dim).cpu().split([unit * count for unit in units])
                total += torch.stack([stretch.view(count, -1).sum(1) for stretch in stretches]).sum(0)
            for listed, scores in zip(found, (own.cpu(), others.cpu(), total), strict=True):
                listed[kind].append(scores)
        pairs = zip(hidden, after, strict=True)
        alike = torch.cat([nn.functional.cosine_similarity(one, other, dim=-1).flatten() for one, other in pairs])
        turned.append(1 - alike.double().mean().item())
        hidden = after
        progress(place + 1)
    return Ranking(turned, *found)


def _removal_errors(weight: Tensor, gram: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `contribution` and `compensated` of a layer's inputs, which are `count` groups or channels."""
    unit = len(gram) // count
    if unit == 1:
        squares = weight.square().sum(0)
        return gram.diagonal() * squares, squares / inverse.diagonal()
    own, others = torch.empty(count, dtype=gram.dtype), torch.empty(count, dtype=gram.dtype)
    for member in range(count):
        these = slice(member * unit, (member + 1) * unit)
        products = weight[:, these].T @ weight[:, these]
        own[member] = (gram[these, these] * products).sum()
        others[member] = (torch.linalg.inv(inverse[these, these]) * products).sum()
    return own, others
