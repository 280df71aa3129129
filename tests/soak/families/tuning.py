"""Tune and search merges, distil and shrink experts, by validation rows that the reference measures too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from modular_experts import ATLAS, AdaMerging, distill, methods, search, shrink, tune
from modular_experts.library.form import Form
from soak.case import Case
from soak.reference import files, merges
from soak.reference.model import negative_log_likelihood
from soak.validation import Setup, mean_loss


def _near(case: Case, ours: Mapping[str, float], reference: Mapping[str, float], text: str) -> None:
    case.need(ours.keys() == reference.keys(), f"{text}: tasks {sorted(ours)}, not {sorted(reference)}")
    for task, loss in reference.items():
        case.need(abs(ours[task] - loss) <= 2e-4 * max(1, loss), f"{text}: {task} {ours[task]}, not {loss}")


def tune_case(case: Case) -> None:
    """Every combination of the grid is tried, each trial has the loss that the reference measures, the best is chosen,
    its merge is written, and the same call gives the same bytes.
    """
    setup = Setup(case, case.random.choice([2, 3]), slices=True)
    name, grid = case.random.choice(
        [
            ("TaskArithmetic", {"scale": [0.3, 0.7, 1.0, 1.5]}),
            ("TIES", {"scale": [0.5, 1.0], "keep": [0.1, 0.5, 1.0]}),
            ("SparseAverage", {"exponent": [0.0, 0.5, 1.0], "scale": [0.7, 1.0]}),
            ("ConsensusTA", {"threshold": [0.2, 0.6], "scale": [1.0, 0.4]}),
            ("Average", {}),
        ]
    )
    case.note(method=name, grid=grid)
    method = getattr(methods, name)()
    tuned = tune(setup.places, method, setup.mixture(), case.folder / "tuned", grid)
    if grid:
        count = len(grid["scale"]) * max(len(values) for key, values in {"": [1], **grid}.items() if key != "scale")
        case.need(len(tuned.trials) == count, f"{len(tuned.trials)} trials, not {count}")
    _near(case, tuned.base, setup.losses({}), "the base")
    best = min(trial.loss for trial in tuned.trials)
    case.need(tuned.best.loss == best, f"chose {tuned.best.loss}, and {best} was measured")
    for trial in [case.random.choice(tuned.trials), tuned.best]:
        deltas = {weight: _merged(setup, name, weight, trial.settings) for weight in setup.names}
        _near(case, trial.losses, setup.losses(deltas), f"trial {trial.settings}")
    assert tuned.expert is not None
    for weight, delta in files.read_expert(tuned.expert.path).items():
        case.close(delta.values, _merged(setup, name, weight, tuned.best.settings), f"tuned {weight}")
    if case.chance(0.6):
        return
    again = tune(setup.places, method, setup.mixture(), case.folder / "again", grid)
    assert again.expert is not None
    case.need(again.expert.content_hash == tuned.expert.content_hash, "the same call gives other bytes")


def _merged(setup: Setup, method: str, weight: str, settings: Mapping[str, Any]) -> Tensor:
    x = setup.stacked(weight)
    return merges.Weight(x, x != 0, x.flatten(1)).merged(method, **settings)


def search_case(case: Case) -> None:
    """A few steps of Adam on the coefficients, down the mean loss of the tasks, end where autograd does; the written
    expert is the experts' sum with these, and the same call gives the same bytes.
    """
    setup = Setup(case, case.random.choice([2, 3]))
    per = case.random.choice(["expert", "weight"])
    steps = case.random.randint(1, 4)
    rate = 0.05
    algorithm: Any = case.random.choice(
        [
            ATLAS(steps, rate, per=per, decay=case.chance(0.5)),
            ATLAS(steps, rate, per=per, start=[0.4, -0.2]),
            AdaMerging(per, "loss", steps, rate, start=0.3, largest=0.4),
        ]
    )
    case.note(algorithm=repr(algorithm))
    result = search(setup.places, algorithm, setup.mixture(), case.folder / "searched")
    ours = result.found.coefficients
    expected = _descended(setup, algorithm)
    # Adam's step has full length for any slope, so a slope near zero may turn by rounding.
    case.close(ours, expected, "coefficients", absolute=0.02 * rate)
    deltas = {}
    for row, name in zip(ours, setup.names, strict=True):
        deltas[name] = (row.view(-1, 1, 1) * setup.stacked(name)).sum(0)
    _near(case, result.found.losses, setup.losses(deltas), "found")
    for name, delta in files.read_expert(result.expert.path).items():
        case.close(delta.values, deltas[name], f"searched {name}")
    if case.chance(0.6):
        return
    again = search(setup.places, algorithm, setup.mixture(), case.folder / "again")
    case.need(again.expert.content_hash == result.expert.content_hash, "the same call gives other bytes")


def _descended(setup: Setup, algorithm: Any) -> Tensor:
    """Return the coefficients `(weights, experts)` after Adam, with gradients through the whole sum."""
    reference = setup.reference({})
    names = setup.names
    stacked = [setup.stacked(name).float() for name in setup.names]
    start = torch.zeros(1 if algorithm.per == "expert" else len(names), len(setup.places), dtype=torch.float64)
    first = algorithm.start
    if isinstance(first, float):
        start[:] = first
    else:
        start[:, : len(first or [])] = torch.tensor(first or [], dtype=torch.float64)
    coefficients = torch.nn.Parameter(start)
    optimizer = torch.optim.Adam([coefficients], lr=algorithm.learning_rate)
    for step in range(algorithm.steps):
        rows = coefficients.expand(len(names), -1).float()
        moved = {
            name: reference.weight(name).detach() + (row.view(-1, 1, 1) * x).sum(0)
            for name, row, x in zip(names, rows, stacked, strict=True)
        }

        def logits(ids: Tensor, moved: dict[str, Tensor] = moved) -> Tensor:
            return functional_call(reference.model, moved, (ids,), {"use_cache": False}).logits

        losses = [mean_loss(lambda row: negative_log_likelihood(logits, row), own) for own in setup.rows.values()]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        decays = getattr(algorithm, "decay", False)
        optimizer.param_groups[0]["lr"] = algorithm.learning_rate * (1 - step / algorithm.steps if decays else 1)
        optimizer.step()
        if isinstance(algorithm, AdaMerging):
            coefficients.data.clamp_(0, algorithm.largest)
    return coefficients.detach().expand(len(names), -1)


def distill_case(case: Case) -> None:
    """`Distilled` starts at IsoC of LoRAs or at SelfRegMean, and adds to each row a multiple of each expert's row.

    A step of Adam moves a coefficient by about its rate, and the same call gives the same bytes. Which multiples are
    best is not compared.
    """
    setup = Setup(case, 2)
    steps = case.random.randint(1, 3)
    rate = 0.05
    method = methods.Distilled(steps=steps, batch=2, learning_rate=rate, rows=4, max_new_tokens=3)
    case.note(method=repr(method))
    result = distill(setup.places, case.folder / "distilled", method, setup.mixture())
    ours = result.found.coefficients
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    case.need((ours - start).abs().max().item() <= 1.5 * rate * steps, "a coefficient moved too far")
    all_low_rank = all(delta.form == "LowRank" for place in setup.places for delta in files.read_expert(place).values())
    name = "IsoC" if all_low_rank else "SelfRegMean"
    settings = {} if all_low_rank else {"flatten": 0.5}
    written = files.read_expert(result.expert.path)
    for weight in setup.names:
        x = setup.stacked(weight)
        rows = ours[: x.shape[1]]
        ours = ours[x.shape[1] :]
        members = torch.cat([_merged(setup, name, weight, settings)[None], x])
        case.close(written[weight].values, (rows.T[:, :, None] * members).sum(0), f"distilled {weight}", 1e-4)
    case.need(len(ours) == 0, f"there are {len(ours)} more coefficients than rows")
    if case.chance(0.6):
        return
    again = distill(setup.places, case.folder / "again", method, setup.mixture())
    case.need(again.expert.content_hash == result.expert.content_hash, "the same call gives other bytes")


def shrink_case(case: Case) -> None:
    """The reference measures the same losses before and after, the bound holds, and smaller forms were above it."""
    encoding = case.random.choice(["float32", "float32", "bfloat16"])
    setup = Setup(case, 1, encoding, slices=True)
    forms = [None, None, Form("bfloat16"), Form("int8"), Form("int4"), Form("sign"), Form("magnitudes2")]
    to = case.random.choice(forms)
    bound = case.random.choice([0.0, 0.01, 0.5, 10.0])
    case.note(to=str(to), bound=bound, encoding=encoding)
    (shrunk,) = shrink(setup.places, setup.mixture(), case.folder / "small", to, bound)
    (task,) = setup.rows
    before = setup.losses(setup.read[0])[task]
    case.need(abs(shrunk.before.loss - before) <= 2e-4 * max(1, before), f"{shrunk.before.loss} before, not {before}")
    sizes = [tried.bytes for tried in shrunk.tried]
    case.need(sizes == sorted(sizes), "a larger form was tried first")
    limit = shrunk.before.loss + bound
    case.need(all(tried.loss > limit for tried in shrunk.tried[:-1]), "a form within the bound was not taken")
    if shrunk.expert is None:
        case.need(all(tried.loss > limit for tried in shrunk.tried), "no form was taken, and one is within the bound")
        return
    assert shrunk.chosen is not None
    read = files.read_expert(case.folder / "small" / "e0")
    after = setup.losses({name: delta.values for name, delta in read.items()})[task]
    case.need(abs(shrunk.chosen.loss - after) <= 3e-4 * max(1, after), f"{shrunk.chosen.loss} after, not {after}")
    case.need(shrunk.chosen.loss <= limit, f"{shrunk.chosen.loss} is above {limit}")
    old, new = (_bytes_of_tensors(place / "delta.safetensors") for place in (setup.places[0], shrunk.expert.path))
    case.need((shrunk.before.bytes, shrunk.chosen.bytes) == (old, new), f"{old} bytes became {new}, not as reported")
    case.need(new < old, f"{new} bytes, and {old} before")


def _bytes_of_tensors(file: Path) -> int:
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


FAMILIES = {
    "tune": tune_case,
    "search": search_case,
    "distill": distill_case,
    "shrink": shrink_case,
}
