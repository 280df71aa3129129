"""DARE drops entries at random, rescales what stays, and combines the rest (Yu et al., "Language Models are Super
Mario", arXiv 2311.03099); DELLA drops small entries more often (Deep et al., "DELLA-Merging", arXiv 2406.11617).

The random number of an entry is a hash (SplitMix64, Steele, Lea and Flood 2014) of the entry, the expert, the weight's
name and the seed, so the same entries are dropped in any form, in any chunks, and after an interruption.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Sparse
from modular_experts.methods.chunks import FlatEntries
from modular_experts.methods.election import PrunedElection
from modular_experts.methods.method import Context
from modular_experts.methods.prune import Prune, Pruned, PrunedSum, PruneFirst, Shares, keep_all, prune
from modular_experts.methods.settings import FROM_PRESET, Checks, Presets, one_of, one_per_expert, paired, within

RescaleOfDrops = Literal["probability", "l1", "none"]

# Entries at a time, so that the intermediate numbers stay in the processor's cache.
_PIECE = 2**14


def stream_keys(seed: int, name: str, experts: int) -> list[int]:
    """Return for each expert the key, a signed 64-bit number, of its random numbers for one weight."""
    texts = [f"{seed}/{expert}/{name}".encode() for expert in range(experts)]
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]


def uniform(flat: Tensor, key: int) -> Tensor:
    """Return a number in [0, 1) for each flat index (int64), float64 with 53 random bits."""
    return torch.cat([_split_mix(piece, key) for piece in flat.split(_PIECE)])


def _split_mix(flat: Tensor, key: int) -> Tensor:
    # The generator is defined on unsigned numbers; int64 arithmetic wraps around in the same way.
    mixed = flat * -7046029254386353131 + key
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685
    mixed ^= _shifted(mixed, 31)
    return _shifted(mixed, 11).to(torch.float64) * 2.0**-53


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right without copying the sign, which torch would do."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def drop_at_random(keep: float, key: int, rescale: str) -> Prune:
    """Keep each entry with the same probability; with `rescale: probability`, divide what stays by it."""
    return keep_all if keep == 1 else lambda entries: _drop(entries, keep, key, rescale)


def drop_by_rank(delta: Delta, keep: float, epsilon: float, key: int, rescale: str) -> Prune:
    """Keep each entry with a probability that rises with the rank of its magnitude in its row, as `DELLA` describes."""
    width = delta.shape[-1] if delta.shape else 1
    if keep == 1 or width < 2:
        return drop_at_random(keep, key, rescale)

    def drop(entries: FlatEntries) -> FlatEntries:
        if len(delta.shape) == 1 and entries.places is None and entries.values.numel() < width:
            # A vector is one row, which may be cut into chunks; ranks need the whole of it.
            ranks = _row_ranks(FlatEntries(delta.dense(), None, 0), width)[entries.flat()]
        elif len(delta.shape) == 1 and entries.places is not None:
            assert isinstance(delta, Sparse), "tiles belong to matrices"
            whole = FlatEntries(delta.values, delta.indices, 0)
            ranks = _row_ranks(whole, width)[torch.searchsorted(whole.flat(), entries.flat())]
        else:
            ranks = _row_ranks(entries, width)
        return _drop(entries, keep - epsilon + 2 * epsilon * ranks.double() / (width - 1), key, rescale)

    return drop


def _drop(entries: FlatEntries, chance: float | Tensor, key: int, rescale: str) -> FlatEntries:
    stays = uniform(entries.flat(), key) < chance
    if rescale == "probability":
        entries = replace(entries, values=entries.values.double() / chance)
    return entries.only(stays)


def _row_ranks(entries: FlatEntries, width: int) -> Tensor:
    """Return for each entry how many of its row rank below it: by magnitude, equal ones by their place in the row.

    The entries come in the order of the weight. Those that a sparse expert does not keep are zeros and rank lowest.
    """
    if entries.places is None and entries.values.numel() % width == 0:  # whole rows, with every entry
        order = entries.values.abs().view(-1, width).argsort(dim=1, stable=True)
        ranks = torch.arange(width, device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, ranks).view(-1)
    flat = entries.flat()
    rows = flat // width - flat[:1] // width
    # Two stable sorts order the entries row by row, and each row from its smallest magnitude.
    order = entries.values.abs().argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    kept = rows.bincount()
    first = kept.cumsum(0) - kept
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(len(flat), device=flat.device) - first[rows] + width - kept[rows]
    return ranks


@dataclass(frozen=True, kw_only=True)
class RandomDrops(PruneFirst):
    """Pruning that drops entries of each expert with random numbers of the expert's own.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert.
        rescale: What makes up for dropped entries: `probability` divides each entry that stays by the probability with
            which it does, `l1` scales them to the sum of magnitudes that the expert had in the weight, `none` leaves
            them.
        seed: Number that fixes all draws. The same seed gives the same merge.
    """

    checks = Checks(
        rescale=one_of(RescaleOfDrops), keep=within("(0, 1]", "is the probability with which an entry stays")
    )

    keep: Shares = FROM_PRESET
    rescale: RescaleOfDrops = FROM_PRESET  # type: ignore[assignment]
    seed: int = 0

    def pruned(self, deltas: Sequence[Delta], context: Context | None) -> Pruned:
        keys = stream_keys(self.seed, context.name if context else "", len(deltas))
        return prune(deltas, self._drops(deltas, keys), self.rescale)

    def _drops(self, deltas: Sequence[Delta], keys: Sequence[int]) -> list[Prune]:
        keep = one_per_expert(self, "keep", len(deltas))
        return [drop_at_random(share, key, self.rescale) for share, key in zip(keep, keys, strict=True)]


def _chances(method: "RankedDrops", setting: str, epsilons: Shares) -> None:
    for keep, epsilon in paired(method.keep, epsilons):
        if keep != 1 and not (epsilon >= 0 and keep - epsilon > 0 and keep + epsilon < 1):
            raise ValueError(
                f"{type(method).__name__}: keep - epsilon and keep + epsilon are probabilities and must lie in (0, 1), "
                f"got keep {keep} and epsilon {epsilon}"
            )


@dataclass(frozen=True, kw_only=True)
class RankedDrops(RandomDrops):
    """Random drops that take small entries more often.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert.
        epsilon: Half the spread of the probabilities, at least 0, or one per expert; `keep - epsilon` and `keep +
            epsilon` must lie in (0, 1) unless keep is 1.
    """

    checks = Checks(keep=within("(0, 1]", "is the mean probability with which an entry stays"), epsilon=_chances)

    epsilon: Shares = FROM_PRESET

    def _drops(self, deltas: Sequence[Delta], keys: Sequence[int]) -> list[Prune]:
        keep, epsilon = (one_per_expert(self, setting, len(deltas)) for setting in ("keep", "epsilon"))
        return [drop_by_rank(*own, self.rescale) for own in zip(deltas, keep, epsilon, keys, strict=True)]


_SUM = {"scale": 1.0, "rescale": "probability", "normalise": False}
_ELECTION = {"scale": 1.0, "rescale": "probability", "vote": "sum", "divisor": "count", "zero": "none"}


@dataclass(frozen=True, kw_only=True)
class DARE(RandomDrops, PrunedSum):
    """DARE: `scale * sum_i w_i r_i d_i`, where `r_i` drops each entry with probability `1 - keep` and makes up for it.

    The order of the experts matters, because each place in it has random numbers of its own.
    """

    presets: ClassVar[Presets] = {
        None: {"keep": 0.1, **_SUM},
        "paper": {},
        "mergekit": {"keep": 1.0, "rescale": "l1"},
        "peft": {"keep": None},
    }
    preset: Literal["paper", "mergekit", "peft"] | None = None


@dataclass(frozen=True, kw_only=True)
class DARETIES(RandomDrops, PrunedElection):
    """DARE with an election of signs: it averages the entries that stay as `TIES` does."""

    presets: ClassVar[Presets] = {
        None: {"keep": 0.1, **_ELECTION},
        "mergekit": {"keep": 1.0, "rescale": "l1", "vote": "weighted", "divisor": "none", "zero": "positive"},
        "peft": {"keep": None, "zero": "positive"},
    }
    preset: Literal["mergekit", "peft"] | None = None


@dataclass(frozen=True, kw_only=True)
class DELLA(RankedDrops, PrunedElection):
    """DELLA: entries are dropped at random, the smaller the more often, and per entry what carries the elected sign is
    averaged as in `TIES`.

    Within a row of the weight, the entry of rank r (0 for the smallest magnitude) stays with probability `keep -
    epsilon + 2 epsilon r / (width - 1)`; a row of one entry with `keep`. The entries that a sparse expert does not keep
    rank lowest. The order of the experts matters as in `DARE`.
    """

    presets: ClassVar[Presets] = {
        None: {"keep": 0.5, "epsilon": 0.15, **_ELECTION},
        "paper": {},
        "mergekit": {"keep": 1.0, "rescale": "l1", "vote": "weighted", "divisor": "weights", "zero": "positive"},
    }
    preset: Literal["paper", "mergekit"] | None = None


@dataclass(frozen=True, kw_only=True)
class DELLALinear(RankedDrops, PrunedSum):
    """DELLA without an election: entries are dropped with the probabilities of `DELLA`, and the rest is summed."""

    presets: ClassVar[Presets] = {
        None: {"keep": 0.5, "epsilon": 0.15, **_SUM},
        "mergekit": {"keep": 1.0, "rescale": "l1"},
    }
    preset: Literal["mergekit"] | None = None
