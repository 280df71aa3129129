"""Merge random experts by every method, and compare each weight with the formula of the reference."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts import Merged, StoredExpert, merge, methods, open_expert
from modular_experts.library.form import Form
from modular_experts.library.statistics import write_statistics
from modular_experts.merging.merged import as_stored
from modular_experts.methods.method import DataStatistic
from soak import bases, experts
from soak.case import Case
from soak.method_settings import (
    COORDINATES,
    DROPS,
    INSIDE,
    NOT_IN_COORDINATES,
    OF_DATA,
    PRESETS,
    WITH_PRESETS,
    WRAPPERS,
    drawn_settings,
    uniform,
)
from soak.reference import files, merges

NAMES = sorted(methods.METHODS.keys() - {"Distilled"})
# Equal singular values, and equal numbers that are calculated in another order, have no order of their own.
WITHOUT_TIES = (*merges.OF_MATRICES, *WRAPPERS, "SelfRegMean", "SCE", "Karcher", "NuSLERP", "SLERP")
# The order of the experts counts, or a magnitude that does not grow with the experts does.
WITHOUT_LAWS = (*DROPS, *OF_DATA, "SLERP", "NuSLERP", "Difference", "MagMax", "RAM", "RAMPlus", "WUDI", "SCE", "CtM")
ROUNDING = {"bfloat16": 2**-8, "int8": 0.01, "int4": 0.08}


@dataclass
class Drawn:
    """A method with random settings: `settings` in the words of the reference, `method` as the package has it."""

    name: str
    settings: dict[str, Any]
    method: Any
    preset: str | None

    @property
    def is_stepwise(self) -> bool:
        """Whether it ends where some steps of an optimizer do."""
        return self.name == "WUDI" and self.method.solver == "adam"


@dataclass
class Experts:
    """Random experts of one base, as they are stored and as the reference reads them."""

    kind: str
    places: list[Path]
    read: list[dict[str, files.Delta]]

    @property
    def names(self) -> list[str]:
        return sorted({name for expert in self.read for name in expert})

    def deltas(self, name: str) -> list[files.Delta]:
        return [expert.get(name, experts.absent(self.kind, name)) for expert in self.read]

    def stacked(self, name: str) -> Tensor:
        return torch.stack([delta.values for delta in self.deltas(name)])


def drawn_method(case: Case, name: str, count: int, single: bool = False) -> Drawn:
    """Draw the settings of a method, or some and a preset; `single` is for a method inside another one."""
    ours = drawn_settings(case, name, count, single)
    preset = None
    if not single and name in PRESETS and case.chance(0.35):
        preset = case.random.choice(sorted(PRESETS[name]))
        ours = {key: value for key, value in ours.items() if key in WITH_PRESETS}
        ours |= {"keep": 0.3} if preset == "peft" else {}
    reference = (PRESETS[name][preset] if preset else {}) | ours
    if preset:
        ours["preset"] = preset
    if name in WRAPPERS:
        inside = [other for other in INSIDE if name not in COORDINATES or other not in NOT_IN_COORDINATES]
        inner = drawn_method(case, case.random.choice(inside), count, single=True)
        reference["inner"], ours["inner"] = {"method": inner.name, **inner.settings}, inner.method
    if name == "Karcher":
        reference["rounds"] = ours["max_iterations"]
    only_ours = ("max_iterations", "tolerance", "solver", "learning_rate", "steps", "row_wise", "column_wise")
    reference = {key: value for key, value in reference.items() if key not in only_ours}
    return Drawn(name, reference, getattr(methods, name)(**ours), preset)


def random_experts(case: Case, drawn: Drawn, count: int, kind: str) -> Experts:
    """Write experts that a method can be compared on, most of which move the same two or three weights."""
    name = drawn.name
    forms = case.random.choice(experts.MIXES)
    encoding = case.random.choice(["float32"] * 5 + list(experts.ENCODINGS))
    if name in COORDINATES:
        forms = case.random.choice([["low"], ["dense"], ["low", "dense"]])
    if name in WITHOUT_TIES and encoding not in ("float32", "bfloat16", "int8"):
        encoding = "float32"
    if name in ("RAM", "RAMPlus"):
        # An int8 product of factors is zero at some entries but for rounding.
        encoding = "float32"
    if drawn.is_stepwise:
        # Adam makes steps of rounding where the slope is zero.
        forms = ["dense"]
    case.note(base=kind, method=repr(drawn.method), forms=forms, encoding=encoding)
    pool = case.random.sample(experts.linear_weights(kind), 2)
    if case.chance(0.3):
        pool.append(case.random.choice(experts.vectors(kind)))
    places = [case.folder / f"e{number}" for number in range(count)]
    for place in places:
        chosen = [weight for weight in pool if drawn.is_stepwise or case.chance(0.85)] or pool[:1]
        experts.random_expert(case, kind, place, forms, encoding, chosen, ties=name not in WITHOUT_TIES)
    return Experts(kind, places, [files.read_expert(place) for place in places])


def merge_case(case: Case, name: str | None = None, kinds: Sequence[str] = bases.KINDS) -> None:
    """A merge by a method, the named or any one, is the method's formula, weight by weight, written or not.

    A method that iterates is compared by where it ends (`Karcher`), or by the same steps (`CtM`, `WUDI`).
    """
    name = name or case.random.choice(NAMES)
    count = case.random.choice([2, 3, 5] if name == "WUDI" else [1, 2, 2, 3, 3, 5])
    drawn = drawn_method(case, name, count)
    parents = random_experts(case, drawn, count, case.random.choice(list(kinds)))
    first, *others = parents.names
    per_weight: dict[str, Any] = {}
    if others and case.chance(0.2):
        per_weight[re.escape(first)] = case.random.choice([None, methods.TaskArithmetic(scale=0.5)])
        case.note(per_weight=per_weight)
    own = others if per_weight else parents.names
    moved = others if None in per_weight.values() else parents.names
    statistics = _statistics(case, parents, OF_DATA.get(name))
    if name == "Fisher" and drawn.settings.pop("normalise", True):
        for table in statistics:
            size = sum(values.norm() ** 2 for values in table.values()) ** 0.5
            table |= {weight: values / size for weight, values in table.items()}
    if name in ("RegMean", "RegMeanPlusPlus"):
        drawn.settings["inputs"] = _inputs(parents.kind)
    form = Form(case.random.choice(experts.ENCODINGS)) if case.chance(0.15) else Form()
    out = merge(parents.places, drawn.method, case.folder / "m", per_weight=per_weight, form=form)
    written = files.read_expert(out.path)
    case.need(sorted(written) == moved, f"weights {sorted(written)}, not {moved}")
    known = _known(parents, moved, own, statistics)
    lazy = Merged(parents.places, drawn.method, per_weight)
    stored = as_stored(lazy, form)
    for weight in moved:
        x = parents.stacked(weight)
        expected = 0.5 * x.sum(0) if weight not in own else _expected(case, drawn, known[weight], lazy[weight])
        case.close(written[weight].values, stored[weight].dense(), f"lazy {weight}", 1e-6)
        case.close(lazy[weight].dense(), expected, f"{name} {weight}", 1e-4 if name in WITHOUT_TIES else 2e-5)
        if form.encoding in ROUNDING and written[weight].form != "LowRank":
            case.close(written[weight].values, expected, f"stored {weight}", ROUNDING[form.encoding])
        if name in ("EMR", "TALLMask") and weight in own and form == Form():
            _of_tasks(case, drawn, weight, known[weight])
    if name not in WITHOUT_LAWS and drawn.preset is None and case.chance(0.3):
        _laws(case, drawn.method, parents.places, {weight: lazy[weight].dense() for weight in own}, per_weight)
    if case.chance(0.15):
        again = merge(parents.places, drawn.method, case.folder / "again", per_weight=per_weight, form=form)
        case.need(again.content_hash == out.content_hash, "the same merge gives other bytes")


def _statistics(case: Case, parents: Experts, kind: str | None) -> list[dict[str, Tensor]]:
    """Write random statistics of a kind beside the experts, and return them as they are stored."""
    if kind is None:
        return []
    opened = [open_expert(place) for place in parents.places]
    inputs = _inputs(parents.kind)
    generator = torch.Generator().manual_seed(case.random.randrange(2**31))
    every: list[dict[str, Tensor]] = []
    for expert in opened:
        own: dict[str, Tensor] = {}
        for name in parents.names:
            shape = experts.shapes_of(parents.kind)[name]
            if kind == "fisher":
                own[name] = torch.randn(shape, generator=generator) ** 2
            elif len(shape) == 2:
                tokens = torch.randn(4 * shape[inputs], shape[inputs], generator=generator)
                # Some inputs may be zero on all rows of an expert.
                tokens[:, : case.random.choice([0, 0, 3])] = 0
                own[name] = tokens.T @ tokens / len(tokens)
        table = {name: DataStatistic(own[name], inputs=inputs) if name in own else None for name in parents.names}
        among: Sequence[StoredExpert] = opened if kind == "merged_gram" else ()
        write_statistics(expert, kind, table.items(), {"task": 3}, {}, among)
        every.append({name: values.double() for name, values in own.items()})
    return every


def _inputs(kind: str) -> int:
    """Return along which dimension of a base's matrices the inputs of their layers lie."""
    return 0 if kind == "gpt2" else 1


