"""Take statistics, tune and search merges, and shrink experts, by validation rows that the reference measures too."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call

from modular_experts import ATLAS, AdaMerging, TaskMixture, methods, search, shrink, tune
from modular_experts.library.form import Form
from modular_experts.statistics.take import take_statistics
from soak import bases, experts
from soak.case import Case
from soak.reference import files, merges
from soak.reference.model import Reader, Reference, Text, negative_log_likelihood
from soak.tasks import TaskFile, random_task

Deltas = Mapping[str, Tensor]


class Setup:
    """Experts of one base, each with a task of its own, and what the reference makes of their validation rows."""

    def __init__(self, case: Case, count: int, kinds: Sequence[str] = bases.KINDS, encoding: str = "float32") -> None:
        self.kind = case.random.choice(list(kinds))
        self.forms = case.random.choice(experts.MIXES)
        self.tasks: list[TaskFile] = [random_task(case, f"t{number}") for number in range(count)]
        self.places = [case.folder / f"e{number}" for number in range(count)]
        pool = [name for name in experts.linear_weights(self.kind) if not name.endswith("]")]
        pool = case.random.sample(pool, 3)
        for place, task in zip(self.places, self.tasks, strict=True):
            names = case.random.sample(pool, case.random.randint(1, 3))
            experts.random_expert(case, self.kind, place, self.forms, encoding, names, [task.name], ties=False)
        self.read = [{name: delta.values for name, delta in files.read_expert(place).items()} for place in self.places]
        self.data = {"max_length": case.random.choice([1024, 1024, 30]), "eval_batch_size": 16}
        reader = Reader(bases.base_of(self.kind), min(self.data["max_length"], bases.CONTEXT))
        self.rows = {task.name: [reader.texts(row)[0] for row in task.split("validation")] for task in self.tasks}
        case.note(base=self.kind, forms=self.forms, data=self.data)

    def mixture(self) -> TaskMixture:
        return TaskMixture([str(task.path) for task in self.tasks], **self.data)

    def reference(self, deltas: Deltas) -> Reference:
        return Reference(bases.base_of(self.kind), bases.CONTEXT, deltas)

    def losses(self, deltas: Deltas) -> dict[str, float]:
        """Return the loss per target token of each task's validation rows."""
        reference = self.reference(deltas)
        return {task: _mean(reference.loss, rows) for task, rows in self.rows.items()}

    def stacked(self, name: str) -> Tensor:
        """Return the deltas of one weight, one per expert."""
        shape = experts.shapes_of(self.kind)[name]
        return torch.stack([expert.get(name, torch.zeros(shape, dtype=torch.float64)) for expert in self.read])

    @property
    def names(self) -> list[str]:
        return sorted({name for expert in self.read for name in expert})


def _mean(loss: Callable[[Text], Any], rows: Sequence[Text]) -> Any:
    return sum(loss(row) for row in rows) / sum(len(row.learned) for row in rows)


def _near(case: Case, ours: Mapping[str, float], reference: Mapping[str, float], text: str) -> None:
    case.need(ours.keys() == reference.keys(), f"{text}: tasks {sorted(ours)}, not {sorted(reference)}")
    for task, loss in reference.items():
        case.need(abs(ours[task] - loss) <= 2e-4 * max(1, loss), f"{text}: {task} {ours[task]}, not {loss}")


def statistics_case(case: Case) -> None:
    """Gram matrices are means of `x x^T` over tokens, Fisher information means of squared gradients over rows; along a
    merge by RegMean++ each block's inputs come from the merged blocks before it.
    """
    setup = Setup(case, case.random.choice([1, 2]), [kind for kind in bases.KINDS if kind != "mixtral"])
    kind: Any = case.random.choice(["gram", "fisher", "merged_gram"])
    case.note(kind=kind)
    take_statistics(setup.places, kind, setup.mixture())
    inputs = 0 if setup.kind == "gpt2" else 1
    rows = [setup.rows[task.name] for task in setup.tasks]
    if kind == "merged_gram":
        expected = _merged_grams(setup, rows, inputs)
    else:
        measure = _grams if kind == "gram" else _squares
        expected = [
            measure(setup.reference(deltas), own, setup.names) for deltas, own in zip(setup.read, rows, strict=True)
        ]
    for place, own in zip(setup.places, expected, strict=True):
        ours = _stored(place / "statistics" / f"{kind}.safetensors")
        for name, values in own.items():
            case.close(ours[name], values, f"{kind} of {name} of {place.name}", 2e-3 if kind == "fisher" else 2e-4)


