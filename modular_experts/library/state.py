"""Read and write the state of an expert, which may lie beside its deltas.

`state.safetensors` has the trained tensors of a type whose delta is not all that it does, named `<weight>/<name in the
expert>`. A table in the file's metadata, which is part of the expert's content hash, gives dtype, shape and SHA-256 of
each. `expert.json` names the class of the tensors as text.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from modular_experts.deltas import all_finite
from modular_experts.library.record import FORMAT_WITH_STATE
from modular_experts.library.tensorfile import Table, TensorFileWriter, damaged, read_table

TASK_HEAD = "task_head."
"""How the names of the tensors of a task head begin, behind the name of their place; the task's name follows."""


class StoredState:
    """The tensors of a state file; opening it checks the header, and `read` the tensors."""

    def __init__(self, file: Path) -> None:
        self.table, self._tensors = read_table(file, "state", FORMAT_WITH_STATE)
        try:
            named = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in self.table.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(file, f"its metadata does not describe its state ({error!r})") from error
        if named != {name: (str(dtype), shape) for name, (dtype, shape) in self._tensors.layouts.items()}:
            raise damaged(file, "its tensors are not those that its metadata names")

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, each a copy of its own; raise ValueError if one is not what was written."""
        for name, entry in self.table.items():
            if self._tensors.sha256(name) != entry["sha256"]:
                raise damaged(self._tensors.file, f"the tensor {name} is not what was written")
        return {name: self._tensors[name].clone() for name in self.table}


def write_state(file: Path, state: Mapping[str, Tensor]) -> Table:
    """Write a state file and return its table; raise ValueError if a number is not finite."""
    with TensorFileWriter(file) as writer:
        table = {}
        for name, tensor in sorted(state.items()):
            stored = tensor.detach().to("cpu").contiguous()
            if stored.is_floating_point() and not all_finite(stored):
                raise ValueError(f"the state {name} cannot be stored: it holds values that are not finite")
            digest = writer.write(name, stored)
            table[name] = {"dtype": str(stored.dtype), "shape": list(stored.shape), "sha256": digest}
        writer.finish(json.dumps({"format": FORMAT_WITH_STATE, "state": table}, sort_keys=True))
    return table


def is_of_task_head(name: str) -> bool:
    """Return whether a tensor of a state belongs to the task head of a classifier."""
    return name.rpartition("/")[2].startswith(TASK_HEAD)


def task_of_head(name: str) -> str:
    """Return the task of such a tensor."""
    return name.rpartition("/")[2].removeprefix(TASK_HEAD).rpartition(".")[0]
