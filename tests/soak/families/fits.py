"""Fit experts, and compare what they store and how they score with a reference that trains row by row."""

from typing import Any

from modular_experts import FullExpert, LoRAExpert, MaskSchedule, SparseExpert, apply, fit
from modular_experts.masks import SelectOnce
from soak import bases
from soak.case import Case
from soak.experts import random_expert
from soak.fitting import Kind, Watch, check_fit, check_rows, random_kind, random_modules, trainer_of
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import check_scores, measured, same_scores
from soak.tasks import random_task


def fit_and_evaluate(case: Case) -> None:
    """Train one expert on one to three tasks, replay its steps, and score it with a batch size of its own."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    expert = random_kind(case)
    modules = random_modules(case, kind, expert)
    tasks = [random_task(case, f"t{number}", long=case.chance(0.5)) for number in range(draw.choice([1, 1, 2, 3]))]
    longest = draw.choice([256, 256, 1024, 24, 40])
    chat = kind == "chat" and case.chance(0.6)
    reading = {"max_length": longest, "chat_template": chat}
    packing = draw.choice([None, True, False])
    batch_size, accumulation, steps = draw.choice([1, 2, 4, 8]), draw.choice([1, 1, 2, 3]), draw.randint(2, 6)
    clip = draw.choice([None, None, 0.5])
    rate = draw.choice([1e-3, 3e-3, None])
    model: dict[str, Any] = {"gradient_checkpointing": True} if case.chance(0.15) else {}
    out = case.folder / "library" / "expert"
    beneath = [str(out.parent / "beneath")] if case.chance(0.25) else []
    case.note(base=kind, expert=expert.name, settings=expert.settings, modules=modules, packing=packing, **reading)
    case.note(batch_size=batch_size, accumulation=accumulation, steps=steps, clip=clip, rate=rate)
    case.note(beneath=bool(beneath), model=dict(model))
    under = {}
    if beneath:
        random_expert(case, kind, out.parent / "beneath")
        model["applied"] = beneath
        under = {name: delta.values for name, delta in read_expert(out.parent / "beneath").items()}

    watch = Watch()
    trainer = trainer_of(case.folder, out, watch, *expert.callbacks())
    trainer |= {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip}
    fit(
        str(base),
        [str(task.path) for task in tasks],
        expert.factory,
        modules,
        out=str(out),
        steps=steps,
        batch_size=batch_size,
        seed=draw.randrange(100),
        data={**reading, "packing": packing},
        model=model,
        trainer=trainer,
        **({} if rate is None else {"learning_rate": rate}),
    )

    reader = Reader(base, min(longest, bases.CONTEXT), chat)
    known = [reader.texts(row, choices=False)[0] for task in tasks for row in task.split("train")]
    check_rows(case, [text for batch in watch.batches for text in batch], known)
    read = watch.steps(len(known), batch_size, accumulation)
    case.need(len(read) == steps, f"{len(read)} steps instead of {steps}")
    deltas = read_expert(out)
    check_fit(case, Reference(base, bases.CONTEXT, under), kind, expert, deltas, watch, read, rate, clip)

    models: dict[str, Any] = {"base": [], "expert": [*beneath, str(out)]}
    scores = measured(base, models, tasks, 6, **reading, eval_batch_size=draw.choice([1, 3, 16]))
    reference = Reference(base, bases.CONTEXT)
    check_scores(case, scores["base"], reference, reader, tasks, 6, "base")
    reference.add(under)
    reference.add({name: delta.values for name, delta in deltas.items()})
    check_scores(case, scores["expert"], reference, reader, tasks, 6, "expert")


OTHER = {
    "gpt2": ["wte", "wpe", "ln_1", "c_fc.bias"],
    "neox": ["embed_in", "lm_head", "input_layernorm", "dense_h_to_4h.bias"],
    "qwen2": ["embed_tokens", "lm_head", "norm", "q_proj.bias"],
    "tied": ["embed_tokens", "norm", "input_layernorm"],
    "untied": ["embed_tokens", "lm_head", "norm", "input_layernorm"],
}
"""Names of modules and parameters that are no linear layers of a block, in bases of a kind, or of any other kind."""


def random_plan(case: Case, kind: str) -> dict[str, Kind]:
    """Draw experts of several types: in linear layers, and in embeddings, heads, norms or biases."""
    draw = case.random
    tiles = {"granularity": "block", "block_size": 5}
    types = [Kind(LoRAExpert, {"rank": 2}), Kind(FullExpert)]
    types += [Kind(SparseExpert, {"keep_ratio": 0.2, **units}) for units in ({}, {"granularity": "row"}, tiles)]
    # A tied table is not trained whole, because two layers would own it.
    of_tables = [each for each in types if kind not in bases.TIED or each.type is not FullExpert]
    plan = {name: draw.choice(types) for name in draw.sample(bases.LINEAR[kind], 2)}
    others = OTHER.get(kind) or OTHER["tied" if kind in bases.TIED else "untied"]
    for name in draw.sample(others, draw.choice([1, 2])):
        is_vector = "norm" in name or "ln_" in name or name.endswith("bias")
        plan[name] = Kind(FullExpert) if is_vector else draw.choice(of_tables)
    return plan


def plans(case: Case) -> None:
    """Train experts of several types together, in all sorts of weights, and measure them attached and applied."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    plan = random_plan(case, kind)
    tasks = [random_task(case, f"t{number}") for number in range(2)]
    packing = draw.choice([None, True, False])
    steps, batch_size, rate = draw.randint(2, 5), draw.choice([3, 4]), 3e-3
    case.note(base=kind, plan={name: [each.name, each.settings] for name, each in plan.items()}, packing=packing)
    case.note(steps=steps, batch_size=batch_size)
    out = case.folder / "library" / "expert"
    watch = Watch()
    fit(
        str(base),
        [str(task.path) for task in tasks],
        {name: each.factory for name, each in plan.items()},
        out=str(out),
        steps=steps,
        batch_size=batch_size,
        seed=draw.randrange(100),
        learning_rate=rate,
        data={"packing": packing},
        trainer=trainer_of(case.folder, out, watch, MaskSchedule(rule=SelectOnce())),
    )

    deltas = read_expert(out)

    def planned(weight: str) -> Kind:
        stem = weight.removesuffix(".weight")
        return plan[next(name for name in plan if f".{stem}".endswith(f".{name}"))]

    reader = Reader(base, bases.CONTEXT)
    known = [reader.texts(row, choices=False)[0] for task in tasks for row in task.split("train")]
    read = watch.steps(len(known), batch_size, 1)
    check_fit(case, Reference(base, bases.CONTEXT), kind, planned, deltas, watch, read, rate)

    checkpoint = case.folder / "checkpoint"
    apply(str(out), checkpoint)
    models = {"attached": str(out), "applied": str(checkpoint)}
    scores = measured(base, models, tasks, 5, eval_batch_size=draw.choice([1, 8]))
    reference = Reference(base, bases.CONTEXT, {name: delta.values for name, delta in deltas.items()})
    check_scores(case, scores["attached"], reference, reader, tasks, 5, "attached")
    same_scores(case, scores["attached"], scores["applied"], "attached and applied")


FAMILIES = {"fit": fit_and_evaluate, "plans": plans}