def _known(
    parents: Experts, moved: Sequence[str], own: Sequence[str], statistics: Sequence[Mapping[str, Tensor]]
) -> dict[str, merges.Weight]:
    """Return what the formulas may know of each weight that the method merges, which are its `own`."""
    everything = torch.cat([parents.stacked(name).flatten(1) for name in own], 1) if own else torch.zeros(0)
    blocks = {name: re.search(r"\.(\d+)\.", name) for name in moved}
    depths = {name: int(block[1]) if block else 0 for name, block in blocks.items()}
    known = {}
    for name in own:
        deltas = parents.deltas(name)
        x, kept = parents.stacked(name), torch.stack([delta.kept for delta in deltas])
        known[name] = merges.Weight(x, kept, everything, partial(uniform, name))
        known[name].depth = depths[name] / max(1, *depths.values(), 1)
        known[name].low_rank = all(delta.form == "LowRank" or not delta.kept.any() for delta in deltas)
        if statistics and name in statistics[0]:
            known[name].statistics = torch.stack([table[name] for table in statistics])
    return known


def _expected(case: Case, drawn: Drawn, known: merges.Weight, ours: Any) -> Tensor:
    """Return what the reference makes of the deltas of a weight."""
    is_matrix = known.x.ndim == 3
    if drawn.name == "CtM":
        most = min(drawn.method.rank, *ours.shape) if is_matrix else max(ours.shape)
        rank = torch.linalg.matrix_rank(ours.dense().double(), rtol=1e-5).item() if is_matrix else 0
        case.need(rank <= most, f"the rank is {rank}")
        return _compressed(drawn, known)
    if drawn.is_stepwise and is_matrix:
        method = drawn.method
        return method.scale * _adam(known, method.power, method.learning_rate, method.steps)
    if is_matrix and (getattr(drawn.method, "row_wise", False) or getattr(drawn.method, "column_wise", False)):
        apart = 2 if getattr(drawn.method, "column_wise", False) else 1
        parts = [replace(known, x=x).merged(drawn.name, **drawn.settings) for x in known.x.unbind(apart)]
        return torch.stack(parts, apart - 1)
    return known.merged(drawn.name, **drawn.settings)


