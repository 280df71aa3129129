"""Turn a delta into named tensors for a file, and back, with every check that a file from elsewhere needs.

Values are stored as float32, whatever they were trained in, or encoded (`encoded.py`). The numbers of the kept entries
or tiles take the shortest of four forms: as they are, in int32 (int64 for a weight of 2^31 entries or more); as
*gaps*, a byte for each distance to the number before, with a zero byte for every 255 to skip; as a *mask*, a bit for
each entry or tile; or beside encoded values as a *rice* code, which comes within 2 % of the entropy of random numbers.

A Rice code (Rice and Plaunt, 1971) splits each distance, less one, into its low bits and a quotient `q`. Its first byte
is the count of low bits, at most 8; then come the planes of all low bits (`deltas/encodings.py`); then a mask, in which
`q` zeros and a one stand for each quotient.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse, all_finite
from modular_experts.deltas.encodings import EIGHT_BITS, ENCODINGS, from_planes, to_planes
from modular_experts.deltas.tiles import index_dtype, tile_grid
from modular_experts.library.encoded import StoredValues
from modular_experts.library.tensorfile import Layout
from modular_experts.native.sparse_passes import decode_numbers

PLACES = ("gaps", "mask", "rice")
"""The encodings of kept numbers."""
FURTHEST = 255
"""The largest distance that one byte of gaps holds."""
_MOST_LOW = 8  # bits of a distance that a Rice code stores as they are
_PART = 1 << 15  # bytes of a mask that are unpacked at once, so that their numbers stay in the processor's cache
# The tensors of each form beside the kept numbers, and the name of these where they are stored as they are.
_FORMS = {"Dense": ("dense",), "LowRank": ("up", "down"), "Sparse": ("values",), "BlockSparse": ("values",)}
_KEPT = {"Sparse": "indices", "BlockSparse": "blocks"}
NUMBERS = (*_KEPT.values(), *PLACES)


def pack(delta: Delta, encoding: str = "float32") -> tuple[dict[str, Tensor], StoredValues]:
    """Return the tensors to store, by their name in the file, contiguous and on the CPU, and how values are stored."""
    form = type(delta).__name__
    shape = delta.shape
    encoding = _with_zero(delta, encoding)
    if form not in _FORMS:
        raise TypeError(f"a delta to store must be one of {', '.join(_FORMS)}, got {form}")
    dtype = torch.bfloat16 if encoding == "bfloat16" else torch.float32
    values = {}
    kept = None
    numbers = {}
    for name in _FORMS[form]:
        own: Tensor = getattr(delta, "values" if name == "dense" else name)
        values[name] = own.detach().to("cpu", dtype).contiguous()
        if not all_finite(values[name]):
            raise ValueError(f"it holds values that are not finite in {str(dtype).removeprefix('torch.')}")
    if form in _KEPT:
        kept = getattr(delta, _KEPT[form]).detach().to("cpu", index_dtype(shape)).contiguous()
        numbers = encode(kept, _limit(form, shape, values["values"].shape), _KEPT[form], encoding != "float32")
    sizes = {name: tuple(own.shape) for name, own in values.items()} if encoding in ENCODINGS else {}
    stored = StoredValues(form, tuple(shape), encoding, sizes)
    packed = numbers | (stored.encode(values, kept) if sizes else values)
    check_layout(stored, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()})
    return packed, stored


def packed_bytes(delta: Delta, *encodings: str) -> list[int]:
    """Return how many bytes the tensors that `pack` returns have in each encoding, without encoding values."""
    sizes_of_each = []
    for name in encodings:
        packed, stored = pack(delta, "float32" if name == "float32" else "bfloat16")
        sizes = {name: tuple(packed.pop(name).shape) for name in _FORMS[stored.form]}
        kept = sum(own.nbytes for own in packed.values())
        sizes_of_each.append(kept + replace(stored, encoding=_with_zero(delta, name), sizes=sizes).nbytes())
    return sizes_of_each


def _with_zero(delta: Delta, encoding: str) -> str:
    """Return `int4` in place of signs, which have no zero, for a low-rank delta that leaves whole rows or columns."""
    has_zero = encoding not in ENCODINGS or ENCODINGS[encoding].is_linear
    if has_zero or not isinstance(delta, LowRank) or bool(delta.up.any(1).all() and delta.down.any(0).all()):
        return encoding
    return "int4"


def check_layout(values: StoredValues, layout: Mapping[str, Layout]) -> None:
    """Check dtypes and shapes of the stored tensors of one weight, by their names in the file, before reading them."""
    form = values.form
    shape = values.shape
    layout = values.decoded_layout(layout)
    kept = _name_of_kept(form, layout)
    if form not in _FORMS or set(layout) != {*_FORMS[form], *kept}:
        raise ValueError(f"it has the tensors {sorted(layout)}, which are not the tensors of a {form} delta")
    shapes = {name: size for name, (_, size) in layout.items()}
    if not _is_delta(form, shape, shapes, kept):
        raise ValueError(f"its tensors of shapes {shapes} are not a {form} delta of a weight {shape}")
    for name, (dtype, _) in layout.items():
        wanted = index_dtype(shape) if name in _KEPT.values() else torch.float32
        wanted = torch.uint8 if name in PLACES else wanted
        if dtype != wanted:
            raise ValueError(f"its {name} are {dtype} and must be {wanted}")


def _is_delta(form: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], kept: Sequence[str]) -> bool:
    if form == "Dense":
        return shapes["dense"] == shape
    if form == "LowRank":
        up = shapes["up"]
        down = shapes["down"]
        return len(shape) == 2 and up == (shape[0], *down[:1]) and down == (*down[:1], shape[1])
    values = shapes["values"]
    in_tiles = len(shape) == 2 and len(values) == 3 and min(values[1:]) > 0
    if not (in_tiles if form == "BlockSparse" else len(values) == 1):
        return False
    return fits(kept[0], shapes[kept[0]], values[0], _limit(form, shape, values))


def unpack(stored: StoredValues, tensors: Mapping[str, Tensor], check: bool = True) -> Delta:
    """Return the delta of tensors of checked layout, by their names in the file.

    Encoded numbers are always checked; values, and numbers that are stored as they are, if `check` is set.
    """
    form = stored.form
    shape = stored.shape
    for name, tensor in tensors.items() if check else ():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"its {name} hold numbers that are not finite")
    if form not in _KEPT:
        values = {name: stored.decode(name, tensors, None) for name in _FORMS[form]}
        return LowRank(values["up"], values["down"]) if form == "LowRank" else Dense(values["dense"])
    (name,) = _name_of_kept(form, tensors)
    size = stored.sizes["values"] if stored.sizes else tensors["values"].shape
    limit = _limit(form, shape, size)
    count = size[0]
    kept = decode(name, tensors[name], count, limit, index_dtype(shape))
    if check and name not in PLACES and kept.numel():
        if not (int(kept[0]) >= 0 and int(kept[-1]) < limit):
            raise ValueError(f"its indices run from {int(kept[0])} to {int(kept[-1])}, out of [0, {limit})")
        if kept.numel() > 1 and int((kept[1:] - kept[:-1]).min()) < 1:
            raise ValueError("its indices are not sorted and unique")
    return (Sparse if form == "Sparse" else BlockSparse)(
        kept, stored.decode("values", tensors, kept), torch.Size(shape)
    )


@dataclass(frozen=True, eq=False)
class PackedDelta:
    """A delta as it lies in a file, whose bytes have been checked, or if `is_transposed`, of the transposed weight."""

    stored: StoredValues
    tensors: Mapping[str, Tensor]
    is_transposed: bool = False

    def delta(self) -> Delta:
        """Return the delta that the tensors stand for; each call decodes them again."""
        delta = unpack(self.stored, self.tensors, check=False)
        return delta.T if self.is_transposed else delta

    @property
    def T(self) -> "PackedDelta":  # noqa: N802 - the name torch gives it
        return replace(self, is_transposed=not self.is_transposed)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _name_of_kept(form: str, names: Collection[str]) -> list[str]:
    """Return the name of the tensor of kept numbers: one for a sparse form, no name for the others."""
    return [next((name for name in PLACES if name in names), _KEPT[form])] if form in _KEPT else []


def _limit(form: str, shape: Sequence[int], values: Sequence[int]) -> int:
    """Return how many entries, or tiles of the size that the values have, a weight has."""
    return math.prod(shape) if form == "Sparse" else math.prod(tile_grid(shape, (values[1], values[2])))


def encode(numbers: Tensor, limit: int, plain: str, by_rice: bool = False) -> dict[str, Tensor]:
    """Return sorted, unique numbers `(n,)` in the fewest bytes, by the name of the encoding.

    Ties go to the fastest to read; `plain` is the name for the numbers as they are. A Rice code is tried if `by_rice`.
    """
    distances = numbers.diff(prepend=numbers.new_tensor([-1]))
    if numbers.numel() and not (int(distances.min()) > 0 and int(numbers[-1]) < limit):
        raise ValueError(f"its {plain} are not sorted and unique numbers in [0, {limit})")
    further = (distances - 1) // FURTHEST
    size = {
        plain: numbers.numel() * numbers.element_size(),
        "gaps": numbers.numel() + int(further.sum()),
        "mask": -(-limit // 8),
    }
    if by_rice and numbers.numel():
        low, size["rice"] = _low_bits(distances - 1)
    shortest = min(size, key=size.__getitem__)
    if shortest == "gaps":
        last = (distances - FURTHEST * further).to(torch.uint8)
        gaps = last.new_zeros(size["gaps"])
        gaps[torch.arange(last.numel(), device=last.device) + further.cumsum(0)] = last
        return {"gaps": gaps}
    if shortest == "mask":
        return {"mask": _mask(numbers, limit)}
    if shortest == "rice":
        return {"rice": _to_rice(distances - 1, low)}
    return {plain: numbers}


def _mask(numbers: Tensor, limit: int) -> Tensor:
    bits = torch.zeros(8 * -(-limit // 8), dtype=torch.uint8, device=numbers.device)
    bits[numbers] = 1
    return to_planes(bits, 1)[0]


def _low_bits(rests: Tensor) -> tuple[int, int]:
    """Return the count of low bits with which a Rice code is shortest, and its bytes."""
    count = rests.numel()
    bits = range(_MOST_LOW + 1)
    sizes = [1 + low * -(-count // 8) - (-(count + int((rests >> low).sum())) // 8) for low in bits]
    return min(zip(bits, sizes, strict=True), key=lambda pair: pair[1])


def _to_rice(rests: Tensor, low: int) -> Tensor:
    ends = (rests >> low).cumsum(0) + torch.arange(rests.numel())
    planes = to_planes((rests & (1 << low) - 1).to(torch.uint8), low).view(-1)
    return torch.cat([planes.new_tensor([low]), planes, _mask(ends, int(ends[-1]) + 1)])


def fits(name: str, shape: Sequence[int], count: int, limit: int) -> bool:
    """Return whether a stored tensor of this shape can hold `count` numbers below a limit."""
    if len(shape) != 1 or count > limit:
        return False
    if name == "gaps":
        return count <= shape[0] <= count + limit // FURTHEST
    if name == "rice":
        # Low bits, a one for each number, the zeros before them, and the bits that fill up the last bytes.
        return 0 < count <= 8 * shape[0] <= (_MOST_LOW + 1) * (count + 8) + limit + 8
    return shape[0] == (-(-limit // 8) if name == "mask" else count)


def decode(name: str, stored: Tensor, count: int, limit: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers `(count,)` of a stored tensor that `fits`; numbers stored as they are stay unchecked."""
    if name not in PLACES:
        return stored
    compiled = decode_numbers(name, stored, count) if dtype == torch.int32 else None
    numbers, last = compiled or _DECODE[name](stored, count)
    if last is None or last >= limit:
        reached = "" if last is None else f", as the last would be {last}"
        raise ValueError(f"its {name} cannot stand for {count} numbers in [0, {limit}){reached}")
    return numbers.to(dtype)


