"""Put one model together in several ways, and route: every way has the same scores, and a batch is like its rows."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from modular_experts import Oracle, TaskArithmetic, TaskMixture, apply, fit, generate, merge, open_expert, route
from modular_experts.routing import Arrow, Centroid, Classifier, Constant, Energy, KernelRidge
from modular_experts.routing.gates import Softmax, Threshold, TopK, UpTo
from modular_experts.systems.molora import MoLoRAExpert
from soak import bases
from soak.case import Case
from soak.experts import absent, linear_weights, random_expert
from soak.fitting import Watch, check_rows, trainer_of
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import Scores, check_scores, measured, near, same_scores
from soak.tasks import TaskFile, random_task

FORMS = (["low"], ["dense"], ["sparse", "tiles"], ["dense", "low", "sparse", "tiles"])


def some_experts(case: Case, kind: str, count: int, encodings: Sequence[str]) -> list[Path]:
    """Write experts `e0`, `e1` ... of the tasks `t0`, `t1` ..., which move linear layers."""
    forms, encoding = case.random.choice(FORMS), case.random.choice(list(encodings))
    # A router of tokens stands at a layer, which a matrix of a mixture of experts has not of its own.
    weights = [name for name in linear_weights(kind) if not name.endswith("]")]
    case.note(base=kind, experts=count, forms=forms, encoding=encoding)
    places = [case.folder / "library" / f"e{number}" for number in range(count)]
    for number, place in enumerate(places):
        names = case.random.sample(weights, case.random.randint(1, min(5, len(weights))))
        random_expert(case, kind, place, forms, encoding, names, [f"t{number}"])
    return places


def laws(case: Case) -> None:
    """Add experts in Python, by a merge, by constant gates, on disk, and in the reference."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    places = some_experts(case, kind, draw.choice([2, 3]), ("float32", "float32", "bfloat16", "int8", "sign"))
    tasks = [random_task(case, f"t{number}") for number in range(len(places))]
    weights = [round(draw.uniform(-1, 1.5), 2) for _ in places]
    alone = draw.choice(["Average", "SparseAverage", "TaskArithmetic", "EMR", "MagMax", "RAM"])
    data = {"eval_batch_size": draw.choice([1, 4, 16]), "max_length": draw.choice([1024, 30])}
    case.note(weights=weights, alone=alone, **data)
    library = case.folder / "library"
    paths = [str(place) for place in places]
    total = open_expert(paths[0]) * weights[0]
    for path, weight in zip(paths[1:], weights[1:], strict=True):
        total = total + weight * open_expert(path)
    merge(paths, TaskArithmetic(weights=weights), library / "sum")
    merge(paths, TaskArithmetic(scale=0.0), library / "nothing")
    merge(paths[:1], alone, library / "alone")
    merge([total], "TaskArithmetic", library / "of-sum")
    route(paths, library / "constant", Constant(weights))
    route(paths, library / "oracle", Oracle())
    apply(str(library / "sum"), case.folder / "checkpoint")
    apply(paths[0], case.folder / "first")
    models: dict[str, Any] = {name: str(library / name) for name in ("sum", "of-sum", "constant", "oracle")}
    models |= {"base": [], "in Python": total, "nothing": str(library / "nothing"), "alone": str(library / "alone")}
    models |= {"checkpoint": str(case.folder / "checkpoint"), "first": str(case.folder / "first")}
    models |= {f"e{number}": path for number, path in enumerate(paths)}
    scores = measured(base, models, tasks, 5, **data)
    for name in ("in Python", "of-sum", "checkpoint"):
        same_scores(case, scores["sum"], scores[name], f"the sum and {name}", 3e-5)
    same_scores(case, scores["sum"], scores["constant"], "the sum and constant gates", 2e-4)
    same_scores(case, scores["base"], scores["nothing"], "the base and a merge of scale 0")
    same_scores(case, scores["e0"], scores["alone"], f"an expert and its {alone}")
    same_scores(case, scores["e0"], scores["first"], "an expert and its checkpoint")
    for number in range(len(paths)):
        own = Scores({f"t{number}": scores[f"e{number}"].metrics[f"t{number}"]}, {})
        same_scores(case, own, scores["oracle"], f"expert {number} and Oracle", 2e-4)
    reference = Reference(base, bases.CONTEXT)
    for path, weight in zip(places, weights, strict=True):
        reference.add({name: weight * delta.values for name, delta in read_expert(path).items()})
    reader = Reader(base, min(data["max_length"], bases.CONTEXT))
    check_scores(case, scores["sum"], reference, reader, tasks, 5, "the sum", 2e-4)


Step = Callable[[Tensor], Tensor]
"""Makes scores `(tokens, experts)` of inputs `(tokens, in)`, or weights of scores."""
Layer = tuple[Sequence[Tensor], Step, Step]
"""Deltas `(out, in)`, and the two steps that weigh them."""


