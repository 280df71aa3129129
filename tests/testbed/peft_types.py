"""An adapter of every type that the installed PEFT trains, imported and compared with PEFT: the rows of a table.

    PYTHONPATH=tests python -m testbed.peft_types

writes the table of `docs/reference/peft-types.md` anew, from random adapters of tiny models. AdaMSS needs scikit-learn.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import save_file
from testbed.peft_adapters import logits, peft_logits, save_adapter

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.interop.import_expert import import_expert
from modular_experts.library import StoredExpert

PAGE = Path(__file__).parents[2] / "docs/reference/peft-types.md"
HEAD = ("| how it is read | form of its deltas | PEFT types, with the difference of their logits |", "|---|---|---|")

CONFIGS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TUNERS = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}

# What a type needs beside `target_modules` and a rank of 2 to fit a model of 32 dimensions. BEFT moves only biases.
SETTINGS = {
    "ADALORA": {"total_step": 10, "init_r": 2, "target_r": 2},
    "BEFT": {"target_modules": ["q_proj"]},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OSF": {"effective_rank": 2},
    "SUPERTUNING": {"r": None},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 5]},
    "VBLORA": {"vector_length": 16, "num_vectors": 20},
    "WAVEFT": {"n_frequency": 64},
}
BASES = {"BEFT": "qwen2"}

# Variants of LoRA, by the field that makes them one.
VARIANTS = {
    "use_dora": True,
    "alora_invocation_tokens": [3],
    "init_lora_weights: olora": "olora",
    "init_lora_weights: pissa": "pissa",
    "init_lora_weights: pissa_niter_4": "pissa_niter_4",
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "layer_replication": [[0, 1], [0, 1]],
    "monteclora_config": {},
    "target_parameters": ["o_proj.weight"],
    "trainable_token_indices": [3, 5],
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"], "nblocks": 2},
    "use_qalora": True,
}
CASES = sorted(CONFIGS) + [f"LORA, {variant}" for variant in VARIANTS]


@dataclass(frozen=True)
class Row:
    """One type; `difference` is the largest difference of a logit to PEFT's, or None if it is refused."""

    case: str
    way: str
    forms: str
    difference: float | None


def table(rows: list[Row]) -> list[str]:
    """Return the lines of the table, one for each way and form, and imported types first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        shown = "" if row.difference is None else f" {row.difference:.0e}"
        groups.setdefault((row.way, row.forms), []).append(row.case + shown)
    order = sorted(groups, key=lambda group: (group[0].startswith("not"), group))
    lines = (f"| {way} | {forms} | {'; '.join(groups[way, forms])} |" for way, forms in order)
    return [*HEAD, *(line.replace("|  |", "| |") for line in lines)]


def make_adapter(case: str, base: Path, out: Path, **more: object) -> Path:
    """Save an adapter of a type with random numbers in all that it trains; only its files, if it trains no layer."""
    kind, _, variant = case.partition(", ")
    fields = CONFIGS[kind].__dataclass_fields__
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 2} | SETTINGS.get(kind, {}) | more
    if variant:
        field, value = variant.partition(":")[0], VARIANTS[variant]
        configs = {"kasa_config": "KasaConfig", "monteclora_config": "MontecloraConfig", "use_bdlora": "BdLoraConfig"}
        settings[field] = getattr(peft.tuners.lora.config, configs[field])(**value) if field in configs else value
        settings |= {"qalora_group_size": 16} if field == "use_qalora" else {}
    if not hasattr(TUNERS[kind], "tuner_layer_cls"):
        out.mkdir()
        config = {"peft_type": kind, "base_model_name_or_path": str(base)}
        (out / "adapter_config.json").write_text(json.dumps(config))
        save_file({"prompt_embeddings": torch.ones(2, 32)}, out / "adapter_model.safetensors")
        return out
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        known = {key: value for key, value in settings.items() if key in fields}
        config = CONFIGS[kind](task_type="CAUSAL_LM", **known)
        return save_adapter(base, out, config)


def compare(case: str, bases: Callable[[str], Path], place: Path) -> tuple[Row, StoredExpert | None]:
    """Import an adapter of a type, and return its row and the expert; the adapter is in `place / "adapter"`."""
    kind = case.partition(",")[0]
    base = bases(BASES.get(kind, "llama"))
    adapter = make_adapter(case, base, place / "adapter")
    try:
        expert = import_expert(adapter, place / "library/expert")
    except ValueError as error:
        name, why = re.escape(str(adapter)), str(error)
        why = re.sub(rf"{name}/adapter_config.json has peft_type \w+, which ", "it ", why)
        why = re.sub(rf"{name}( \(\w+\))?( was not imported: )?", lambda match: "" if match[2] else "it", why)
        why = re.sub(r" by [\d.e-]+|, and the tolerance.*,|; .*|\.$", "", why)  # numbers differ by machine
        return Row(case, f"not imported: {why.partition(': it adds')[0]}", "", None), None
    origin = expert.record["source"]
    ways = {
        "this package": "read_with" not in origin,
        "stated by PEFT": origin.get("stated_weights"),
        "merged minus base": origin.get("measured_weights"),
    }
    model = Base.open(base).load()
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        expected = peft_logits(base, adapter)
    assert (expected - logits(model)).abs().max() > 1e-4, "the adapter does nothing, so it shows nothing"
    with applied(model, [expert]):
        apart = (expected - logits(model)).abs().max().item()
    forms = " and ".join(f"`{form}`" for form in sorted(set(expert.forms().values())))
    return Row(case, " and ".join(way for way, count in ways.items() if count), forms, apart), expert


def committed() -> dict[str, tuple[str, str]]:
    """Return how the page's table says that each type is read, and the forms of its deltas."""
    found, lines = {}, PAGE.read_text(encoding="utf-8").splitlines()
    for line in filter(None, lines[lines.index(HEAD[1]) + 1 :]):
        way, forms, cases = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {re.sub(r" \d+e[+-]\d+$", "", case): (way, forms) for case in cases.split("; ")}
    return found


def main() -> None:
    from conftest import build_model

    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama", "qwen2"):
            build_model(name).save_pretrained(Path(folder) / name)
        rows = []
        for number, case in enumerate(CASES):
            place = Path(folder) / str(number)
            place.mkdir()
            rows.append(compare(case, lambda name: Path(folder) / name, place)[0])
    before = PAGE.read_text(encoding="utf-8").partition(HEAD[0])[0]
    PAGE.write_text(before + "\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main()