def _adam(known: merges.Weight, power: float, learning_rate: float, steps: int) -> Tensor:
    """Return the sum of the deltas after some steps of Adam on the loss of WUDI, by autograd."""
    total = known.x.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([total], lr=learning_rate)
    for _ in range(steps if len(known.movers) else 0):
        optimizer.zero_grad()
        losses = [((total - d) @ d.T).square().sum() / d.norm() ** power for d in known.movers]
        torch.stack(losses).sum().backward()
        optimizer.step()
    return total.detach()


def _compressed(drawn: Drawn, known: merges.Weight) -> Tensor:
    """Return CtM: in the spaces of most `sum_i |U^T d_i V|^2 / |d_i|^2`, found by solving for each in turn."""
    method = drawn.method
    inner = drawn.settings["inner"]
    if known.x.ndim != 3 or not known.x.any():
        return method.scale * known.merged(**inner)
    equal = [d / d.norm() for d in known.movers]
    right = merges.svd(torch.cat(equal), method.rank)[2].T
    left = right
    held = 0.0
    for _ in range(200):
        left = merges.svd(torch.cat([d @ right for d in equal], 1), method.rank)[0]
        _, values, rows = merges.svd(torch.cat([left.T @ d for d in equal]), method.rank)
        right = rows.T
        before = held
        held = values.square().sum().item()
        if held - before <= 1e-10 * held:
            break
    return method.scale * left @ replace(known, x=left.T @ known.x @ right).merged(**inner) @ right.T


def _of_tasks(case: Case, drawn: Drawn, weight: str, known: merges.Weight) -> None:
    """Compare the expert of each task that EMR and TALL masks write beside the merge."""
    x = known.x
    for number, d in enumerate(x):
        ours = files.read_expert(case.folder / f"m-e{number}")[weight].values
        if drawn.name == "TALLMask":
            kept = merges.matters(x, drawn.settings.get("threshold", 0.4))[number]
            expected = drawn.settings.get("scale", 1.0) * kept * x.sum(0)
        else:
            whole = merges.unified(known.everything)
            own = known.everything[number]
            masked = (whole * (own * whole > 0)).abs().sum()
            expected = merges.unified(x) * (d * merges.unified(x) > 0) * (own.abs().sum() / masked if masked else 1)
        case.close(ours, expected, f"expert of task {number}, {weight}")


def _laws(
    case: Case, method: Any, places: list[Path], merged: dict[str, Tensor], per_weight: Mapping[str, Any]
) -> None:
    """The order of the experts does not count, if lists of settings go with them, and a common factor multiplies."""
    turned = {key: value[::-1] for key, value in vars(method).items() if isinstance(value, list)}
    inner = getattr(method, "inner", None)
    if inner is not None:
        lists = {key: value[::-1] for key, value in vars(inner).items() if isinstance(value, list)}
        turned["inner"] = replace(inner, **lists)
        if type(inner).__name__ in DROPS:
            return
    back = Merged([str(place) for place in places[::-1]], replace(method, **turned), per_weight)
    twice = Merged([2.0 * open_expert(place) for place in places], method, per_weight)
    for weight, ours in merged.items():
        case.close(back[weight].dense(), ours, f"other order, {weight}", 1e-4)
        case.close(twice[weight].dense(), 2 * ours, f"twice the experts, {weight}", 1e-4)


FAMILIES = {"merge": merge_case}
