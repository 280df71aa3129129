"""Rank the removable parts of a model by how much they matter on a text, and define the candidates of the search for a
smaller base: which blocks, groups of heads and channels each keeps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from modular_experts.systems.compress.reform import DAMPING, BlockByBlock
from modular_experts.systems.compress.removable import Kept, Kind, Removable, oriented
from modular_experts.systems.evolution import Category, Gene, Genes, Mask, Whole

Members = Literal["importance", "masks"]


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
    hidden = steps.embedded
    turned: list[float] = []
    # Of `contribution`, `compensated` and `entrywise`.
    tables = [{kind: list[Tensor]() for kind in removable.readers} for _ in range(3)]
    for place, block in enumerate(steps.blocks):
        firsts = [removable.makers(kind)[0] for kind in removable.readers]
        grams, after = steps.grams(place, hidden, [*firsts, *removable.readers.values()])
        for name, gram in grams.items():
            grams[name] = gram.double()
            grams[name].diagonal().add_(damping * grams[name].diagonal().mean())
        inverses = {name: torch.linalg.inv(gram) for name, gram in grams.items()}
        for kind, reader in removable.readers.items():
            weight = oriented(block.get_submodule(reader)).double()
            count = getattr(removable, kind)
            own, others = _removal_errors(weight, grams[reader], inverses[reader], count)
            makers = removable.makers(kind)
            total = torch.zeros(count, dtype=torch.float64)
            for name in (*makers, reader):
                # Rows of a layer that makes the parts, columns of the one that reads them.
                dim, source = (0, reader) if name == reader else (1, makers[0])
                entries = 2 * oriented(block.get_submodule(name)).double().square() / inverses[source].diagonal()
                # In each stretch the groups or channels have their entries one behind the other.
                units = removable.parts[f"{name}.weight"].units
                stretches = entries.sum(dim).cpu().split([unit * count for unit in units])
                total += torch.stack([stretch.view(count, -1).sum(1) for stretch in stretches]).sum(0)
            for table, scores in zip(tables, (own.cpu(), others.cpu(), total), strict=True):
                table[kind].append(scores)
        pairs = zip(hidden, after, strict=True)
        alike = torch.cat([nn.functional.cosine_similarity(*states, dim=-1).flatten() for states in pairs])
        turned.append(1 - alike.double().mean().item())
        hidden = after
        progress(place + 1)
    return Ranking(turned, *tables)


def _removal_errors(weight: Tensor, gram: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `contribution` and `compensated` of a layer's inputs, which are `count` groups or channels."""
    unit = len(gram) // count
    if unit == 1:
        squares = weight.square().sum(0)
        return gram.diagonal() * squares, squares / inverse.diagonal()
    own = torch.empty(count, dtype=gram.dtype)
    others = torch.empty(count, dtype=gram.dtype)
    for member in range(count):
        these = slice(member * unit, (member + 1) * unit)
        products = weight[:, these].T @ weight[:, these]
        own[member] = (gram[these, these] * products).sum()
        others[member] = (torch.linalg.inv(inverse[these, these]) * products).sum()
    return own, others


@dataclass(frozen=True)
class Window:
    """The numbers of parameters that a smaller model may have, and the sizes that fit."""

    removable: Removable
    keep: float
    slack: float
    multiple: int

    def channels(self, blocks: int, groups: int) -> int | None:
        """Return the most MLP channels beside these blocks and groups, or None if the window has no room for them."""
        most, least = (share * self.removable.parameters for share in (self.keep, self.keep - self.slack))
        width = self.removable.widest(blocks, groups, int(most), self.multiple) if blocks else 0
        return width if width and self.removable.count(blocks, groups, width) >= least else None

    def check(self) -> None:
        """Raise ValueError, with the nearest keep ratio that works, if nothing fits."""
        known = self.removable
        sizes = [(b, g) for b in range(1, known.blocks + 1) for g in range(1, known.groups + 1)]
        if any(self.channels(*size) for size in sizes):
            return
        steps = [*range(self.multiple, known.channels, self.multiple), known.channels]
        shares = [known.count(*size, width) / known.parameters for size in sizes for width in steps]
        near = min(shares, key=lambda share: abs(share - self.keep))
        raise ValueError(
            f"keep={self.keep} and slack={self.slack}: nothing that can be removed of {known.place} leaves between "
            f"{max(0, self.keep - self.slack):.2%} and {self.keep:.2%} of its {known.parameters:,} parameters; the "
            f"nearest is keep={near + 5e-5:.4f}"
        )


