"""The task heads of a classifier, which experts bring along: what they compute, and how a model gets them.

A classifier has no token for a class, so the number of a class stands at the target's place in a row: a checksum of its
name, which is the same in each process and never reaches an embedding.
"""

import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts.module_expert import ModuleExpert, Named, Positional
from modular_experts.language_model import is_classifier
from modular_experts.library.compatibility import open_parents
from modular_experts.library.expert import StoredExpert, stored_experts_of
from modular_experts.library.state import TASK_HEAD, is_of_task_head, task_of_head
from modular_experts.routing.gates import rows_at_hand

log = logging.getLogger(__name__)

UNLIKELY = -1e4
"""The logit of a class of another task; its probability is 0, and no sum of logits is infinite."""
_NAMES: dict[int, str] = {}
"""The name of each number that `class_number` returned."""


def class_number(name: str) -> int:
    """Return the number of a class, below 2**31; raise ValueError if another name has it, as one in millions does."""
    number = zlib.crc32(name.encode()) & 0x7FFFFFFF
    known = _NAMES.setdefault(number, name)
    if known != name:
        raise ValueError(f"the classes {known!r} and {name!r} have the same checksum; rename one of them")
    return number


def class_name(number: int) -> str:
    """Return the class of a number that `class_number` returned."""
    return _NAMES[number]


