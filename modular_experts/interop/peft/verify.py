"""Proof: an adapter that was written is loaded onto its base again, and must compute what the deltas in memory do.

PEFT itself loads it where it is installed; else our own reader does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.loading import quiet
from modular_experts.base.verify import difference, fixed_prompts, logits
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
    base: Base,
    directory: Path,
    peft_type: str,
    carried: Mapping[str, Delta],
    expert: Mapping[str, Delta] | None,
    tolerance: float,
) -> AdapterCheck:
    """Load an adapter onto its base in float32, and compare.

    Args:
        base: The base.
        directory: The adapter.
        peft_type: Its kind.
        carried: The deltas that the adapter stands for.
        expert: Those of the expert, where the adapter only approximates them.
        tolerance: Largest accepted difference of a logit.

    Raises:
        ValueError: The difference is larger, or PEFT does not find in the adapter what it looks for.
    """
    model = base.load("float32")
    prompts = fixed_prompts(model)
    with applied(model, [carried]):
        reference = logits(model, prompts)
    apart = (0.0, 0.0)
    if expert is not None:
        with applied(model, [expert]):
            apart = difference(logits(model, prompts), reference)
    found, loader = _with_peft(model, directory, peft_type, prompts) or _with_reader(model, base, directory, prompts)
    largest, mean = difference(found, reference)
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
        found = logits(PeftModel.from_pretrained(model, directory), prompts)
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"the adapter was not written: PEFT says of it: {warning.message}")
    return found, f"peft {metadata.version('peft')}"


def _with_reader(model: PreTrainedModel, base: Base, directory: Path, prompts: Tensor) -> tuple[Tensor, str]:
    with applied(model, [dict(read_peft(directory, base).deltas)]):
        return logits(model, prompts), "modular-experts"
