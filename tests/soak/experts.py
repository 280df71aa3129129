"""Draw random deltas of all four forms, and write random experts of a tiny base."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from modular_experts import Base, BlockSparse, Delta, Dense, LowRank, Sparse, write_expert
from modular_experts.library import make_record
from soak import bases
from soak.case import Case
from soak.reference import files

FORMS = ("dense", "low", "sparse", "tiles")
MIXES = (["dense"], ["low"], ["sparse"], ["tiles"], ["sparse", "tiles"], list(FORMS))
ENCODINGS = ("float32", "bfloat16", "int8", "int4", "magnitudes4", "magnitudes2", "sign")


@cache
def opened(kind: str) -> Base:
    return Base.open(str(bases.base_of(kind)))


@cache
def shapes_of(kind: str) -> dict[str, torch.Size]:
    """Return the shape of each weight of a base, and of each matrix of the weights of three dimensions."""
    config = AutoConfig.from_pretrained(bases.base_of(kind))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    for name, (count, *matrix) in [item for item in shapes.items() if len(item[1]) == 3]:
        shapes |= {f"{name}[{number}]": torch.Size(matrix) for number in range(count)}
        del shapes[name]
    return shapes


def linear_weights(kind: str) -> list[str]:
    """Return the names of the weights of linear layers, and of matrices of a mixture of experts."""
    ends = (*(f".{module}.weight" for module in bases.LINEAR[kind]), "]")
    return [name for name in shapes_of(kind) if name.endswith(ends)]


def absent(kind: str, name: str) -> files.Delta:
    """Return the delta of an expert that does not move a weight, as the reference reads it."""
    nothing = torch.zeros(shapes_of(kind)[name], dtype=torch.float64)
    return files.Delta(nothing, nothing.bool(), "Sparse")


def vectors(kind: str) -> list[str]:
    """Return the names of the norms and biases."""
    return [name for name, shape in shapes_of(kind).items() if len(shape) == 1]


def _numbers(case: Case, ties: bool, *size: int) -> Tensor:
    """Return random numbers; some are few multiples of 1/32, with many zeros and exact ties."""
    generator = torch.Generator().manual_seed(case.random.randrange(2**31))
    values = torch.randn(*size, generator=generator) * 0.05
    return (values * 32).round() / 32 if ties and case.chance(0.4) else values


def _some(case: Case, count: int, limit: int) -> Tensor:
    """Return sorted places below a limit."""
    return torch.tensor(sorted(case.random.sample(range(limit), count)), dtype=torch.int32)


def random_delta(
    case: Case, shape: torch.Size, forms: Sequence[str] = FORMS, ties: bool = True, few: bool = False
) -> Delta:
    """Return a random delta of one of some forms; a vector is dense or sparse."""
    form = case.random.choice(list(forms)) if len(shape) == 2 else case.random.choice(["dense", "sparse"])
    size = shape.numel()
    if form == "dense":
        return Dense(_numbers(case, ties, *shape))
    if form == "low":
        rank = case.random.randint(1, 4)
        return LowRank(_numbers(case, ties, shape[0], rank) * 2, _numbers(case, ties, rank, shape[1]) * 4)
    if form == "sparse":
        counts = [0, 1, 2, max(1, size // 50), max(1, size // 20), size // 3, size]
        count = case.random.choice(counts[1:4] if few else counts)
        return Sparse(_some(case, count, size), _numbers(case, ties, count), shape)
    height, width = case.random.choice([(1, shape[1]), (shape[0], 1), (4, 4), (7, 7), (16, 16), (5, 5)])
    down, across = -(-shape[0] // height), -(-shape[1] // width)
    blocks = _some(case, case.random.randint(1, max(1, down * across // case.random.choice([1, 3, 8]))), down * across)
    values = _numbers(case, ties, len(blocks), height, width)
    for tile, place in zip(values, blocks.tolist(), strict=True):
        row, column = divmod(place, across)
        tile[shape[0] - row * height :] = 0
        tile[:, shape[1] - column * width :] = 0
    return BlockSparse(blocks, values, shape)


def random_expert(
    case: Case,
    kind: str,
    place: Path,
    forms: Sequence[str] = FORMS,
    encoding: str = "float32",
    names: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    ties: bool = True,
    few: bool = False,
) -> dict[str, Delta]:
    """Write an expert with random deltas of the named weights, or of some, and return the deltas before encoding.

    With `few`, a sparse delta keeps few entries.
    """
    if names is None:
        names = case.random.sample(linear_weights(kind), case.random.randint(1, 3))
        if case.chance(0.25):
            names = [*names, case.random.choice(vectors(kind))]
    deltas = {name: random_delta(case, shapes_of(kind)[name], forms, ties, few) for name in names}
    base = {**opened(kind).facts, "id": str(bases.base_of(kind)), "revision": None}
    write_expert(place, deltas, make_record("FullExpert", base, tasks=tasks or [place.name]), encoding=encoding)
    return deltas
