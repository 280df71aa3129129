"""Read the text of prompts with an encoder of sentences, which stands beside the base."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.base.base import Base
from modular_experts.base.classifier import POOLED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 512
"""The most tokens of a text that an encoder reads; most of these models were trained on no longer ones."""
LINES = 64
"""The most prompts of a pass."""


class SentenceEncoder:
    """An encoder of sentences, such as all-MiniLM-L6-v2, for a router that has one in `encoder`.

    Args:
        place: Its directory, or a hub id such as `sentence-transformers/all-MiniLM-L6-v2`.

    Raises:
        FileNotFoundError: There is no such directory, and the hub does not give it.
        ValueError: It is another kind of model, or lies in an unsafe format.
    """

    def __init__(self, place: str | Path) -> None:
        try:
            base = Base.open(place)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"a router's encoder of sentences is missing: {error}") from error
        if getattr(base.structure.model, "head_place", None) != POOLED:
            raise ValueError(
                f"encoder={str(place)!r} is a {base.structure.architecture}, and not an encoder of sentences; give one "
                "such as sentence-transformers/all-MiniLM-L6-v2"
            )
        self.place = str(place)
        self.fingerprint = base.fingerprint
        self._model = base.load("float32")
        self._tokenizer = base.tokenizer()
        self._others: dict[str, PreTrainedTokenizerBase] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean of the last hidden states over each prompt's text, of length 1, `(rows, size)` float32.

        The prompts are tokens of another model, whose tokenizer makes texts of them; the text has no special tokens.
        """
        tokenizer = self._tokenizer_of(model)
        texts = [str(tokenizer.decode(list(prompt), skip_special_tokens=True)).strip() for prompt in prompts]
        device = next(model.parameters()).device
        encoder = self._model.to(device)  # type: ignore[arg-type]
        # Texts of about one length need little padding.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        parts = []
        for start in range(0, len(order), LINES):
            lines = [texts[row] for row in order[start : start + LINES]]
            read = self._tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=LONGEST)
            # Without a task head, the logits are the mean itself.
            logits = encoder(input_ids=read["input_ids"].to(device), attention_mask=read["attention_mask"].to(device))
            parts.append(F.normalize(logits.logits.float(), dim=1))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _tokenizer_of(self, model: nn.Module) -> "PreTrainedTokenizerBase":
        place = str(getattr(model, "name_or_path", ""))
        if not place:
            raise ValueError(
                f"{type(model).__name__} was made in memory and names no tokenizer, with which the encoder "
                f"{self.place} reads the text of prompts; load the model by Base.open(directory).load()"
            )
        if place not in self._others:
            self._others[place] = Base.open(place).tokenizer()
        return self._others[place]