def _from_gaps(gaps: Tensor, count: int) -> tuple[Tensor, int | None]:
    """Return the numbers, and the last of them: -1 for an empty list, None where there are not `count` numbers."""
    zeros = gaps.numel() - int(gaps.count_nonzero())
    # Wide enough that no sum overflows, whatever a forged file holds.
    wide = torch.int32 if FURTHEST * gaps.numel() < 2**31 else torch.int64
    numbers = gaps.to(wide)
    if gaps.numel() - zeros != count or (zeros and int(gaps[-1]) == 0):
        return numbers, None
    if zeros:
        numbers.masked_fill_(gaps == 0, FURTHEST)
    numbers[:1] -= 1
    numbers.cumsum_(0)
    last = int(numbers[-1]) if count else -1
    if zeros:
        numbers = numbers.index_select(0, torch.from_numpy(gaps.numpy().nonzero()[0]))
    return numbers, last


def _from_mask(mask: Tensor, count: int) -> tuple[Tensor, int | None]:
    wide = torch.int32 if 8 * mask.numel() < 2**31 else torch.int64
    numbers = torch.empty(count, dtype=wide, device=mask.device)
    count_so_far = 0
    for part, eights in enumerate(mask.split(_PART)):
        bits = EIGHT_BITS[eights.int()].view(torch.bool)
        here = torch.from_numpy(bits.numpy().nonzero()[0])  # three times as fast as torch's own
        if count_so_far + here.numel() > count:
            return numbers, None
        torch.add(here, 8 * _PART * part, out=numbers[count_so_far : count_so_far + here.numel()])
        count_so_far += here.numel()
    if count_so_far < count:
        return numbers, None
    return numbers, int(numbers[-1]) if count else -1


def _from_rice(rice: Tensor, count: int) -> tuple[Tensor, int | None]:
    low = int(rice[0])
    eighth = -(-count // 8)
    if low > _MOST_LOW or rice.numel() < 2 + low * eighth:
        return rice, None
    planes, mask = rice[1:].split([low * eighth, rice.numel() - 1 - low * eighth])
    ends, last = _from_mask(mask, count)
    if last is None:
        return ends, None
    # The sums of the quotients are the places of the ones, less the ones before them.
    before = torch.arange(count)
    numbers = (
        from_planes(planes.view(low, eighth), count).cumsum(0, dtype=torch.int64) + (ends - before << low) + before
    )
    return numbers, int(numbers[-1])


_DECODE = {"gaps": _from_gaps, "mask": _from_mask, "rice": _from_rice}