def arrow(deltas: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Score inputs by their products with each delta's first right singular vector; deltas are `(out, in)`."""
    parts = [torch.linalg.svd(delta) for delta in deltas]
    return (inputs @ torch.stack([values[0].sign() * rows[0] for _, values, rows in parts]).T).abs()


def energy(deltas: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Score inputs by the lengths of their products with each delta, divided by the size of the delta."""
    lengths = [(inputs @ delta.T).norm(dim=1) / delta.norm().clamp(min=1e-30) for delta in deltas]
    return torch.stack(lengths, 1)


def best(count: int, temperature: float, scores: Tensor) -> Tensor:
    """Weigh the `count` highest scores by their softmax."""
    kept = scores.topk(min(count, scores.shape[1]), dim=1)
    return torch.zeros_like(scores).scatter(1, kept.indices, (kept.values / temperature).softmax(1))


def above(least: float, scores: Tensor) -> Tensor:
    """Weigh the scores whose softmax is at least a part of the largest."""
    shares = scores.softmax(1)
    return normalize(shares * (shares >= least * shares.amax(1, keepdim=True)), p=1)


def add_routed(layer: Layer, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add weighted experts to the output of a linear layer, as a hook."""
    deltas, scores, gates = layer
    inputs = arguments[0].flatten(0, -2).double()
    weights = gates(scores(inputs))
    added = sum(weights[:, [number]] * (inputs @ delta.T) for number, delta in enumerate(deltas))
    return output + added.to(output.dtype).view(output.shape)


@contextmanager
def routed(reference: Reference, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Let layers choose among deltas while the context is open; names are of their weights."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            module = reference.model.get_submodule(name.removesuffix(".weight"))
            stack.enter_context(module.register_forward_hook(partial(add_routed, layer)))
        yield


SELECTIONS: list[tuple[Any, Step | None]] = [
    (None, None),
    (TopK(2), partial(best, 2, 1.0)),
    (TopK(1), partial(best, 1, 1.0)),
    (UpTo(5, temperature=0.5), partial(best, 5, 0.5)),
    (Softmax(0.5), partial(best, 4, 0.5)),
    (Threshold(0.7), partial(above, 0.7)),
]


def by_token(case: Case) -> None:
    """Route each token at each layer by Arrow or Energy, and compare with hooks that do so."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    places = some_experts(case, kind, draw.choice([2, 3, 4]), ("float32", "float32", "int8", "int4"))
    tasks = [random_task(case, f"t{number}") for number in range(2)]
    router, usual = draw.choice([(Arrow, 3), (Energy, 2)])
    selection, gates = draw.choice(SELECTIONS)
    size = draw.choice([1, 5, 16])
    case.note(router=router.__name__, select=str(selection), eval_batch_size=size)
    out = case.folder / "library" / "routed"
    route([str(place) for place in places], out, router(select=selection))

    experts = [read_expert(place) for place in places]
    layers: dict[str, Layer] = {}
    # The smallest distances between two scores of one token, where rounding may turn the choice.
    closest = [math.inf]

    def watched(scores_of: Step, inputs: Tensor) -> Tensor:
        scores = scores_of(inputs)
        closest.append(scores.sort(dim=1).values.diff(dim=1).min().item())
        return scores

    for name in sorted({name for expert in experts for name in expert}):
        deltas = [expert.get(name, absent(kind, name)).values for expert in experts]
        deltas = [delta.T if kind == "gpt2" else delta for delta in deltas]
        scores_of = partial(arrow if router is Arrow else energy, deltas)
        layers[name] = (deltas, partial(watched, scores_of), gates or partial(best, usual, 1.0))
    scores = measured(base, {"routed": str(out)}, tasks, 4, eval_batch_size=size)
    reference = Reference(base, bases.CONTEXT)
    with routed(reference, layers):
        try:
            check_scores(case, scores["routed"], reference, Reader(base, bases.CONTEXT), tasks, 4, "routed", 2e-4)
        except AssertionError:
            case.note(closest=min(closest))
            # Experts without a delta of a weight all score 0, and add nothing.
            if min(closest) > 1e-5 or min(closest) == 0:
                raise


def by_prompt(case: Case) -> None:
    """Route whole prompts: no batch size changes a row, and each row is answered by one of the experts."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    places = some_experts(case, kind, draw.choice([2, 3]), ("float32", "int8", "int4"))
    library = case.folder / "library"
    paths = [str(place) for place in places]
    # The last task is nobody's.
    tasks = [random_task(case, f"t{number}") for number in range(len(places) + 1)]
    router = draw.choice([Centroid, Classifier, KernelRidge, Oracle])
    selection = None if router is Oracle else draw.choice([None, None, TopK(2), Softmax(0.5), Threshold(0.7)])
    rejects = {} if router is Oracle else draw.choice([{}, {"reject": 0.3}, {"reject": None}])
    fallback = None
    if case.chance(0.5) and rejects.get("reject", 0.01) is not None:
        fallback = str(merge(paths, "SparseAverage", library / "fallback").path)
    case.note(router=router.__name__, select=str(selection), fallback=bool(fallback), **rejects)
    settings = rejects if router is Oracle else {**rejects, "select": selection}
    mixture = TaskMixture([str(task.path) for task in tasks[: len(places)]])
    route(paths, library / "routed", router(**settings), fallback, mixture, rows=draw.choice([8, 256]))
    routed = {"routed": str(library / "routed")}
    first, *others = [measured(base, routed, tasks, 4, eval_batch_size=size)["routed"] for size in (1, 5, 16)]
    for other in others:
        same_scores(case, first, other, "batch sizes", 3e-4)
        case.need(first.answers == other.answers, f"answers differ by batch size: {first.answers}, {other.answers}")
    if router is not Oracle:
        row = tasks[0].split("test")[0]
        generate(str(base), row["input"], routed["routed"], 4)
    if selection is not None:
        return
    reader = Reader(base, bases.CONTEXT)
    members = [Reference(base, bases.CONTEXT, values_of(path)) for path in paths]
    members.append(Reference(base, bases.CONTEXT, values_of(fallback) if fallback else {}))
    for number, task in enumerate(tasks):
        check_choice(case, first, members, reader, task, number if router is Oracle else None)


def check_choice(
    case: Case, scores: Scores, members: Sequence[Reference], reader: Reader, task: TaskFile, number: int | None
) -> None:
    """Check that a task's loss is that which some choice of a member for each row gives, or member `number`."""
    texts = [reader.texts(row)[0] for row in task.split("test")]
    tokens = sum(len(text.learned) for text in texts)
    allowed = range(len(members)) if number is None else [number]
    losses = [[members[member].loss(text) for member in allowed] for text in texts]
    ours = scores.metrics[task.name]["loss"]
    assert ours is not None
    sums = [sum(choice) / tokens for choice in itertools.product(*losses)]
    nearest = min(sums, key=lambda loss: abs(loss - ours))
    near(case, ours, nearest, f"{task.name}: the loss of rows that one member each answers", 2e-4)


def mixtures(case: Case) -> None:
    """Train a mixture of LoRAs, and compare its scores with hooks that choose among them by its router."""
    draw = case.random
    kind = draw.choice([kind for kind in bases.KINDS if kind != "gpt2"])
    base = bases.base_of(kind)
    tasks = [random_task(case, f"t{number}") for number in range(draw.choice([1, 2]))]
    experts, rank = draw.choice([2, 3, 4]), draw.randint(1, 3)
    k = draw.randint(1, experts)
    modules = draw.sample(bases.LINEAR[kind], 2)
    batch_size, steps, packing = draw.choice([2, 4]), draw.randint(2, 5), draw.choice([None, True, False])
    size = draw.choice([1, 5, 16])
    case.note(base=kind, experts=experts, rank=rank, k=k, modules=modules, batch_size=batch_size, steps=steps)
    case.note(packing=packing, eval_batch_size=size)
    out = case.folder / "library" / "mixture"
    watch = Watch()
    fit(
        str(base),
        [str(task.path) for task in tasks],
        lambda weight: MoLoRAExpert(weight, experts, rank, k, alpha=8.0),
        modules,
        out=str(out),
        steps=steps,
        batch_size=batch_size,
        learning_rate=0.02,
        seed=draw.randrange(100),
        data={"packing": packing},
        trainer=trainer_of(case.folder, out, watch),
    )
    reader = Reader(base, bases.CONTEXT)
    known = [reader.texts(row, choices=False)[0] for task in tasks for row in task.split("train")]
    check_rows(case, [text for batch in watch.batches for text in batch], known)
    state = load_file(out / "state.safetensors")
    layers = {}
    for name in {key.rpartition("/")[0] for key in state}:
        up, down, router = (state[f"{name}/{part}"] for part in ("up", "down", "router"))
        scale = 8.0 / rank
        parts = [slice(number * rank, (number + 1) * rank) for number in range(experts)]
        deltas = [scale * up[:, part].double() @ down[part].double() for part in parts]
        case.need(bool(up.any()), f"{name} was not trained")
        layers[name] = (deltas, partial(linear_scores, router.double()), partial(best, k, 1.0))
    scores = measured(base, {"mixture": str(out)}, tasks, 4, eval_batch_size=size)
    reference = Reference(base, bases.CONTEXT)
    with routed(reference, layers):
        check_scores(case, scores["mixture"], reference, reader, tasks, 4, "mixture", 2e-4)


def linear_scores(router: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ router.T


def values_of(place: str) -> dict[str, Tensor]:
    return {name: delta.values for name, delta in read_expert(Path(place)).items()}


FAMILIES = {"laws": laws, "by-token": by_token, "by-prompt": by_prompt, "mixtures": mixtures}