class TaskHeads(ModuleExpert):
    """A Linear for each task, trained with the experts of the task, and never merged; the row's task chooses.

    Args:
        width: The size of the vectors that it classifies.
        classes: The names of each task's classes.
        bias: Whether each Linear has a bias.
    """

    def __init__(self, width: int, classes: Mapping[str, Sequence[str]], bias: bool = True) -> None:
        super().__init__()
        self.tasks = sorted(classes)
        self.classes = {task: list(classes[task]) for task in self.tasks}
        self.heads = nn.ModuleList(nn.Linear(width, len(self.classes[task]), bias) for task in self.tasks)
        numbers = {task: [class_number(name) for name in names] for task, names in self.classes.items()}
        self._numbers = sorted({number for own in numbers.values() for number in own})
        places = {number: place for place, number in enumerate(self._numbers)}
        self._columns = [[places[number] for number in numbers[task]] for task in self.tasks]

    def after(self, args: Positional, kwargs: Named, output: object) -> Tensor:
        """Return logits `(rows, ..., classes of all tasks)` of vectors `(rows, ..., width)`."""
        x: Tensor = args[0]
        by_head: dict[int, list[int]] = {}
        for row, task in enumerate(self._tasks_of(len(x))):
            by_head.setdefault(self._head_of(task), []).append(row)
        dtype = next(self.parameters()).dtype
        logits = x.new_full((*x.shape[:-1], len(self._numbers)), UNLIKELY, dtype=dtype)
        for number, rows in by_head.items():
            own = logits.new_full((len(rows), *logits.shape[1:]), UNLIKELY)
            own[..., self._columns[number]] = self.heads[number](x[rows].to(dtype)).to(dtype)
            logits[rows] = own
        if self.training:
            # DDP waits for a gradient of each parameter, also where a process has no row of a task.
            logits = logits + 0.0 * sum(parameter.sum() for parameter in self.parameters())
        return logits

    def _tasks_of(self, rows: int) -> Sequence[str]:
        tasks = rows_at_hand().tasks
        if tasks is not None:
            return tasks
        if len(self.tasks) > 1:
            names = ", ".join(self.tasks)
            raise ValueError(f"the experts classify {names}; call the model inside of `reading(tasks=...)`")
        return self.tasks * rows

    def _head_of(self, task: str) -> int:
        """Return the number of a task's head; a filler row, of no task, takes the first."""
        if task and task not in self.tasks:
            raise ValueError(f"there is no task head for {task}, only for {', '.join(self.tasks)}; name its expert")
        return self.tasks.index(task) if task else 0

    def columns(self, numbers: Tensor, tasks: Sequence[str]) -> Tensor:
        """Return in which column of the logits the classes of these numbers are, `(n,)`, for rows of these tasks."""
        places: list[int] = []
        for number, task in zip(numbers.tolist(), tasks, strict=True):
            own = self._columns[self._head_of(task)]
            place = self._numbers.index(number) if number in self._numbers else -1
            if place not in own:
                target, classes = class_name(number), ", ".join(self.classes[task])
                raise ValueError(f"the target {target!r} is not a class that the experts of {task} know: {classes}")
            places.append(place)
        return torch.tensor(places, device=numbers.device)

    def numbers(self, columns: Tensor) -> Tensor:
        """Return the numbers of the classes in these columns of the logits."""
        return torch.tensor(self._numbers, device=columns.device)[columns]

    def state(self) -> dict[str, Tensor]:
        """Return weight, bias and names of the classes (JSON, uint8) of each task."""
        state: dict[str, Tensor] = {}
        for task, head in zip(self.tasks, self.heads, strict=True):
            names = json.dumps(self.classes[task], ensure_ascii=False).encode()
            state |= {f"{TASK_HEAD}{task}.{name}": tensor for name, tensor in head.state_dict().items()}
            state[f"{TASK_HEAD}{task}.classes"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "TaskHeads":
        """Return heads with the tensors that `state` returned, perhaps of several models."""
        classes = {}
        for name, tensor in state.items():
            if name.endswith(".classes"):
                classes[task_of_head(name)] = json.loads(bytes(tensor.tolist()))
        width = next(tensor.shape[1] for name, tensor in state.items() if name.endswith(".weight"))
        made = cls(width, classes, bias=any(name.endswith(".bias") for name in state))
        for task, head in zip(made.tasks, made.heads, strict=True):
            head.load_state_dict({name: state[f"{TASK_HEAD}{task}.{name}"] for name in head.state_dict()})
        return made


def task_heads(model: nn.Module) -> TaskHeads:
    """Return the task heads of a classifier; raise ValueError if it has none."""
    heads = getattr(_place(model), "expert", None)
    if heads is None:
        raise ValueError("the base has no task head, so it classifies nothing; name an expert of the task beside it")
    return cast(TaskHeads, heads)


def trained_task_heads(model: nn.Module, classes: Mapping[str, Sequence[str]]) -> None:
    """Let a classifier train heads for the classes of tasks: those that it has, or new ones if the classes differ."""
    place = _place(model)
    heads = getattr(place, "expert", None)
    if heads is None or (classes and heads.classes != {task: list(names) for task, names in classes.items()}):
        if not classes:
            raise ValueError("a classifier learns the classes of its tasks, and the data name none; give a TaskMixture")
        _put(model, TaskHeads(place.width, classes, place.bias))
    task_heads(model).requires_grad_(True)


def check_classes(model: nn.Module, classes: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if a classifier that goes on with its heads lacks one for the classes of a task."""
    known = task_heads(model).classes
    for task, names in classes.items():
        if unknown := set(names) - set(known.get(task, ())):
            lacking = f"{sorted(unknown)[0]!r} of {task}"
            raise ValueError(f"the module has heads for {', '.join(known)}, and not for {lacking}; train a new module")


def put_task_heads(
    model: nn.Module, experts: Sequence[Mapping[str, Delta]], others: Sequence[StoredExpert] = ()
) -> Callable[[], None]:
    """Give a classifier the heads of stored experts, and of `others` for further tasks; return what undoes it.

    Other models stay as they are.
    """
    state = head_state([*stored_experts_of(experts), *others]) if is_classifier(model) else {}
    if not state:
        return lambda: None
    before = getattr(_place(model), "expert", None)
    _put(model, TaskHeads.of_state({name.rpartition("/")[2]: tensor for name, tensor in state.items()}))
    _place(model).eval()
    return lambda: _put(model, before)


def _place(model: Any) -> Any:
    return model.get_submodule(model.head_place)


def _put(model: nn.Module, heads: TaskHeads | None) -> None:
    place = _place(model)
    if hasattr(place, "expert"):
        place.expert.detach(place)
    if heads is not None:
        heads.attach(place)
        first = next(model.parameters())
        heads.to(first.device, first.dtype)


def head_state(experts: Sequence[StoredExpert]) -> dict[str, Tensor]:
    """Return the tensors of all task heads of some experts by their names in a state.

    Where several experts have a head for one task, the first gives it, unless a later one was trained on top of that.
    """
    state: dict[str, Tensor] = {}
    for task, owners in _owners_of_heads(experts).items():
        chosen = owners[0]
        for later in owners[1:]:
            if any(chosen.is_listed_as(parent) for parent in later.record["parents"]):
                chosen = later
        tensors = chosen.state()
        state |= {name: tensors[name] for name in tensors if is_of_task_head(name) and task_of_head(name) == task}
    return state


def _owners_of_heads(experts: Sequence[StoredExpert]) -> dict[str, list[StoredExpert]]:
    """Return for each task the experts, also those behind routes, with a head for it."""
    owners: dict[str, list[StoredExpert]] = {}
    for expert in experts:
        for member in open_parents(expert) if expert.is_routed else [expert]:
            for task in dict.fromkeys(task_of_head(name) for name in member.state_names if is_of_task_head(name)):
                owners.setdefault(task, []).append(member)
    return owners


def warn_of_several_heads(experts: Sequence[StoredExpert]) -> None:
    """Log for which tasks several experts have a head, of which a merge keeps one."""
    for task, owners in _owners_of_heads(experts).items():
        if len(owners) > 1:
            names = " and ".join(owner.name for owner in owners)
            log.warning("%s have task heads for %s each, and the merge keeps one of them", names, task)


def without_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state that belong to no task head."""
    return {name: tensor for name, tensor in state.items() if not is_of_task_head(name)}


def check_task_heads(experts: Sequence[StoredExpert], tasks: Sequence[str]) -> None:
    """Raise ValueError if no expert has a head for one of some tasks."""
    known = {task_of_head(name) for name in head_state(experts)}
    if missing := [task for task in tasks if task not in known]:
        raise ValueError(
            f"no expert has a task head for {missing[0]}, without which a classifier cannot answer it; leave the task "
            "out, or name an expert that was trained on it"
        )


def state_of_head(model: Any, head: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Return the state of an expert with a trained last layer: its weight `(classes, width)` and perhaps its bias.

    The classes have the names in the configuration of the model, if it has as many, or LABEL_0, LABEL_1, ...
    """
    if len(tasks) != 1:
        raise ValueError(f"the adapter has one task head, and the tasks are {', '.join(tasks)}; name the head's task")
    count = len(head["weight"])
    known: Mapping[int, str] = model.config.id2label if len(model.config.id2label) == count else {}
    classes = [known.get(number, f"LABEL_{number}") for number in range(count)]
    heads = TaskHeads(_place(model).width, {tasks[0]: classes}, "bias" in head)
    heads.heads[0].load_state_dict({name: tensor.float() for name, tensor in head.items()})
    return {f"{model.head_place}/{name}": tensor for name, tensor in heads.state().items()}
