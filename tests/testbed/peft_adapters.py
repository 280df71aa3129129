"""Adapters made, saved and loaded by PEFT itself, with random numbers in everything that it would train."""

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

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


def save_adapter(base: Path, out: Path, config: peft.PeftConfig, seed: int = 0, spread: float = 0.1, **how) -> Path:
    """Put an adapter on a base, fill it at random and let PEFT save it."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += spread * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(out, **how)
    return out


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Return what PEFT computes with an adapter that is loaded onto its base."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return a model's logits on tokens, fixed ones if none are given, in double precision."""
    tokens = torch.arange(60).view(2, 30) % 97 if tokens is None else tokens
    return model.eval()(input_ids=tokens).logits.double()