def _stored(file: Path) -> dict[str, Tensor]:
    """Return the statistics of each weight that has some."""
    with safe_open(file, "pt") as opened:
        table = json.loads(opened.metadata()["modular_experts"])["weights"]
        return {name: opened.get_tensor(entry["tensor"]).double() for name, entry in table.items() if entry}


def _grams(reference: Reference, rows: Sequence[Text], names: Sequence[str]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def add(_: Any, arguments: tuple[Any, ...], name: str = name) -> None:
            x = arguments[0].detach().double().reshape(-1, arguments[0].shape[-1])
            totals[name] = totals.get(name, 0) + x.T @ x

        module = reference.model.get_submodule(name.rpartition(".")[0])
        hooks.append(module.register_forward_pre_hook(add))
    for row in rows:
        reference.loss(row)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(row.ids) for row in rows)
    return {name: total / tokens for name, total in totals.items()}


def _squares(reference: Reference, rows: Sequence[Text], names: Sequence[str]) -> dict[str, Tensor]:
    weights = [reference.weight(name) for name in names]
    totals = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    for row in rows:
        loss = negative_log_likelihood(reference.logits, row)
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.double() ** 2 / len(rows)
    return dict(zip(names, totals, strict=True))


def _merged_grams(setup: Setup, rows: Sequence[Sequence[Text]], inputs: int) -> list[dict[str, Tensor]]:
    blocks: dict[str, list[str]] = {}
    for name in setup.names:
        block = re.match(r".*?\.\d+\.", name)
        assert block is not None
        blocks.setdefault(block[0], []).append(name)
    found: list[dict[str, Tensor]] = [{} for _ in setup.places]
    behind: dict[str, Tensor] = {}
    for _, names in sorted(blocks.items()):
        for own, expert, texts in zip(found, setup.read, rows, strict=True):
            inside = {name: expert[name] for name in names if name in expert}
            own |= _grams(setup.reference(behind | inside), texts, names)
        for name in names:
            grams = torch.stack([own[name] for own in found])
            x = setup.stacked(name)
            about = merges.About(name, 0, x.flatten(1), [False] * len(x), x != 0, grams, (), inputs)
            behind[name] = merges.merged("RegMeanPlusPlus", x, about)
    return found


def tune_case(case: Case) -> None:
    """Every combination of the grid is tried, each trial has the loss that the reference measures, the best is chosen,
    its merge is written, and the same call gives the same bytes.
    """
    setup = Setup(case, case.random.choice([2, 3]))
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
    about = merges.About(weight, 0, x.flatten(1), [False] * len(x), x != 0)
    return merges.merged(method, x, about, **settings)


def search_case(case: Case) -> None:
    """A few steps of Adam on the coefficients, down the mean loss of the tasks, end where autograd does; the written
    expert is the experts' sum with these, and the same call gives the same bytes.
    """
    setup = Setup(case, case.random.choice([2, 3]))
    per, steps, rate = case.random.choice(["expert", "weight"]), case.random.randint(1, 4), 0.05
    algorithm: Any = case.random.choice(
        [
            ATLAS(steps, rate, per=per, decay=case.chance(0.5)),
            ATLAS(steps, rate, per=per, start=[0.4, -0.2]),
            AdaMerging(per, "loss", steps, rate, start=0.3, largest=0.4),
        ]
    )
    case.note(algorithm=repr(algorithm))
    result = search(setup.places, algorithm, setup.mixture(), case.folder / "searched")
    ours, expected = result.found.coefficients, _descended(setup, algorithm)
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
    names, stacked = setup.names, [setup.stacked(name).float() for name in setup.names]
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

        losses = [_mean(lambda row: negative_log_likelihood(logits, row), own) for own in setup.rows.values()]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        decays = getattr(algorithm, "decay", False)
        optimizer.param_groups[0]["lr"] = algorithm.learning_rate * (1 - step / algorithm.steps if decays else 1)
        optimizer.step()
        if isinstance(algorithm, AdaMerging):
            coefficients.data.clamp_(0, algorithm.largest)
    return coefficients.detach().expand(len(names), -1)


def shrink_case(case: Case) -> None:
    """The reference measures the same losses before and after, the bound holds, and smaller forms were above it."""
    encoding = case.random.choice(["float32", "float32", "bfloat16"])
    setup = Setup(case, 1, encoding=encoding)
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


FAMILIES = {"statistics": statistics_case, "tune": tune_case, "search": search_case, "shrink": shrink_case}
