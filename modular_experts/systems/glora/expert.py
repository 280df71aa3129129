"""GLoRA trains a change of weight and bias made of five parts; a search then chooses which parts each layer keeps."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.experts.expert import Expert
from modular_experts.experts.lora import check_low_rank
from modular_experts.systems.schedules import zero_gradients

Matrix = Literal["lora", "vector", "constant", "none"]
Column = Literal["lora", "vector", "none"]
Row = Literal["vector", "constant", "none"]

KINDS: dict[str, tuple[str, ...]] = {
    "a": ("none", "constant", "vector", "lora"),
    "b": ("none", "constant", "vector", "lora"),
    "c": ("none", "vector", "lora"),
    "d": ("none", "constant", "vector"),
    "e": ("none", "constant", "vector"),
}
"""What each part of a path may be, the smallest first: 4 * 4 * 3 * 3 * 3 = 432 paths."""


class GLoRAPath(NamedTuple):
    """What the five parts of one layer are, each a name of `KINDS`."""

    a: str
    b: str
    c: str
    d: str
    e: str

    def __str__(self) -> str:
        return " ".join(f"{part}={kind}" for part, kind in self._asdict().items() if kind != "none") or "none"


class GLoRAExpert(Expert):
    """Moves the weight by `W * A + B` and the bias by `b * D + E + W C`, where `*` multiplies entry by entry.

    A and B are `(out, in)`, C is `(in, 1)`, D and E are `(out,)`. A `lora` is a product `up @ down`, a `vector` is one
    column, repeated for each input, a `constant` one number. All start at zero, so that training starts at the base.

    These settings are the largest path. Its smaller ones use parts of the same numbers: the vector is the first column
    of `up`, the constant its first entry. Without the callback `RandomPaths` only the largest path is trained; with B
    as `lora` and nothing else it is a LoRA with a scale of 1. C, D and E need a bias. With A the delta is dense.

    Args:
        weight: The base weight `(out, in)`.
        rank: Inner dimension of the products, from 1 to min(out, in).
        a: What multiplies the weight.
        b: What is added to the weight.
        c: What the weight is multiplied with for the bias.
        d: What multiplies the bias.
        e: What is added to the bias.
    """

    learning_rate: ClassVar[float] = 9e-3

    def __init__(
        self,
        weight: Tensor,
        rank: int = 4,
        a: Matrix = "lora",
        b: Matrix = "lora",
        c: Column = "none",
        d: Row = "none",
        e: Row = "none",
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        check_low_rank(weight, rank)
        self.rank = rank
        self.a = a
        self.b = b
        self.c = c
        self.d = d
        self.e = e
        self.path = GLoRAPath(a, b, c, d, e)
        """The path that is evaluated and exported."""
        self.drawn: GLoRAPath | None = None
        """The path of this training step; None trains `path`."""
        for part, kind in self.path._asdict().items():
            if kind not in KINDS[part]:
                raise ValueError(f"{part}={kind!r} must be one of {', '.join(KINDS[part][::-1])}")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for part, kind in self.path._asdict().items():
            high = columns if part == "c" else rows
            wide = columns if part in "ab" else 1
            up = {"lora": (high, rank), "vector": (high, 1), "constant": (1, 1), "none": None}[kind]
            if up is not None:
                self.register_parameter(f"{part}_up", nn.Parameter(torch.zeros(up, dtype=dtype, device=weight.device)))
            if kind == "lora":
                down = torch.empty(rank, wide, dtype=dtype, device=weight.device)
                self.register_parameter(f"{part}_down", nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5))))

    @property
    def delta_of_base(self) -> bool:
        return self.a != "none" or self.c != "none"

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Return what each part may be, the smallest first and this expert's own last; all combinations are paths."""
        return {part: KINDS[part][: KINDS[part].index(getattr(self, part)) + 1] for part in KINDS}

    def numbers(self, path: GLoRAPath) -> int:
        """Return how many trained numbers a path keeps."""
        own = dict(self.named_parameters())
        kept = 0
        for part, kind in path._asdict().items():
            if kind == "lora":
                kept += own[f"{part}_up"].numel() + own[f"{part}_down"].numel()
            elif kind != "none":
                kept += 1 if kind == "constant" else len(own[f"{part}_up"])
        return kept

    def only(self, path: GLoRAPath, weight: Tensor) -> "GLoRAExpert":
        """Return an expert of this path alone, with the numbers of this expert."""
        expert = type(self)(weight, self.rank, *path)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in expert.named_parameters():
                parameter.copy_(getattr(self, name)[tuple(slice(size) for size in parameter.shape)])
        return expert

    @classmethod
    def of_state(cls, weight: Tensor, state: Mapping[str, Tensor]) -> "GLoRAExpert":
        settings: dict[str, Any] = {}
        for part, kinds in KINDS.items():
            up = state.get(f"{part}_up")
            if up is None:
                settings[part] = "none"
            elif f"{part}_down" in state:
                settings |= {part: "lora", "rank": len(state[f"{part}_down"])}
            else:
                settings[part] = "constant" if len(up) == 1 and "constant" in kinds else "vector"
        return cls(weight, **{"rank": 1} | settings)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        path = self.drawn if self.training and self.drawn else self.path
        out = F.linear(x, weight, bias) + self._delta(path, weight).linear(x)
        moved = None if bias is None else self._bias_delta(path, bias, weight)
        if moved is not None:
            out = out + moved.values.to(out.dtype)
        return out if path is self.path else zero_gradients(out, self)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Delta:
        return self._delta(self.path, weight)

    def bias_delta(self, bias: Tensor, weight: Tensor) -> Dense | None:
        return self._bias_delta(self.path, bias, weight)

    def _delta(self, path: GLoRAPath, weight: Tensor) -> Delta:
        factor = self._product("a", path.a, *weight.shape)
        added = self._product("b", path.b, *weight.shape)
        if factor is None:
            return Sparse.zero(weight.shape, weight.device) if added is None else added
        moved = weight.to(factor.dtype) * (factor.up @ factor.down)
        return Dense(moved if added is None else moved + added.up @ added.down)

    def _product(self, part: str, kind: str, rows: int, columns: int) -> LowRank | None:
        """Return A, B or C in factors, or None; a vector or a constant is a column times a row of ones."""
        if kind == "none":
            return None
        if kind == "lora":
            return LowRank(getattr(self, f"{part}_up"), getattr(self, f"{part}_down"))
        column = self._column(part, kind, rows)
        return LowRank(column, column.new_ones(1, columns))

    def _column(self, part: str, kind: str, size: int) -> Tensor:
        up: Tensor = getattr(self, f"{part}_up")
        return up[: 1 if kind == "constant" else None, :1].expand(size, 1)

    def _bias_delta(self, path: GLoRAPath, bias: Tensor, weight: Tensor) -> Dense | None:
        terms = []
        if (column := self._product("c", path.c, weight.shape[1], 1)) is not None:
            terms.append((weight.to(column.dtype) @ column.up @ column.down)[:, 0])
        if path.d != "none":
            terms.append(bias * self._column("d", path.d, len(bias))[:, 0])
        if path.e != "none":
            terms.append(self._column("e", path.e, len(bias))[:, 0])
        return Dense(torch.stack(terms).sum(0)) if terms else None

    def state(self) -> dict[str, Tensor]:
        return dict(self.state_dict())
