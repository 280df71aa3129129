"""Write experts as PEFT adapters and read them again; read adapters that PEFT made."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modular_experts import export, import_expert
from soak import bases, experts
from soak.case import Case
from soak.reference import files, merges

SPARSE_FORMS = ("shira", "supertuning")


def loaded(kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(bases.base_of(kind), dtype=torch.float32)


def merged_by_peft(adapter: Path, kind: str) -> dict[str, Tensor]:
    """Return how far each weight of the base moves when PEFT merges an adapter into it."""
    base = {name: weight.detach().double() for name, weight in loaded(kind).named_parameters()}
    tuned = peft.PeftModel.from_pretrained(loaded(kind), str(adapter)).merge_and_unload()
    return {name: weight.detach().double() - base[name] for name, weight in tuned.named_parameters()}


def export_case(case: Case) -> None:
    """PEFT moves the base by the expert's deltas, a LoRA of a given rank by the nearest of that rank, and what PEFT
    reads is imported again.
    """
    kind = case.random.choice(bases.KINDS)
    form = case.random.choice(["lora", "lora", *SPARSE_FORMS]) if kind not in ("gpt2", "mixtral") else "lora"
    rank = case.random.choice([None, 2, 40]) if form == "lora" else None
    forms = ["low"] if form == "lora" and rank is None else ["sparse", "tiles", "dense"] if rank else ["sparse"]
    encoding = case.random.choice(["float32", "float32", "bfloat16", "int8"])
    names = [name for name in experts.linear_weights(kind) if form == "lora" or not name.endswith("]")]
    names = case.random.sample(names, case.random.randint(1, 4))
    case.note(base=kind, form=form, rank=rank, encoding=encoding, names=names)
    place = case.folder / "expert"
    experts.random_expert(case, kind, place, forms, encoding, names, ties=False, few=form in SPARSE_FORMS)
    expert = files.read_expert(place)
    export(place, case.folder / "adapter", form, rank)
    expected: dict[str, Tensor] = {}
    for name, delta in expert.items():
        expected[name] = delta.values
        if rank is not None and rank < min(delta.values.shape):
            expected[name] = merges.rebuilt(delta.values, rank)
    moved = merged_by_peft(case.folder / "adapter", kind)
    for name, difference in moved.items():
        own = [weight for weight in expected if weight.partition("[")[0] == name]
        case.need(bool(own) or not difference.any(), f"PEFT moves {name}")
        for weight in own:
            number = weight.removesuffix("]").partition("[")[2]
            part = difference[int(number)] if number else difference
            case.close(part, expected[weight], f"PEFT, {weight}", 1e-4, 5e-6)
    back = files.read_expert(import_expert(case.folder / "adapter", case.folder / "back").path)
    for name in back.keys() | expected.keys():
        nothing = experts.absent(kind, name)
        ours = back.get(name, nothing).values
        case.close(ours, expected.get(name, nothing.values), f"imported {name}", 1e-4, 1e-6)


def _configuration(case: Case, kind: str) -> Any:
    modules = case.random.sample(bases.LINEAR[kind], case.random.randint(1, 2))
    common = {"task_type": "CAUSAL_LM", "target_modules": modules}
    name = case.random.choice(["lora", "lora", "lora", "loha", "lokr", "ia3", "shira", "oft", "vera"])
    rank = case.random.randint(1, 6)
    if name == "lora":
        settings = {"lora_alpha": case.random.choice([1, 8, 16]), "use_rslora": case.chance(0.3)}
        settings |= {"use_dora": case.chance(0.2), "rank_pattern": {modules[0]: 3} if case.chance(0.3) else {}}
        settings |= {"alpha_pattern": {modules[0]: 5} if case.chance(0.3) else {}}
        return peft.LoraConfig(r=rank, **settings, **common)
    if name == "loha":
        return peft.LoHaConfig(r=rank, alpha=case.random.choice([4, 8]), **common)
    if name == "lokr":
        return peft.LoKrConfig(r=rank, alpha=case.random.choice([4, 8]), **common)
    if name == "ia3":
        return peft.IA3Config(feedforward_modules=modules[:1] if case.chance(0.5) else [], **common)
    if name == "shira":
        return peft.ShiraConfig(r=1, **common)
    if name == "oft":
        return peft.OFTConfig(oft_block_size=case.random.choice([4, 8]), **common)
    return peft.VeraConfig(r=rank, **common)


def import_case(case: Case) -> None:
    """An imported adapter moves each weight as PEFT's own merge does."""
    kind = case.random.choice([kind for kind in bases.KINDS if kind not in ("gpt2", "mixtral")])
    config = _configuration(case, kind)
    case.note(
        base=kind, type=config.peft_type.value, config={key: value for key, value in vars(config).items() if value}
    )
    tuned: Any = peft.get_peft_model(loaded(kind), config)
    generator = torch.Generator().manual_seed(case.random.randrange(2**31))
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    tuned.save_pretrained(case.folder / "adapter")
    expected = merged_by_peft(case.folder / "adapter", kind)
    imported = import_expert(case.folder / "adapter", case.folder / "expert", bases.base_of(kind))
    ours = files.read_expert(imported.path)
    for name, difference in expected.items():
        moved = ours[name].values if name in ours else torch.zeros_like(difference)
        case.close(moved, difference, name, 1e-4, 3e-6)
    case.need(set(ours) <= expected.keys(), f"more weights: {sorted(set(ours) - expected.keys())}")


FAMILIES = {"export": export_case, "import": import_case}
