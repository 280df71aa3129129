"""Compare the logits of fixed prompts before and after a checkpoint was written to disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modular_experts.base.auto_class import auto_class
from modular_experts.base.files import quiet_transformers
from modular_experts.base.streaming import Rounding
from modular_experts.language_model import prompt_reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Check:
    """How far a reloaded checkpoint is from the model it was written from, over prompts of the shape `(rows, tokens)`.

    Differences are absolute, of a logit; `rounding` tells how much of the deltas its dtype took.
    """

    largest_difference: float
    mean_difference: float
    tolerance: float
    prompts: tuple[int, int]
    rounding: Rounding


def fixed_prompts(model: "PreTrainedModel") -> Tensor:
    """Return token ids `(2, 24)` that depend only on the size of the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(48, device=model.device).view(2, 24) * 7919 + 11) % vocabulary


@torch.no_grad()
def logits(model: nn.Module, prompts: Tensor) -> Tensor:
    """Return the float32 logits `(rows, tokens, vocabulary)` of a model, which is put into evaluation mode."""
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    if prompt_reader(model) is not model:
        inputs["decoder_input_ids"] = prompts
    return model.eval()(**inputs, use_cache=False).logits.float()


def difference(found: Tensor, reference: Tensor) -> tuple[float, float]:
    apart = (found - reference).abs()
    return apart.max().item(), apart.mean().item()


def check_reloaded(directory: Path, prompts: Tensor, reference: Tensor, tolerance: float, rounding: Rounding) -> Check:
    """Load a checkpoint with plain transformers; raise ValueError if a logit differs by more than the tolerance."""
    with quiet_transformers():
        reloaded = auto_class(directory).from_pretrained(directory, dtype="auto", trust_remote_code=False)
    largest, mean = difference(logits(reloaded, prompts), reference)
    if not largest <= tolerance:  # written so that NaN is refused too
        raise ValueError(
            f"the checkpoint was not written: loaded again, its logits differ by {largest:.3g} from the logits of "
            f"the model in memory, and the tolerance is {tolerance:.3g}"
        )
    return Check(largest, mean, tolerance, (prompts.shape[0], prompts.shape[1]), rounding)
