"""Measure what models forget: how far their loss on texts rises above the base's."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel

from modular_experts.data.batch import Collator, Example, Tokens
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.evaluation.intervals import drawn_means, ends
from modular_experts.evaluation.likelihood import batch_losses
from modular_experts.injection import context_length
from modular_experts.reports.results import Facts
from modular_experts.reports.tables import Column, Line, Table, number_text
from modular_experts.routing.prompts import evaluation_mode

PIECE = 512
"""Tokens of a piece of text, or the model's context where that is shorter."""
PROMPT = 32
"""The first tokens of a piece, which a router reads as its prompt; no loss counts them."""


@dataclass(frozen=True)
class Texts:
    """A file of texts, as token ids `(tokens,)`, that models read in pieces."""

    file: Path
    ids: torch.Tensor
    pad_id: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, rows: int = 8) -> list[tuple[float, int]]:
        """Return the summed loss of each piece in nats, and how many tokens it counts."""
        length = min(PIECE, context_length(model) or PIECE)
        prompt = min(PROMPT, length // 2)
        pieces = [piece for piece in self.ids.split(length) if len(piece) > prompt]
        examples = [Example("text", "", "", Tokens(piece, prompt)) for piece in pieces]
        losses: list[tuple[float, int]] = []
        with evaluation_mode(model):
            for first in range(0, len(examples), rows):
                batch = move_data_to_device(Collator(self.pad_id)(examples[first : first + rows]), model.device)
                sums, counts = batch_losses(model, batch)
                losses += zip(sums.tolist(), counts.tolist(), strict=True)
        return losses


def read_texts(file: str | Path, reader: RowTokenizer) -> Texts:
    """Read a file of texts, such as articles one behind the other, in UTF-8.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It holds something else than text, or too little of it.
    """
    place = Path(file).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"forgetting={str(file)!r} is not a file; give a file of texts")
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"forgetting={str(file)!r} is not text in UTF-8; convert it") from None
    ids = reader.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if len(ids) <= 2 * PROMPT:
        raise ValueError(f"forgetting={str(file)!r} has {len(ids)} tokens; give texts of more than {2 * PROMPT}")
    return Texts(place, torch.tensor(ids, dtype=torch.int32), reader.pad_id)


def forgotten(texts: Texts, losses: Mapping[str, Sequence[Sequence[float]]], base: str) -> Facts:
    """Return what results keep: of each model the loss in nats per token, and its rise above the base's.

    Args:
        losses: What `Texts.losses` returned, by model.
        base: The name of the base among them.
    """
    models = {}
    counts = [count for _, count in losses[base]]
    before = [total for total, _ in losses[base]]
    for model, measured in losses.items():
        after = [total for total, _ in measured]
        rises = [later - earlier for later, earlier in zip(after, before, strict=True)]
        models[model] = {
            "loss": sum(after) / sum(counts),
            "rise": sum(rises) / sum(counts),
            "interval": ends(drawn_means(rises, per=counts)),
        }
    return {"file": texts.file.name, "tokens": int(sum(counts)), "pieces": len(counts), "models": models}


def forgetting_table(facts: Facts) -> Table:
    """Return a table with a line for each model."""

    def number(name: str) -> Column:
        return Column(name, lambda measured: measured[name], lambda value: number_text(value, 3))

    def half(measured: Facts) -> float | None:
        spread = measured["interval"]
        return (spread[1] - spread[0]) / 2 if spread else None

    columns = [number("loss"), number("rise"), Column("±", half, lambda value: number_text(value, 3))]
    lines = [Line(model, measured) for model, measured in facts["models"].items()]
    return Table(columns, [lines], f"loss on {facts['file']}")
