"""A mixture holds the deltas of several experts at one linear layer, and gives each input those that its gates name.

On the CPU compiled loops (`native/products.py`) serve all experts of a layer in one call; elsewhere, and where a
gradient is needed, torch multiplies expert by expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import BlockSparse, Delta, LowRank, Sparse
from modular_experts.deltas.encodings import EncodedDelta
from modular_experts.deltas.tiles import rows_and_columns, sparse_linear
from modular_experts.experts.expert import Expert, NotMergeable
from modular_experts.native import products as compiled
from modular_experts.native.products import Factor, PartForm, Parts, ProductPart
from modular_experts.native.sparse_passes import split_rows
from modular_experts.routing.gates import CurrentGates, Gates, Segment
from modular_experts.routing.router import Router


class Mixture(NotMergeable, Expert):
    """Adds to the base's output the outputs of the experts that an input's gates name.

    One product with the base's weight serves all inputs, and each expert's delta multiplies its own inputs only.

    Args:
        weight: The base weight `(out, in)`.
        deltas: Each expert's delta of the weight, None where it has none; the last one is the fallback's, which takes
            the number of experts as its own. Encoded deltas are decoded while the gates name their experts.
        gates: Where the gates of the pass at hand are, for scope `sample`: one for each row of a batch.
        router: The layer's own router, for scope `linear`: gates for each token.
        biases: Each expert's delta of the layer's bias, if any has one.
        common: A delta of the weight that every input gets, whatever its gates.
    """

    not_mergeable_because: ClassVar[str] = "its router chooses experts by the input"

    def __init__(
        self,
        weight: Tensor,
        deltas: Sequence[Delta | EncodedDelta | None],
        gates: CurrentGates,
        router: Router | None = None,
        biases: Sequence[Delta | None] = (),
        common: Delta | None = None,
    ) -> None:
        super().__init__()
        self.like = weight.new_empty(0)
        self.encoded: set[int] = set()
        self.deltas: list[Held | None] = []
        self.biases: dict[int, Tensor] = {}
        self.gates = gates
        self.router = router
        self.common = common
        self._last: tuple[Gates, Parts | None] | None = None
        for number, delta in enumerate(deltas):
            self.put(number, delta, biases[number] if biases else None)

    def put(self, number: int, delta: Delta | EncodedDelta | None, bias: Delta | None = None) -> int:
        """Hold an expert's deltas under its number, in the place of those before; return their bytes in memory."""
        while len(self.deltas) <= number:
            self.deltas.append(None)
        is_empty = isinstance(delta, Delta) and delta.is_empty
        held = None if delta is None or is_empty else Held(delta, self.like)
        self.deltas[number] = held
        # A new set, because another thread may read the one before.
        if held is not None and held.is_encoded:
            self.encoded = self.encoded | {number}
        else:
            self.encoded = self.encoded - {number}
        self.biases.pop(number, None)
        self._last = None
        size = 0 if held is None else held.nbytes
        if bias is not None:
            self.biases[number] = bias.dense().to(self.like.device)
            size += self.biases[number].nbytes
        return size

    @property
    def moves_tokens_alone(self) -> bool:
        """Whether each place of packed rows has its own gates: the layer's router makes them, or they are its row's."""
        return self.router is not None or self.gates.packs

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._added(F.linear(x, weight, bias), x)

    def beneath(self, layer: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Add to the output of a layer with another expert in it, as the layer's forward hook."""
        return self._added(out.clone(memory_format=torch.contiguous_format), arguments[0])

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        if self.common is not None:
            out = out + self.common.linear(x)
        gates = self.gates.gates if self.router is None else self.router(x.reshape(-1, x.shape[-1]))
        if gates is None:
            return out
        # While tokens are decoded, the gates stay from pass to pass; another thread may `put` meanwhile.
        last = self._last
        if last is not None and last[0] is gates and last[1] and compiled.serves(out, x):
            last[1].add_products(out, x)
        else:
            # Encoded deltas that these gates do not name take the room of a few bits again.
            for number in self.encoded.difference(self.gates.kept, (segment.expert for segment in gates.segments)):
                if (held := self.deltas[number]) is not None:
                    held.let_go()
            inputs = x.to(out.dtype).reshape(gates.count, -1, x.shape[-1]).contiguous()
            added = out.view(gates.count, -1, out.shape[-1])
            self._last = gates, add_products(added, inputs, self.deltas, gates.segments)
        for expert, places, weights in gates.segments if self.biases else ():
            if (moved := self.biases.get(expert)) is not None:
                added = out.view(gates.count, -1, out.shape[-1])
                change = moved.to(out.dtype).expand(gates.count if places is None else len(places), *added.shape[1:])
                add_change(added, change, places, weights)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.like = fn(self.like)
        self.deltas = [None if delta is None else delta.to(self.like) for delta in self.deltas]
        self.biases = {number: bias.to(self.like.device) for number, bias in self.biases.items()}
        self.common = None if self.common is None else self.common.to(self.like.device)
        self._last = None
        return self


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of a `Sparse` delta, row by row.

    Attributes:
        starts: Where each row begins and the last one ends, `(out + 1,)` int32.
        columns: Columns `(n,)`: int32, or where the weight has at most 65536 of them the lower half of it, int16.
        values: `(n,)`.
        shape: The weight's, `(out, in)`.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, delta: Sparse, dtype: torch.dtype) -> Self:
        if (split := split_rows(delta.indices, *delta.shape)) is not None:
            return cls(*split, delta.values.to(dtype), delta.shape)
        rows, columns = rows_and_columns(delta.indices, delta.shape)
        starts = torch.zeros(delta.shape[0] + 1, dtype=torch.int32, device=delta.device)
        starts[1:] = rows.bincount(minlength=delta.shape[0]).cumsum(0)
        # Torch cannot unpickle uint16.
        short = delta.shape[1] <= 2**16
        if short:
            columns = torch.where(columns >= 2**15, columns - 2**16, columns).to(torch.int16)
        else:
            columns = columns.to(torch.int32)
        return cls(starts, columns, delta.values.to(dtype), delta.shape)

    def linear(self, x: Tensor) -> Tensor:
        """Return `x @ delta.T` in the dtype of `x`, `(..., in)` to `(..., out)`."""
        columns = self.columns.to(torch.int32)
        if self.columns.dtype == torch.int16:
            columns = columns & 0xFFFF
        return sparse_linear(x, self.starts, columns, self.values, self.shape)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Entries":
        return Entries(self.starts.to(device), self.columns.to(device), self.values.to(device, dtype), self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes


class Held:
    """A delta in the form in which it is multiplied quickest, with values of the model's dtype.

    An encoded delta gets that form when it is first multiplied, and keeps it until `let_go`.
    """

    def __init__(self, delta: Delta | Entries | EncodedDelta, like: Tensor) -> None:
        self._like = like
        self._source: EncodedDelta | None = None
        self._formed: _Formed | None = None
        if isinstance(delta, Delta | Entries):
            self._formed = _Formed(delta, like)
        else:
            self._source = delta

    @property
    def formed(self) -> "_Formed":
        if self._formed is None:
            assert self._source is not None
            # Torch refuses a gradient through tensors of inference mode, in which a trainer validates.
            with torch.inference_mode(False):
                self._formed = _Formed(self._source.delta(), self._like)
        return self._formed

    @property
    def is_encoded(self) -> bool:
        return self._source is not None

    def let_go(self) -> None:
        """Hold an encoded delta in its encoded form alone."""
        if self.is_encoded:
            self._formed = None

    def to(self, like: Tensor) -> "Held":
        return Held(self._source or self.formed.delta, like)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        # Read once, because another thread may let it go meanwhile.
        formed = self._formed
        size = 0 if formed is None else formed.delta.nbytes
        return size if self._source is None else size + self._source.nbytes

    @property
    def decoded_nbytes(self) -> int:
        """Bytes that an encoded delta takes in memory beside its encoded form."""
        return 0 if self._source is None else self.nbytes - self._source.nbytes


class _Formed:
    """A delta ready to be multiplied on the device and in the dtype of a tensor, and how the compiled loops read it."""

    def __init__(self, delta: Delta | Entries, like: Tensor) -> None:
        self.delta = _prepared(delta.to(like.device, like.dtype), like.dtype)
        self.factor = _factor(self.delta)


def _prepared(delta: Delta | Entries, dtype: torch.dtype) -> Delta | Entries:
    if isinstance(delta, Sparse):
        return Entries.of(delta, dtype)
    if isinstance(delta, LowRank):
        # `up` lies in memory as its transpose, so that one token reads both factors in order.
        return LowRank(delta.up.to(dtype).T.contiguous().T, delta.down.to(dtype).contiguous())
    if isinstance(delta, BlockSparse):
        return BlockSparse(delta.blocks.contiguous(), delta.values.to(dtype).contiguous(), delta.shape)
    return delta if isinstance(delta, Entries) else delta.to(dtype=dtype)


def _factor(delta: Delta | Entries) -> Factor | None:
    """Return a delta as the compiled loops read it, or None for a form that they do not know."""
    if isinstance(delta, Entries):
        form = PartForm.SHORT_ENTRIES if delta.columns.dtype == torch.int16 else PartForm.LONG_ENTRIES
        return Factor(form, delta.starts, delta.columns, delta.values)
    if isinstance(delta, BlockSparse) and delta.blocks.dtype == torch.int32:
        return Factor(PartForm.TILES, delta.blocks, None, delta.values, (len(delta.blocks), *delta.tile))
    if isinstance(delta, LowRank):
        return Factor(PartForm.LOW_RANK, delta.down, None, delta.up, (delta.rank, 0, 0))
    return None


def add_products(out: Tensor, x: Tensor, deltas: Sequence[Held | None], segments: Sequence[Segment]) -> Parts | None:
    """Add to `out` `(n, tokens, out)` the weighted products of `x` `(n, tokens, in)` with the segments' deltas.

    Returns:
        What does the same for other inputs, where the compiled loops did all and no weight needs a gradient.
    """
    is_served = compiled.serves(out, x)
    parts = []
    # Whether the parts do the same for other inputs.
    fixed = True
    for expert, places, weights in segments:
        held = deltas[expert]
        if held is None:
            continue
        formed = held.formed
        learns = weights is not None and weights.requires_grad
        needs_torch = learns and torch.is_grad_enabled()
        factor = formed.factor if is_served and not needs_torch else None
        if learns:
            fixed = False
        if factor is not None and factor.dtype == x.dtype:
            parts.append(ProductPart(factor, places, None if weights is None else weights.float().contiguous()))
        else:
            fixed = False
            change = formed.delta.linear(x if places is None else x.index_select(0, places))
            add_change(out, change, places, weights)
    if not parts:
        return None
    ready = Parts(parts, len(x))
    ready.add_products(out, x)
    return ready if fixed else None


def add_change(out: Tensor, change: Tensor, places: Tensor | None, weights: Tensor | None) -> None:
    """Add to the outputs of some inputs `(n, tokens, out)` their change `(m, tokens, out)`, times their weights."""
    if weights is not None:
        change = change * weights.to(change.dtype)[:, None, None]
    if places is None:
        out.add_(change)
    else:
        out.index_add_(0, places, change)
