"""Verify a written adapter: load it onto its base again, and compare its logits with the deltas' in memory.

PEFT loads it where PEFT is installed; elsewhere this package's own reader loads a LoRA.
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


@dataclass(frozen=True)
class AdapterCheck:
    """How far a reloaded adapter is from the deltas that it was written from.

    Attributes:
        largest_difference: Largest absolute difference of a logit over the fixed prompts.
        mean_difference: Mean absolute difference of a logit.
        tolerance: Largest accepted difference.
        prompts: Shape of the prompts, `(rows, tokens)`.
        loaded_with: What loaded it: `peft` and its version, or `modular-experts` where PEFT is not installed.
        largest_approximation: Largest absolute difference of a logit between the adapter and the expert itself; 0 if
            the adapter is lossless.
        mean_approximation: Mean absolute difference of a logit between the two.
    """

    largest_difference: float
    mean_difference: float
    tolerance: float
    prompts: tuple[int, int]
    loaded_with: str
    largest_approximation: float
    mean_approximation: float


def verify_adapter(
    base: Base,
    directory: Path,
    peft_type: str,
    encoded: Mapping[str, Delta],
    expert: Mapping[str, Delta] | None,
    tolerance: float,
) -> AdapterCheck:
    """Load an adapter, and compare it with the deltas `encoded` that it stands for, on the base in float32.

    `expert` holds the expert's own deltas where the adapter only approximates them.

    Raises:
        ValueError: A logit differs by more, PEFT misses a tensor in the adapter, or nothing installed can load it.
    """
    model = base.load("float32")
    prompts = fixed_prompts(model)
    with applied(model, [encoded]):
        reference = logits(model, prompts)
    approximation = (0.0, 0.0)
    if expert is not None:
        with applied(model, expert, check=False):
            approximation = difference(logits(model, prompts), reference)
    found = _logits_with_peft(model, directory, peft_type, prompts)  # PEFT leaves the adapter in the model
    if found is not None:
        loader = f"peft {metadata.version('peft')}"
    elif peft_type != "LORA":
        raise ValueError(
            f"the adapter was not written: only PEFT itself can check a {peft_type} adapter; pip install 'peft>=0.21'"
        )
    else:
        loader = "modular-experts"
        with applied(model, [dict(read_peft(directory, base).deltas)]):
            found = logits(model, prompts)
    largest, mean = difference(found, reference)
    if not largest <= tolerance:  # written so that NaN is refused too
        raise ValueError(
            f"the adapter was not written: loaded again with {loader}, its logits differ by {largest:.3g} from those "
            f"of base plus deltas in memory, and the tolerance is {tolerance:.3g}"
        )
    return AdapterCheck(largest, mean, tolerance, (prompts.shape[0], prompts.shape[1]), loader, *approximation)


def _logits_with_peft(model: PreTrainedModel, directory: Path, peft_type: str, prompts: Tensor) -> Tensor | None:
    """Return the logits of base and adapter by PEFT, or None where PEFT is missing or too old for this kind."""
    try:
        from peft import PeftModel, PeftType
    except ImportError:
        return None
    if peft_type not in PeftType.__members__:
        return None
    # PEFT warns of many things; only one warning means that the adapter lacks what PEFT looks for.
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = logits(PeftModel.from_pretrained(model, directory), prompts)
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"the adapter was not written: PEFT warns: {warning.message}")
    return found
