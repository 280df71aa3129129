"""Add random experts to a base that is quantised while it is loaded."""

from modular_experts import Base, TaskMixture, evaluate
from soak import bases, experts
from soak.case import Case
from soak.families.losses import FORMS, dequantised
from soak.reading import Reader
from soak.reference import files
from soak.tasks import random_task


def quantised_sum_case(case: Case) -> None:
    """The losses of experts on a base in few bits are the losses of the dequantised base plus the deltas."""
    kind = case.random.choice([kind for kind in bases.KINDS if kind not in ("gpt2", "mixtral")])
    form = case.random.choice(FORMS)
    forms = case.random.choice(experts.MIXES)
    encoding = case.random.choice(["float32", "int8"])
    case.note(base=kind, form=form, forms=forms, encoding=encoding)
    places = [case.folder / f"e{number}" for number in range(2)]
    # Beside quantised weights, only linear layers can have deltas.
    biases = [
        name for name in experts.vectors(kind) if f"{name.removesuffix('bias')}weight" in experts.linear_weights(kind)
    ]
    for place in places:
        names = case.random.sample(experts.linear_weights(kind), case.random.randint(0 if biases else 1, 2))
        names += case.random.sample(biases, min(len(biases), case.random.randint(0 if names else 1, 2)))
        experts.random_expert(case, kind, place, forms, encoding, names)
    task = random_task(case, "task", choices=False)
    models = {"base": [], "first": str(places[0]), "sum": [str(place) for place in places]}
    opened = Base.open(str(bases.base_of(kind)), quantise=form)
    results = evaluate(opened, models, TaskMixture([str(task.path)]), 1)
    ours = {row["model"]: row["value"] for row in map(dict, results.rows) if row["metric"] == "loss"}
    reader = Reader(bases.base_of(kind), bases.CONTEXT)
    rows = [reader.texts(row)[0] for row in task.split("test")]
    read = [files.read_expert(place) for place in places]
    for model, summed in zip(models, [[], read[:1], read], strict=True):
        reference = dequantised(bases.base_of(kind), form, [name for deltas in summed for name in deltas])
        for deltas in summed:
            reference.add({name: delta.values for name, delta in deltas.items()})
        loss = sum(map(reference.loss, rows)) / sum(len(row.learned) for row in rows)
        case.need(abs(ours[model] - loss) <= 5e-4 * max(1, loss), f"{model}: {ours[model]}, not {loss}")


FAMILIES = {"quantised-sum": quantised_sum_case}
NEEDS = {"quantised-sum": "bitsandbytes"}
