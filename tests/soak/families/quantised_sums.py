"""Add random experts to a base that is quantised while it is loaded."""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modular_experts import Base, TaskMixture, evaluate
from soak import bases, experts
from soak.case import Case
from soak.reference import files
from soak.reference.model import Reader, Reference
from soak.tasks import random_task


@cache
def _stands_for(kind: str, form: str) -> dict[str, Tensor]:
    """Return the numbers that the quantised weights of a base stand for."""
    from bitsandbytes.functional import dequantize_4bit

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=True)
    settings.bnb_4bit_compute_dtype = torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(bases.base_of(kind), quantization_config=settings)
    return {
        name: dequantize_4bit(weight.data, weight.quant_state).float()
        for name, weight in model.named_parameters()
        if hasattr(weight, "quant_state")
    }


def quantised_sum_case(case: Case) -> None:
    """The losses of experts on a base in four bits are the losses of the dequantised base plus the deltas."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    kind = case.random.choice([kind for kind in bases.KINDS if kind not in ("gpt2", "mixtral")])
    form: Any = case.random.choice(["nf4", "fp4"])
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
    reference = Reference(bases.base_of(kind), bases.CONTEXT)
    for name, weight in _stands_for(kind, form).items():
        reference.weight(name).data.copy_(weight)
    for model, place in zip(models, [None, *places], strict=True):
        if place is not None:
            reference.add({name: delta.values for name, delta in files.read_expert(place).items()})
        loss = sum(map(reference.loss, rows)) / sum(len(row.learned) for row in rows)
        case.need(abs(ours[model] - loss) <= 5e-4 * max(1, loss), f"{model}: {ours[model]}, not {loss}")


FAMILIES = {"quantised-sum": quantised_sum_case}
