"""Vocabularies: whether the models of a recipe read and write the same tokens, where the recipe names a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from modular_experts.interop.mergekit.inputs import Model

__all__ = ["check_vocabularies", "spare_rows"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_vocabularies(base: Model, others: Iterable[Model]) -> None:
    """Refuse models whose tokenizers number their tokens in another way than the base's. One without any is taken to
    have the base's.

    Raises:
        FileNotFoundError: The base has no tokenizer.
        ValueError: The tokenizer of a model is another one.
    """
    expected = _vocabulary(base.directory)
    if expected is None:
        raise FileNotFoundError(f"the recipe asks for the tokenizer of {base.name}, and {base.directory} has none")
    for model in others:
        found = _vocabulary(model.directory)
        if found is not None and found != expected:
            raise ValueError(
                f"the tokenizer of {model.name} is not that of {base.name}, and its embeddings would have to be put in "
                "another order, which is not supported"
            )


def spare_rows(model: Model) -> int:
    """Return how many rows of a model's embeddings no token of its tokenizer has."""
    tokens, structure = len(_vocabulary(model.directory) or ()), model.stored.structure
    rows = [structure.shapes[name][0] for name in structure.vocabulary]
    return max(0, max(rows, default=0) - tokens)


def _vocabulary(directory: Path) -> dict[str, int] | None:
    if not any((directory / name).is_file() for name in _FILES):
        return None
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False).get_vocab()
