"""Adapters made, saved and loaded by PEFT itself, with random numbers in everything that it would train; experts."""

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from testbed.random_deltas import random_delta
from transformers import AutoModelForCausalLM

from modular_experts.base import Base
from modular_experts.deltas import Delta
from modular_experts.library import StoredExpert, make_record, open_expert, write_expert

# What PEFT 0.21 says to itself under transformers 5, and of settings that the tests mean; nothing of ours.
PEFT_WARNINGS = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
    "ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias:UserWarning",
)


@cache
def _loaded(base: Path, place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def _fresh(base: Path) -> Any:
    """Return a copy of a base that was read once."""
    return copy.deepcopy(_loaded(base, base.resolve()))


def save_adapter(base: Path, out: Path, config: peft.PeftConfig, seed: int = 0, spread: float = 0.1, **how) -> Path:
    """Put an adapter on a base, fill it at random and let PEFT save it, without the card that nobody reads."""
    model: Any = peft.get_peft_model(_fresh(base), config)
    model.create_or_update_model_card = lambda folder: None
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += spread * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(out, **how)
    return out


def store(path: Path, base: Path, deltas: Mapping[str, Delta]) -> StoredExpert:
    """Store an expert of a base."""
    facts = {"id": str(base), "fingerprint": Base.open(base).fingerprint}
    write_expert(path, deltas.items(), make_record("test", facts))
    return open_expert(path)


def delta_of(form: str, shape: Sequence[int], seed: int) -> Delta:
    return random_delta(form, shape, seed, torch.float32, share=0.05, tile=(4, 4)) * 0.1


def make_expert(path: Path, base: Path, names: Sequence[str], form: str = "LowRank") -> StoredExpert:
    """Store a random expert; the rank of its `LowRank` deltas alternates between 1 and 2."""
    shapes = Base.open(base).structure.shapes
    return store(path, base, {name: delta_of(form, shapes[name], seed) for seed, name in enumerate(names)})


def configure(adapter: Path, **fields: object) -> None:
    """Change fields of an adapter's configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Return what PEFT computes with an adapter that is loaded onto its base."""
    return logits(peft.PeftModel.from_pretrained(_fresh(base), adapter))


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return a model's logits on tokens, fixed ones if none are given, in double precision."""
    tokens = torch.arange(60).view(2, 30) % 97 if tokens is None else tokens
    return model.eval()(input_ids=tokens).logits.double()
