"""Fit with a loss of preferences, and on a quantised base, against a reference that does the same row by row."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modular_experts import Base, LoRAExpert, MaskedExpert, SparseExpert, fit
from modular_experts.training.preferences import DPO
from soak import bases
from soak.case import Case
from soak.experts import linear_weights
from soak.fitting import Watch, check_fit, check_rows, random_kind, random_modules, trainer_of
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Logits, Reference, Text, negative_log_likelihood
from soak.scoring import check_scores, measured
from soak.tasks import Row, TaskFile, random_row, random_task, random_word, write_task

FORMS: tuple[Literal["nf4", "fp4", "int8"], ...] = ("nf4", "fp4", "int8")


def preferences(case: Case) -> None:
    """Train on rows of a chosen and a rejected answer, or of a target and other choices, by the closed form of DPO."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    expert = random_kind(case)
    modules = random_modules(case, kind, expert)
    of_choices = case.chance(0.4)
    rows = []
    for number in range(draw.randint(6, 14)):
        row = random_row(case, "train" if number > 1 else "validation", choices=of_choices, long=case.chance(0.3))
        row["input"] = f"{number} {row['input']}"
        rows.append(row if of_choices else pair_of(row, random_word(case)))
    task = write_task(case.folder, "pairs", rows)
    batch_size, accumulation, steps = draw.choice([1, 2, 4]), draw.choice([1, 1, 2]), draw.randint(2, 4)
    longest, beta, clip = draw.choice([256, 30]), draw.choice([0.1, 0.5, 2.0]), draw.choice([None, 0.5])
    case.note(base=kind, expert=expert.name, settings=expert.settings, modules=modules, of_choices=of_choices)
    case.note(batch_size=batch_size, accumulation=accumulation, steps=steps, longest=longest, beta=beta, clip=clip)

    out = case.folder / "library" / "expert"
    watch = Watch()
    trainer = trainer_of(case.folder, out, watch, *expert.callbacks())
    trainer |= {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip}
    fit(
        str(base),
        str(task.path),
        expert.factory,
        modules,
        out=str(out),
        steps=steps,
        batch_size=batch_size,
        seed=draw.randrange(100),
        data={"max_length": longest},
        model={"loss": DPO(beta=beta)},
        trainer=trainer,
    )

    reader = Reader(base, longest)
    reference = Reference(base, bases.CONTEXT)
    pairs = {}
    for row in rows:
        if row["split"] == "train":
            written = row if of_choices else {"input": row["prompt"], "target": row["chosen"]}
            choices = row["choices"] if of_choices else [row["chosen"], row["rejected"]]
            target, others = reader.texts({**written, "choices": choices})
            pairs[target] = [
                (target, other, reference.loss(other) - reference.loss(target))
                for choice, other in zip(choices, others, strict=True)
                if choice != written["target"]
            ]
    check_rows(case, [text for batch in watch.batches for text in batch], list(pairs))
    read = watch.steps(len(pairs), batch_size, accumulation)
    case.need(len(read) == steps, f"{len(read)} steps instead of {steps}")
    deltas = read_expert(out)
    items = [[pair for text in step for pair in pairs[text]] for step in read]
    loss = functools.partial(preference_loss, beta)
    check_fit(case, reference, kind, expert, deltas, watch, items, clip=clip, loss=loss)


def preference_loss(beta: float, logits_of: Logits, pair: tuple[Text, Text, float]) -> Tensor:
    """Return the loss of direct preference optimisation (arXiv 2305.18290).

    A pair is a chosen answer, a rejected one, and by how many nats the base prefers the chosen one.
    """
    chosen, rejected, lead_at_start = pair
    lead = negative_log_likelihood(logits_of, rejected) - negative_log_likelihood(logits_of, chosen)
    return -logsigmoid(beta * (lead - lead_at_start))


def pair_of(row: Row, rejected: str) -> Row:
    return {"prompt": row["input"], "chosen": row["target"], "rejected": rejected + "!", "split": row["split"]}


def quantised(case: Case) -> None:
    """Train and measure on a base in four or eight bits, as on one whose weights are those that the bits stand for."""
    draw = case.random
    kind = draw.choice([kind for kind in bases.KINDS if kind not in ("gpt2", "mixtral")])
    base = bases.base_of(kind)
    expert = random_kind(case, [LoRAExpert, SparseExpert, SparseExpert, MaskedExpert])
    modules = random_modules(case, kind, expert)
    form = draw.choice(FORMS)
    task: TaskFile = random_task(case, "task")
    batch_size, steps = draw.choice([2, 4]), draw.randint(2, 4)
    case.note(base=kind, expert=expert.name, settings=expert.settings, modules=modules, form=form)
    case.note(batch_size=batch_size, steps=steps)
    out = case.folder / "library" / "expert"
    watch = Watch()
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": draw.randrange(100)}
    settings["trainer"] = trainer_of(case.folder, out, watch, *expert.callbacks())
    fit(str(base), str(task.path), expert.factory, modules, out=str(out), quantise=form, **settings)

    deltas = read_expert(out)
    reader = Reader(base, bases.CONTEXT)
    read = watch.steps(len(task.split("train")), batch_size, 1)
    # On a CPU, bitsandbytes rounds no inputs in training.
    check_fit(case, dequantised(base, form, linear_weights(kind)), kind, expert, deltas, watch, read)
    opened = Base.open(str(base), quantise=form)
    scores = measured(opened, {"base": [], "expert": str(out)}, [task], 4)
    check_scores(case, scores["base"], dequantised(base, form), reader, [task], 4, "base", 1e-3)
    reference = dequantised(base, form, deltas)
    reference.add({name: delta.values for name, delta in deltas.items()})
    check_scores(case, scores["expert"], reference, reader, [task], 4, "expert", 1e-3)


def dequantised(base: Path, form: str, moved: Iterable[str] = ()) -> Reference:
    """Return a base with the weights that its quantised form stands for.

    In eight bits, bitsandbytes also rounds the inputs of its layers, but for those that experts move.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    reference = Reference(base, bases.CONTEXT)
    quantised = quantised_model(base, form)
    plain = {name.rpartition(".")[0] for name in moved}
    layers = {name: layer for name, layer in quantised.named_modules() if isinstance(layer, Linear4bit | Linear8bitLt)}
    assert layers
    for name, layer in layers.items():
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            reference.weight(f"{name}.weight").data.copy_(weight)
        elif name in plain:
            weight = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
            reference.weight(f"{name}.weight").data.copy_(weight)
        else:
            reference.model.set_submodule(name, layer)
    return reference


def quantised_model(base: Path, form: str) -> nn.Module:
    """Return a base as transformers and bitsandbytes quantise it."""
    settings = BitsAndBytesConfig(load_in_8bit=True)
    if form != "int8":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32).eval()


FAMILIES = {"preferences": preferences, "quantised": quantised}
NEEDS = {"quantised": "bitsandbytes"}
