"""Merge random experts by every method, and compare each weight with the formula of the reference."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts import Merged, StoredExpert, merge, methods, open_expert
from modular_experts.library.form import Form
from modular_experts.library.statistics import write_statistics
from modular_experts.merger.merged import as_stored
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
    WRAPPERS,
    drawn_settings,
)
from soak.reference import files, merges

NAMES = sorted(methods.METHODS.keys() - {"Distilled"})
# Equal singular values, and equal numbers that are calculated in another order, have no order of their own.
WITHOUT_TIES = (*merges.OF_MATRICES, *WRAPPERS, "SelfRegMean", "ESM", "SCE", "Karcher", "NuSLERP", "SLERP")
# The order of the experts counts, or a magnitude that does not grow with the experts does.
WITHOUT_LAWS = (*DROPS, *OF_DATA, "SLERP", "NuSLERP", "Difference", "MagMax", "RAM", "RAMPlus", "WUDI", "SCE", "CtM")
ROUNDING = {"bfloat16": 2**-8, "int8": 0.01, "int4": 0.08}


@dataclass
class Drawn:
    """A method with random settings, in the words of the package and of the reference."""

    name: str
    settings: dict[str, Any]
    method: methods.MergeMethod
    preset: str | None


def drawn_method(case: Case, name: str, count: int, single: bool = False) -> Drawn:
    settings = drawn_settings(case, name, count, single)
    given, filled, preset = dict(settings), {}, None
    if not single and name in PRESETS and case.chance(0.35):
        preset = case.random.choice(sorted(PRESETS[name]))
        filled = PRESETS[name][preset]
        settings = {key: value for key, value in settings.items() if key in ("weights", "scale", "seed", "row_wise")}
        given = settings | {"preset": preset}
    if name in WRAPPERS:
        inside = [one for one in INSIDE if name not in COORDINATES or one not in NOT_IN_COORDINATES]
        inner = drawn_method(case, case.random.choice(inside), count, single=True)
        settings["inner"], given["inner"] = (inner.name, inner.settings), inner.method
    if name == "WUDI":
        reference = {key: value for key, value in settings.items() if key in ("power", "scale", "solver")}
    else:
        reference = {key: value for key, value in settings.items() if key not in ("max_iterations", "tolerance")}
    if name == "Karcher":
        reference["rounds"] = 200 if settings["max_iterations"] else 0
    return Drawn(name, filled | reference, getattr(methods, name)(**given), preset)


def merge_case(case: Case) -> None:
    """A merge is the method's formula, weight by weight, however it is written; a formula that iterates is compared by
    where it ends (`Karcher`, `CtM`), or by the same steps (`WUDI`).
    """
    name, kind = case.random.choice(NAMES), case.random.choice(bases.KINDS)
    count = case.random.choice([2, 3, 5] if name == "WUDI" else [1, 2, 2, 3, 3, 5])
    drawn = drawn_method(case, name, count)
    forms = case.random.choice(experts.MIXES)
    if name in COORDINATES or (name == "NuSLERP" and drawn.preset):
        forms = case.random.choice([["low"], ["dense"], ["low", "dense"]])
    encoding = case.random.choice(["float32"] * 5 + list(experts.ENCODINGS))
    if name in WITHOUT_TIES and encoding not in ("float32", "bfloat16", "int8"):
        encoding = "float32"
    if name in ("RAM", "RAMPlus"):
        # An int8 product of factors is zero at some entries but for rounding.
        encoding = "float32"
    stepwise = name == "WUDI" and drawn.settings.pop("solver", "adam") == "adam"
    if stepwise:
        # Adam makes steps of rounding where the slope is zero.
        forms = ["dense"]
    places = [case.folder / f"e{number}" for number in range(count)]
    pool = case.random.sample(experts.linear_weights(kind), 2)
    if case.chance(0.3):
        pool.append(case.random.choice(experts.vectors(kind)))
    for place in places:
        chosen = [weight for weight in pool if stepwise or case.chance(0.85)] or pool[:1]
        experts.random_expert(case, kind, place, forms, encoding, chosen, ties=name not in WITHOUT_TIES)
    case.note(base=kind, method=repr(drawn.method), forms=forms, encoding=encoding)
    read = [files.read_expert(place) for place in places]
    weights = sorted({weight for expert in read for weight in expert})
    per_weight: dict[str, Any] = {}
    if case.chance(0.2) and len(weights) > 1:
        per_weight[re.escape(weights[0])] = case.random.choice([None, methods.TaskArithmetic(scale=0.5)])
        case.note(per_weight=per_weight)
    shapes = {weight: experts.shapes_of(kind)[weight] for weight in weights}
    statistics = _statistics(case, [open_expert(place) for place in places], OF_DATA.get(name), shapes, kind)
    form = Form(case.random.choice(experts.ENCODINGS)) if case.chance(0.15) else Form()
    out = merge(
        [str(place) for place in places], drawn.method, case.folder / "m", per_weight=per_weight, form=form
    ).path
    written = files.read_expert(out)
    stay = [weight for weight in weights[:1] if None in per_weight.values()]
    moved = [weight for weight in weights if weight not in stay]
    case.need(sorted(written) == moved, f"weights {sorted(written)}, not {moved}")
    own = [weight for weight in moved if not (per_weight and weight == weights[0])]
    abouts = _abouts(read, shapes, moved, own, statistics, 0 if kind == "gpt2" else 1)
    lazy = Merged([str(place) for place in places], drawn.method, per_weight)
    stored = as_stored(lazy, form)
    for weight in moved:
        deltas = torch.stack([expert.get(weight, files.absent(shapes[weight])).values for expert in read])
        if weight not in own:
            expected = 0.5 * deltas.sum(0)
        else:
            expected = _expected(case, drawn, deltas, abouts[weight], lazy[weight].dense().double())
        case.close(written[weight].values, stored[weight].dense(), f"lazy {weight}", 1e-6)
        if form.encoding in ("float32", *ROUNDING):
            case.close(lazy[weight].dense(), expected, f"{name} {weight}", 1e-4 if name in WITHOUT_TIES else 2e-5)
        if form.encoding in ROUNDING and written[weight].form != "LowRank":
            case.close(written[weight].values, expected, f"stored {weight}", ROUNDING[form.encoding])
        if name in ("EMR", "TALLMask") and weight in own:
            _of_tasks(case, drawn, weight, deltas, abouts[weight], form)
    if name not in WITHOUT_LAWS and drawn.preset is None and case.chance(0.3):
        _laws(case, drawn.method, places, {weight: lazy[weight].dense() for weight in own}, per_weight)
    if case.chance(0.15):
        again = merge(
            [str(place) for place in places], drawn.method, case.folder / "again", False, iter, per_weight, form=form
        )
        case.need(again.content_hash == open_expert(out).content_hash, "the same merge gives other bytes")


def _statistics(
    case: Case, opened: list[StoredExpert], kind: str | None, shapes: Mapping[str, torch.Size], base: str
) -> list[dict[str, Tensor]]:
    """Write random statistics of a kind beside the experts, and return them as they are stored."""
    every: list[dict[str, Tensor]] = []
    generator = torch.Generator().manual_seed(case.random.randrange(2**31))
    for expert in opened if kind else []:
        own: dict[str, Tensor] = {}
        for weight, shape in shapes.items():
            if kind == "fisher":
                own[weight] = torch.randn(shape, generator=generator) ** 2
            elif len(shape) == 2:
                width = shape[0] if base == "gpt2" else shape[1]
                tokens = torch.randn(4 * width, width, generator=generator)
                tokens[:, : case.random.choice([0, 0, 3])] = 0
                own[weight] = tokens.T @ tokens / len(tokens)
        items = {
            weight: DataStatistic(own[weight], inputs=0 if base == "gpt2" else 1) if weight in own else None
            for weight in shapes
        }
        among = opened if kind == "merged_gram" else ()
        write_statistics(expert, str(kind), items.items(), {"a": 3}, {}, among)
        every.append({weight: values.double() for weight, values in own.items()})
    return every


def _abouts(
    read: list[dict[str, files.Delta]],
    shapes: Mapping[str, torch.Size],
    moved: list[str],
    own: list[str],
    statistics: list[dict[str, Tensor]],
    inputs: int,
) -> dict[str, merges.About]:
    """Return what the formulas may know of each weight that the method merges."""
    rows = [[expert.get(weight, files.absent(shapes[weight])) for expert in read] for weight in own]
    everything = (
        torch.cat([torch.stack([delta.values for delta in row]).flatten(1) for row in rows], 1) if own else None
    )
    blocks = {weight: re.search(r"\.(\d+)\.", weight) for weight in moved}
    depths = {weight: int(block[1]) if block else 0 for weight, block in blocks.items()}
    norms = [sum(values.norm().item() ** 2 for values in known.values()) ** 0.5 for known in statistics]
    abouts = {}
    for weight, row in zip(own, rows, strict=True):
        known = [one[weight] for one in statistics if weight in one]
        assert everything is not None
        abouts[weight] = merges.About(
            name=weight,
            depth=depths[weight] / max(1, *depths.values(), 1),
            everything=everything,
            low=[delta.form == "LowRank" for delta in row],
            kept=torch.stack([delta.kept for delta in row]),
            statistics=torch.stack(known) if known else None,
            norms=norms,
            inputs=inputs,
        )
    return abouts


def _expected(case: Case, drawn: Drawn, x: Tensor, about: merges.About, ours: Tensor) -> Tensor:
    """Return what the reference makes of the deltas of a weight."""
    if drawn.name == "CtM":
        return _compressed(case, drawn, x, about, ours)
    method: Any = drawn.method
    if drawn.name == "WUDI" and method.solver == "adam" and x.ndim == 3:
        return _adam(x, method.power, method.learning_rate, method.steps) * method.scale
    return merges.merged(drawn.name, x, about, **drawn.settings)


def _adam(x: Tensor, power: float, learning_rate: float, steps: int) -> Tensor:
    """Return the sum of the deltas after some steps of Adam on the loss of WUDI, by autograd."""
    found = x.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=learning_rate)
    movers = merges.moving(x)
    for _ in range(steps if len(movers) else 0):
        optimizer.zero_grad()
        losses = [((found - d) @ d.T).square().sum() / d.norm() ** power for d in movers]
        torch.stack(losses).sum().backward()
        optimizer.step()
    return found.detach()


def _compressed(case: Case, drawn: Drawn, x: Tensor, about: merges.About, ours: Tensor) -> Tensor:
    """Return CtM in the spaces of most `sum_i |U^T d_i V|^2 / |d_i|^2`, found by solving for each in turn."""
    method: Any = drawn.method
    inner = drawn.settings["inner"]
    if x.ndim != 3 or not x.any():
        return method.scale * merges.inside(x, about, inner)
    left, right = torch.eye(x.shape[1], dtype=x.dtype), torch.eye(x.shape[2], dtype=x.dtype)
    equal = [d / d.norm() for d in merges.moving(x)]
    right = merges.svd(torch.cat(equal))[2][: method.rank].T
    held = 0.0
    for _ in range(200):
        left = merges.svd(torch.cat([d @ right for d in equal], 1))[0][:, : method.rank]
        _, values, rows = merges.svd(torch.cat([left.T @ d for d in equal]))
        right, before, held = rows[: method.rank].T, held, values[: method.rank].square().sum().item()
        if held - before <= 1e-10 * held:
            break
    case.need(torch.linalg.matrix_rank(ours, rtol=1e-5).item() <= method.rank, f"{about.name}: the rank is too large")
    return method.scale * left @ merges.inside(left.T @ x @ right, about, inner) @ right.T


def _of_tasks(case: Case, drawn: Drawn, weight: str, x: Tensor, about: merges.About, form: Form) -> None:
    """Compare the expert of each task that EMR and TALL masks write beside the merge."""
    if form.encoding != "float32":
        return
    for number, d in enumerate(x):
        ours = files.read_expert(case.folder / f"m-e{number}")[weight].values
        if drawn.name == "TALLMask":
            kept = merges.matters(x, drawn.settings.get("threshold", 0.4))[number]
            expected = drawn.settings.get("scale", 1.0) * kept * x.sum(0)
        else:
            whole = merges.unified(about.everything)
            own = about.everything[number]
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
