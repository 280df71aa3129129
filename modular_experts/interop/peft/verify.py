"""Proof: an adapter that was written is loaded onto its base again, and must compute what the deltas in memory do.

PEFT itself loads it where it is installed; else our own reader does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.base.checkpoint import quiet
from modular_experts.deltas import Delta
from modular_experts.interop.peft.read import read_peft

__all__ = ["AdapterCheck", "prove"]


@dataclass(frozen=True)
class AdapterCheck:
    """How far a reloaded adapter is from the deltas that it was written from.

    Attributes:
        largest_difference: Largest absolute difference of a logit over the fixed prompts.
        mean_difference: The mean of the same.
        tolerance: The largest that is accepted.
        prompts: Shape of the prompts, `(rows, tokens)`.
        loaded_with: What loaded it: `peft` and its version, or `modular-experts` where PEFT is not installed.
        largest_approximation: Largest absolute difference of a logit between the adapter and the expert itself; 0 if
            the adapter carries all of it.
        mean_approximation: The mean of the same.
    """

    largest_difference: float
    mean_difference: float
    tolerance: float
    prompts: tuple[int, int]
    loaded_with: str
    largest_approximation: float
    mean_approximation: float


def prove(
    model: PreTrainedModel,
    base: Path,
    directory: Path,
    peft_type: str,
    carried: Mapping[str, Delta],
    expert: Mapping[str, Delta] | None,
    tolerance: float,
) -> AdapterCheck:
    """Load an adapter and compare; the model is used up, as PEFT puts the adapter into it.

    Args:
        model: The base, in float32.
        base: Its directory.
        directory: The adapter.
        peft_type: Its kind.
        carried: The deltas that the adapter stands for.
        expert: Those of the expert, where the adapter only approximates them.
        tolerance: Largest accepted difference of a logit.

    Raises:
        ValueError: The difference is larger, or PEFT does not find in the adapter what it looks for.
    """
    prompts = _prompts(model)
    with applied(model, [carried]):
        reference = _logits(model, prompts)
    apart = (0.0, 0.0)
    if expert is not None:
        with applied(model, [expert]):
            apart = _apart(_logits(model, prompts), reference)
    logits, loader = _with_peft(model, directory, peft_type, prompts) or _with_reader(model, base, directory, prompts)
    largest, mean = _apart(logits, reference)
    if not largest <= tolerance:  # written so that a difference that is not a number is refused too
        raise ValueError(
            f"the adapter was not written: loaded again with {loader}, its logits differ by {largest:.3g} from those "
            f"of base plus deltas in memory, and the tolerance is {tolerance:.3g}"
        )
    return AdapterCheck(largest, mean, tolerance, (prompts.shape[0], prompts.shape[1]), loader, *apart)


def _with_peft(model: PreTrainedModel, directory: Path, peft_type: str, prompts: Tensor) -> tuple[Tensor, str] | None:
    """Return the logits of base and adapter by PEFT, or nothing where it is missing or too old for this kind."""
    try:
        from peft import PeftModel, PeftType
    except ImportError:
        return None
    if peft_type not in PeftType.__members__:
        return None
    # PEFT warns of much that is its own; one warning would say that the adapter is not what PEFT takes it for.
    with quiet(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits = _logits(PeftModel.from_pretrained(model, directory), prompts)
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"the adapter was not written: PEFT says of it: {warning.message}")
    return logits, f"peft {metadata.version('peft')}"


def _with_reader(model: PreTrainedModel, base: Path, directory: Path, prompts: Tensor) -> tuple[Tensor, str]:
    with applied(model, [dict(read_peft(directory, base).deltas)]):
        return _logits(model, prompts), "modular-experts"


def _apart(logits: Tensor, reference: Tensor) -> tuple[float, float]:
    difference = (logits - reference).abs()
    return difference.max().item(), difference.mean().item()


def _prompts(model: PreTrainedModel) -> Tensor:
    """Return token ids `(2, 24)` that depend on the vocabulary's size and nothing else, as `apply` does."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(48, device=model.device).view(2, 24) * 7919 + 11) % vocabulary


@torch.no_grad()
def _logits(model: Any, prompts: Tensor) -> Tensor:
    return model.eval()(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=False).logits.float()
