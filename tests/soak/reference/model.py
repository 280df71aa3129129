"""Score and answer with a base, tokens after tokens, and train it row by row, in plain PyTorch and transformers."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

Logits = Callable[[Tensor], Tensor]
Part = tuple[list[Tensor], Callable[..., Tensor]]
"""What training moves in a weight: tensors at the start, and the change of the weight that these make."""


class Text(NamedTuple):
    """Tokens that a model reads, and the places of the learned ones, each of which the token before it predicts."""

    ids: tuple[int, ...]
    learned: tuple[int, ...]


def negative_log_likelihood(logits_of: Logits, text: Text) -> Tensor:
    """Return the sum over learned tokens in nats; `logits_of` gives `(1, length, vocabulary)` for `(1, length)`."""
    ids, places = torch.tensor(text.ids), torch.tensor(text.learned)
    return cross_entropy(logits_of(ids[None])[0, places - 1].float(), ids[places], reduction="sum")


class Reference:
    """A base that can read `context` tokens, with deltas added; `name[2]` is the third matrix of a weight of three."""

    def __init__(self, base: Path, context: int, deltas: Mapping[str, Tensor] | None = None) -> None:
        self.context = context
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.add(deltas or {})

    @torch.no_grad()
    def add(self, deltas: Mapping[str, Tensor]) -> None:
        for name, delta in deltas.items():
            self.weight(name).copy_(self.weight(name).double() + delta)

    def weight(self, name: str, part: str = "data") -> Tensor:
        """Return a weight, or its gradient, which is the part `grad`."""
        owner, *number = name.removesuffix("]").split("[")
        weight = getattr(self.model.get_parameter(owner), part)
        return weight[int(number[0])] if number else weight

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def loss(self, text: Text) -> float:
        return negative_log_likelihood(self.logits, text).item()

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], most: int) -> tuple[str, float]:
        """Return the likeliest tokens one after another, and by how much the likeliest led at the closest step."""
        read = list(prompt)[max(0, len(prompt) + 1 - self.context) :]
        written: list[int] = []
        lead = math.inf
        while len(written) < min(most, self.context - len(read)):
            best = self.logits(torch.tensor([read + written]))[0, -1].topk(2)
            lead = min(lead, (best.values[0] - best.values[1]).item())
            if best.indices[0] == self.tokenizer.eos_token_id:
                break
            written.append(int(best.indices[0]))
        return self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False), lead


def train(
    reference: Reference,
    parts: Mapping[str, Part],
    steps: Sequence[Sequence[Any]],
    rate: float,
    clip: float | None = None,
    loss: Callable[[Logits, Any], Tensor] = negative_log_likelihood,
) -> dict[str, Tensor]:
    """Train weights by AdamW, whose rate rises in 6 % of the steps and falls in the others, and return their changes.

    The loss of a step is the mean over all learned tokens of its texts, or over items that are no texts.
    """
    trained = {name: [leaf.detach().clone().requires_grad_() for leaf in leaves] for name, (leaves, _) in parts.items()}
    before = {name: reference.weight(name).detach().clone() for name in parts}
    optimizer = torch.optim.AdamW([leaf for own in trained.values() for leaf in own], lr=rate, weight_decay=0.0)
    rise = math.ceil(0.06 * len(steps))

    def changes() -> dict[str, Tensor]:
        return {name: change(*trained[name]) for name, (_, change) in parts.items()}

    for step, items in enumerate(steps):
        for name, change in (moved := changes()).items():
            reference.weight(name).data.copy_(before[name] + change)
        reference.model.zero_grad()
        optimizer.zero_grad()
        count = sum(len(item.learned) if isinstance(item, Text) else 1 for item in items)
        for item in items:
            (loss(reference.logits, item) / count).backward()
        # Torch makes no step for a matrix of a mixture that no token of the step reaches.
        reached = [name for name in moved if not name.endswith("]") or reference.weight(name, "grad").any()]
        torch.autograd.backward([moved[name] for name in reached], [reference.weight(name, "grad") for name in reached])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        fall = 1 - (step - rise) / max(len(steps) - rise, 1)
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / (rise + 1), fall)
        optimizer.step()
    return {name: change.detach() for name, change in changes().items()}