class Candidates:
    """The candidates of one search, as genes.

    A candidate has a gene for each block that tells whether it stays, one for the number of groups, and for each block
    one that tells which of two rankings chooses its groups and channels, or a mask of each. The channels are as many as
    the window has room for. A mask of another size than a candidate's loses its members with the lowest scores, or gets
    the best of the others; so one that holds all stands for the best.
    """

    def __init__(self, window: Window, ranking: Ranking, members: Members) -> None:
        self.window = window
        self.ranking = ranking
        self.members = members
        self._depth = window.removable.blocks
        self._rankings = [ranking.contribution, ranking.compensated]
        self._totals: dict[Kind, int] = {kind: getattr(window.removable, kind) for kind in window.removable.readers}
        own: list[Gene] = [Category(2)]
        self._start: Genes = (0,)
        if members == "masks":
            own = [Mask(total) for total in self._totals.values()]
            self._start = tuple("".ljust(total, "1") for total in self._totals.values())
        stays: list[Gene] = [Category(2) for _ in range(self._depth)]
        self.space: list[Gene] = [*stays, Whole(1, window.removable.groups), *own * self._depth]

    def first(self, most: int) -> list[Genes]:
        """Return the candidates that a search starts from: they lack no block, one block, and so on.

        The block that turns the hidden states least goes first.
        """
        depth = self._depth
        falling = sorted(range(depth), key=lambda block: self.ranking.blocks[block])
        start = [
            (*[int(block not in falling[:gone]) for block in range(depth)], groups, *self._start * depth)
            for groups in range(self.window.removable.groups, 0, -1)
            for gone in range(depth)
        ]
        return [genes for genes in start if self._sizes(genes)[2]][:most]

    def within(self, genes: Genes) -> Genes | None:
        """Return the candidate in its one spelling, or None if the window has no room for it."""
        if not self._sizes(genes)[2]:
            return None
        # The choice inside of a removed block changes nothing, so take the one of the start.
        chosen = [self._of_block(genes, block) if genes[block] else self._start for block in range(self._depth)]
        if self.members == "masks":
            held = self.kept(genes)
            for block in held.blocks:
                signs = (_signs(getattr(held, kind)[block], total) for kind, total in self._totals.items())
                chosen[block] = tuple(signs)
        return (*genes[: self._depth + 1], *chain.from_iterable(chosen))

    def kept(self, genes: Genes) -> Kept:
        """Return what stays of the model: in each block the groups and channels with the highest scores."""
        blocks, groups, channels = self._sizes(genes)
        assert channels is not None

        def of(kind: Kind, count: int) -> dict[int, Tensor]:
            if kind not in self._totals:
                return {block: torch.arange(getattr(self.window.removable, kind)) for block in blocks}
            scores = {block: self._scores(self._of_block(genes, block), block, kind) for block in blocks}
            return {block: own.topk(count).indices.sort().values for block, own in scores.items()}

        return Kept(blocks, of("groups", groups), of("channels", channels))

    def _scores(self, own: Genes, block: int, kind: Kind) -> Tensor:
        if self.members == "importance":
            return self._rankings[int(own[0])][kind][block]
        signs = str(dict(zip(self._totals, own, strict=True))[kind])
        first_those_in = torch.tensor([int(sign) * len(signs) for sign in signs])
        return self.ranking.entrywise[kind][block].argsort().argsort() + first_those_in

    def _of_block(self, genes: Genes, block: int) -> Genes:
        start = self._depth + 1 + block * len(self._start)
        return genes[start : start + len(self._start)]

    def _sizes(self, genes: Genes) -> tuple[tuple[int, ...], int, int | None]:
        blocks = tuple(block for block in range(self._depth) if genes[block])
        groups = int(genes[self._depth])
        return blocks, groups, self.window.channels(len(blocks), groups)


def _signs(members: Tensor, total: int) -> str:
    return "".join(map(str, torch.zeros(total, dtype=torch.int64).index_fill_(0, members, 1).tolist()))
