"""Read and write inputs of an expert's tasks, which `keep_inputs` leaves beside its deltas.

`inputs.safetensors` has token ids of prompts, and never a target, so that a merge or a router that asks the experts
about inputs needs the library alone. The record names the tasks and the SHA-256 of the file, which may be missing:
`push` leaves it out by default, because a tokenizer turns the ids back into text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modular_experts.library.record import Facts
from modular_experts.library.state import StoredState, write_state
from modular_experts.library.tensorfile import Table, damaged, file_hash

INPUTS_FILE = "inputs.safetensors"
_DTYPES = {"ids": torch.int32, "starts": torch.int64, "tasks": torch.int32, "ends": torch.int32}


class Prompt(NamedTuple):
    """A prompt as token ids `(length,)` int32, and the id of the token that ends its answer."""

    ids: Tensor
    end: int


def write_inputs(file: Path, inputs: Mapping[str, Sequence[Prompt]]) -> Table:
    """Write the prompts of each task, and return what the record holds of them.

    The tensors are `ids`, all prompts one behind the other; `starts` `(n + 1,)`, where each begins and the last ends;
    `tasks` and `ends` `(n,)`, the number of each prompt's task, and its `end`.
    """
    prompts = [(number, prompt) for number, task in enumerate(inputs) for prompt in inputs[task]]
    lengths = torch.tensor([0, *(len(prompt.ids) for _, prompt in prompts)])
    columns = {
        "ids": torch.cat([prompt.ids for _, prompt in prompts]),
        "starts": lengths.cumsum(0),
        "tasks": torch.tensor([number for number, _ in prompts]),
        "ends": torch.tensor([prompt.end for _, prompt in prompts]),
    }
    write_state(file, {name: columns[name].to(dtype) for name, dtype in _DTYPES.items()})
    return {"tasks": list(inputs), "rows": len(prompts), "sha256": file_hash(file)}


def read_inputs(file: Path, listed: Facts) -> dict[str, list[Prompt]]:
    """Return the prompts of each task; raise ValueError if the file is not what the record lists, or not sound."""
    if file_hash(file) != listed["sha256"]:
        raise damaged(file, "its contents are not those that the record lists")
    columns = StoredState(file).read()
    layout = {name: (column.dtype, column.dim()) for name, column in columns.items()}
    if layout != {name: (dtype, 1) for name, dtype in _DTYPES.items()}:
        raise damaged(file, f"it must hold the vectors {', '.join(_DTYPES)}")
    ids, starts, tasks, ends = (columns[name] for name in _DTYPES)
    names = listed["tasks"]
    lengths = starts.diff().tolist()
    if not len(lengths) == len(tasks) == len(ends) == listed["rows"] > 0:
        raise damaged(file, f"it must hold the {listed['rows']} prompts that the record lists")
    if starts[0] != 0 or starts[-1] != len(ids) or not 1 <= min(lengths) <= max(lengths) <= len(ids):
        raise damaged(file, "its prompts must follow each other without a gap")
    if min(ids.min(), tasks.min()) < 0 or tasks.max() >= len(names):
        raise damaged(file, "it holds a negative number, or a task that the record does not name")
    prompts: dict[str, list[Prompt]] = {name: [] for name in names}
    for prompt, task, end in zip(ids.split(lengths), tasks.tolist(), ends.tolist(), strict=True):
        prompts[names[task]].append(Prompt(prompt, end))
    return prompts
