"""Inputs of `merge_speed.py` and `merge_scale.py`: a base of random weights, sparse experts of it, and the same experts
as full checkpoints.

Everything is made once in a folder and used again. A delta is what bfloat16 makes of base plus noise, minus the base:
so a stored expert and its full checkpoint say exactly the same.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from modular_experts.base.files import fingerprint
from modular_experts.deltas import Delta, Sparse
from modular_experts.library import make_record, open_expert, write_expert

__all__ = ["KEEP", "WEIGHTS", "Inputs", "Shape"]

KEEP, NOISE = 0.05, 0.01  # share of the entries that an expert moves, and how far
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings.

    Attributes:
        hidden: Width; heads are 64 wide.
        layers: Number of layers.
        ffn: Width within the MLP.
        vocabulary: Number of tokens.
        sharing: How many heads share their keys and values.
    """

    hidden: int
    layers: int
    ffn: int
    vocabulary: int = 49152
    sharing: int = 3

    @property
    def linear_entries(self) -> int:
        """Entries of the weights that experts move, the seven projections of each layer."""
        side = math.ceil(self.hidden // 64 / self.sharing) * 64
        return self.layers * self.hidden * (2 * (self.hidden + side) + 3 * self.ffn)

    @property
    def entries(self) -> int:
        """Entries of all weights, but for the norms."""
        return self.linear_entries + self.vocabulary * self.hidden

    @property
    def largest_weight(self) -> int:
        """Entries of the largest weight that experts move."""
        return self.hidden * max(self.hidden, self.ffn)

    def config(self) -> LlamaConfig:
        heads = self.hidden // 64
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=math.ceil(heads / self.sharing),
            intermediate_size=self.ffn,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
        )


@dataclass(frozen=True)
class Inputs:
    """The inputs of one shape in one folder.

    Attributes:
        folder: Where they are.
        shape: Of the base.
    """

    folder: Path
    shape: Shape

    @property
    def base(self) -> Path:
        return self._made("base")

    def expert(self, number: int) -> Path:
        """Return the directory of a stored expert, which is made if it is not there."""
        return self._made(f"experts/{number:02}", number)

    def checkpoint(self, number: int) -> Path:
        """Return the directory of the same expert added to its base, as a full checkpoint."""
        return self._made(f"checkpoints/{number:02}", number)

    def bytes_needed(self, experts: int, checkpoints: int) -> int:
        """Return about how many bytes are still to be written for so many inputs, and for two results."""
        model = 2 * self.shape.entries
        of_checkpoints = sum(not self._path(f"checkpoints/{i:02}").exists() for i in range(checkpoints))
        of_experts = sum(not self._path(f"experts/{i:02}").exists() for i in range(experts))
        bases = not self._path("base").exists()
        return int((of_checkpoints + bases + 2) * model + of_experts * self.shape.linear_entries * KEEP * 6)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.shape.hidden}x{self.shape.layers}" / name

    def _made(self, name: str, number: int | None = None) -> Path:
        """Return what has this name; it is made beside its place first, so that what is there is whole."""
        path, beside = self._path(name), self._path(f"{name}.part")
        if path.exists():
            return path
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        if number is None:
            self._write_base(beside)
        elif name.startswith("experts"):
            self._write_expert(beside, number)
        else:
            self._write_checkpoint(beside, number)
        beside.rename(path)
        return path

    def _write_base(self, out: Path) -> None:
        torch.manual_seed(0)
        logging.disable_progress_bar()
        LlamaForCausalLM(self.shape.config()).bfloat16().save_pretrained(out)

    def _write_expert(self, out: Path, number: int) -> None:
        mark = {"id": str(self.base), "revision": None, "fingerprint": fingerprint(self.base)}
        write_expert(out, self._deltas(number), make_record("SparseExpert", mark, seed=number))

    def _deltas(self, number: int) -> Iterator[tuple[str, Delta]]:
        generator = torch.Generator().manual_seed(number)
        with safe_open(self.base / WEIGHTS, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if not name.endswith("_proj.weight"):
                    continue
                weight = tensors.get_tensor(name)
                support = (torch.rand(weight.numel(), generator=generator) < KEEP).nonzero().flatten().int()
                start = weight.flatten()[support].float()
                end = (start + NOISE * torch.randn(len(support), generator=generator)).bfloat16()
                yield name, Sparse(support, end.float() - start, weight.shape)

    def _write_checkpoint(self, out: Path, number: int) -> None:
        expert = open_expert(self.expert(number))
        with safe_open(self.base / WEIGHTS, "pt") as tensors:
            sums = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
        for name in expert:
            sums[name] = (sums[name].float() + expert[name].dense()).bfloat16()
        out.mkdir()
        save_file(sums, out / WEIGHTS, {"format": "pt"})
        shutil.copyfile(self.base / "config.json", out / "config.json")
