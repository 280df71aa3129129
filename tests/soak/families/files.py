"""Write experts in every form and encoding, cut them, take one out of a merge, compare them, and apply them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modular_experts import apply, import_expert, interference, merge, methods, open_expert, write_expert
from modular_experts.library.form import Form
from modular_experts.merging.remove import remove
from soak import bases, experts
from soak.case import Case
from soak.reference import files, merges
from soak.reference.model import Reference

# How far an encoding moves a value, as a share of the largest of its row.
ROUNDING = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127 + 2**-8, "int4": 0.5 / 7 + 2**-8}
CONVERSION_ROUNDS = 2e-6


def file_case(case: Case) -> None:
    """What was written is read by the package and by the reference as the same numbers and the same kept entries.

    An expert that is read and written again has the same bytes, and one flipped byte is noticed.
    """
    kind = case.random.choice(bases.KINDS)
    encoding = case.random.choice(experts.ENCODINGS)
    case.note(base=kind, encoding=encoding)
    place = case.folder / "expert"
    raw = experts.random_expert(case, kind, place, encoding=encoding)
    reference = files.read_expert(place)
    ours = open_expert(place)
    case.need(sorted(reference) == sorted(ours) == sorted(raw), "the names of the weights differ")
    for name, delta in reference.items():
        text = f"{delta.form} of {name}"
        case.need(delta.form == ours.forms()[name] == type(raw[name]).__name__, f"{text}: {ours.forms()[name]}")
        case.close(ours[name].dense(), delta.values, text, 1e-6)
        count = ours.kept_entries()[name]
        case.need(count == _kept(delta, encoding), f"{text}: {count} entries are kept")
        if delta.form in ("Sparse", "BlockSparse"):
            places = ours[name].by_entries().indices.long()
            kept = torch.zeros(delta.kept.numel(), dtype=torch.bool).index_fill(0, places, True)
            case.need(torch.equal(kept.view_as(delta.kept), delta.kept), f"{text}: other entries are kept")
        if encoding in ROUNDING and delta.form != "LowRank":
            case.close(delta.values, raw[name].dense(), f"stored {text}", ROUNDING[encoding])
    again = case.folder / "again"
    write_expert(again, {name: ours[name] for name in ours}, ours.record, encoding=encoding)
    if encoding in ("float32", "bfloat16"):
        case.need(open_expert(again).content_hash == ours.content_hash, "a copy has another content hash")
    _flip(case, place)


def _kept(delta: files.Delta, encoding: str) -> int:
    """Return the number of kept entries; of a dense delta that is not in codes, zeros do not count."""
    counts_values = delta.form == "Dense" and encoding in ("float32", "bfloat16")
    return int((delta.values != 0 if counts_values else delta.kept).sum())


def _flip(case: Case, place: Path) -> None:
    """Flip one bit of the tensors, and read all of them."""
    file = place / "delta.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if start == len(content):
        return
    content[case.random.randrange(start, len(content))] ^= 1 << case.random.randrange(8)
    file.write_bytes(content)
    try:
        dict(open_expert(place))
    except ValueError:
        return
    case.need(False, "a flipped bit was not noticed")


def cut_case(case: Case) -> None:
    """An expert cut to fewer directions is the nearest one of that rank; a sparse one keeps its largest entries, or the
    tiles of largest norm.
    """
    kind = case.random.choice(bases.KINDS)
    encoding = case.random.choice(["float32", "bfloat16", "int8"])
    forms = case.random.choice([["dense"], ["low"], ["sparse"], ["tiles"], ["sparse", "tiles"]])
    rank = case.random.choice([None, 1, 3, 10])
    keep = case.random.choice([1.0, 0.5, 0.1])
    place = case.folder / "expert"
    experts.random_expert(case, kind, place, forms, ties=False)
    form = Form(encoding, keep, rank)
    case.note(base=kind, form=str(form), forms=forms)
    cut = merge([place], "TaskArithmetic", case.folder / "cut", form=form)
    read = files.read_expert(cut.path)
    for name, delta in files.read_expert(place).items():
        expected = delta.values
        if expected.ndim == 2 and rank is not None and rank < min(expected.shape) and delta.kept.any():
            expected = merges.rebuilt(expected, rank)
        elif keep < 1 and delta.form == "Sparse" and delta.kept.any():
            count = merges.count_of(keep, int(delta.kept.sum()))
            order = expected.abs().reshape(-1).sort(descending=True, stable=True).indices
            expected = expected * torch.zeros(expected.numel()).index_fill(0, order[:count], 1).view_as(expected)
        elif keep < 1 and delta.form == "BlockSparse":
            expected = _largest_tiles(expected, open_expert(place).tiles()[name], keep, delta.kept)
        case.close(
            read[name].values,
            expected,
            f"{delta.form} of {name}",
            {"float32": 2e-5, "bfloat16": 0.02}.get(encoding, 0.05),
        )


def _largest_tiles(values: Tensor, tile: tuple[int, int], keep: float, kept: Tensor) -> Tensor:
    """Return a matrix with a share of its kept tiles, the ones of largest norm, and zeros elsewhere."""
    height, width = tile
    corners = [(row, column) for row in range(0, len(values), height) for column in range(0, values.shape[1], width)]
    parts = [values[row : row + height, column : column + width] for row, column in corners]
    held = [number for number, (row, column) in enumerate(corners) if kept[row, column]]
    held.sort(key=lambda number: -parts[number].norm().item())
    result = torch.zeros_like(values)
    for number in held[: merges.count_of(keep, len(held))]:
        row, column = corners[number]
        result[row : row + height, column : column + width] = parts[number]
    return result


def remove_case(case: Case) -> None:
    """Taking an expert out of an average or a sum leaves the merge of the others."""
    kind = case.random.choice(bases.KINDS)
    count = case.random.choice([2, 3, 4])
    forms = case.random.choice(experts.MIXES)
    places = [case.folder / f"e{number}" for number in range(count)]
    names = case.random.sample(experts.linear_weights(kind), 3)
    for place in places:
        experts.random_expert(case, kind, place, forms, names=case.random.sample(names, 2))
    weights = [case.random.randint(1, 16) / 8 for _ in places] if case.chance(0.6) else None
    scale = case.random.choice([1.0, 0.5, -0.75])
    linear = case.random.choice([methods.Average, methods.TaskArithmetic])
    gone = case.random.randrange(count)
    case.note(base=kind, method=linear.__name__, weights=weights, gone=gone, forms=forms)
    merge(places, linear(weights=weights, scale=scale), case.folder / "all")
    rest = remove(case.folder / "all", places[gone], case.folder / "rest")
    others = [place for number, place in enumerate(places) if number != gone]
    kept = [weight for number, weight in enumerate(weights or []) if number != gone] or None
    read = [files.read_expert(place) for place in others]
    ours = files.read_expert(rest.path)
    parents = [parent["name"] for parent in rest.record["parents"]]
    case.need(parents == [place.name for place in others], f"the parents are {parents}")
    everywhere = {name for expert in [*read, files.read_expert(places[gone])] for name in expert}
    for name in sorted(everywhere):
        nothing = experts.absent(kind, name)
        deltas = torch.stack([expert.get(name, nothing).values for expert in read])
        weight = merges.Weight(deltas, deltas != 0, deltas.flatten(1))
        expected = weight.merged(linear.__name__, scale, weights=kept or 1.0)
        case.close(ours.get(name, nothing).values, expected, name, 2e-5, 2e-6)


def interference_case(case: Case) -> None:
    """Cosine, overlap, conflict and distance equal a count over dense experts."""
    kind = case.random.choice(bases.KINDS)
    count = case.random.choice([2, 3, 4])
    forms = case.random.choice(experts.MIXES)
    encoding = case.random.choice(["float32", "float32", "sign", "int4"])
    if "low" in forms:
        # A product of coarse factors is zero at some entries but for rounding.
        encoding = "float32"
    names = case.random.sample(experts.linear_weights(kind), 3)
    places = [case.folder / f"e{number}" for number in range(count)]
    for place in places:
        chosen = case.random.sample(names, 2)
        experts.random_expert(case, kind, place, forms, encoding, chosen, ties="low" not in forms)
    case.note(base=kind, forms=forms, encoding=encoding)
    method = case.random.choice([None, methods.TaskArithmetic(scale=0.5)])
    measured = interference(places, method)
    case.need(measured.experts == [place.name for place in places], f"experts {measured.experts}")
    read = [files.read_expert(place) for place in places]
    used = sorted({name for expert in read for name in expert})
    rows = [
        torch.cat([expert.get(name, experts.absent(kind, name)).values.reshape(-1) for name in used]) for expert in read
    ]
    x = torch.stack(rows)
    m = 0.5 * x.sum(0) if method else x.sum(0) / (x != 0).sum(0).clamp(min=1)
    for i, first in enumerate(x):
        distance = (m - first).norm() ** 2 / first.norm() ** 2
        if first.any():
            case.close(measured.total.distance[i], distance, f"distance of {i}", 1e-5)
        for j, second in enumerate(x):
            both = (first != 0) & (second != 0)
            either = (first != 0) | (second != 0)
            against = both & (first.sign() != second.sign())
            lengths = (first.norm() * second.norm()).clamp(min=1e-300)
            case.close(measured.total.cosine[i, j], first @ second / lengths, f"cosine of {i} and {j}", 1e-5)
            case.close(
                measured.total.overlap[i, j], both.sum() / either.sum().clamp(min=1), f"overlap of {i} and {j}", 1e-6
            )
            conflict = against.sum() / both.sum().clamp(min=1)
            case.close(measured.total.conflict[i, j], conflict, f"conflict of {i} and {j}", 1e-6)
    layered = sum(sums.products for sums in measured.layers.values())
    case.close(torch.as_tensor(layered), measured.total.products, "the sum over layers", 1e-6)


def apply_case(case: Case) -> None:
    """A written checkpoint is the base plus the deltas of all experts, and importing it finds their sum again."""
    kind = case.random.choice(bases.KINDS)
    count = case.random.choice([1, 2, 3])
    forms = case.random.choice(experts.MIXES)
    dtype = case.random.choice([None, None, "bfloat16"])
    places = [case.folder / f"e{number}" for number in range(count)]
    for place in places:
        experts.random_expert(case, kind, place, forms, case.random.choice(["float32", "int8"]))
    case.note(base=kind, forms=forms, dtype=dtype)
    apply(places, case.folder / "checkpoint", dtype=dtype)
    summed = Reference(bases.base_of(kind), bases.CONTEXT)
    tuned = AutoModelForCausalLM.from_pretrained(case.folder / "checkpoint", dtype=dtype or torch.float32)
    moved: dict[str, Tensor] = {}
    for place in places:
        for name, delta in files.read_expert(place).items():
            moved[name] = moved.get(name, 0) + delta.values
    summed.add(moved)
    for name, weight in tuned.named_parameters():
        case.close(weight.detach(), summed.weight(name), f"checkpoint {name}", 1e-6 if dtype is None else 2**-8)
    # The files of a mixture of experts have other names than the model, and cannot be imported.
    if dtype is not None or kind == "mixtral" or not any(total.any() for total in moved.values()):
        return
    imported = files.read_expert(
        import_expert(case.folder / "checkpoint", case.folder / "back", bases.base_of(kind)).path
    )
    for name in imported.keys() | moved.keys():
        nothing = experts.absent(kind, name)
        ours = imported.get(name, nothing).values
        case.close(ours, moved.get(name, nothing.values), f"imported {name}", 1e-6, 5e-7)


FAMILIES = {
    "file": file_case,
    "cut": cut_case,
    "remove": remove_case,
    "interference": interference_case,
    "apply": apply_case,
}
