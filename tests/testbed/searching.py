"""A tiny model, validation rows of tiny tasks, and experts with something to find, for the tests of the searches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from testbed.random_deltas import random_delta
from testbed.runs import mixture

from modular_experts.base import Base
from modular_experts.data.batch import IGNORED
from modular_experts.deltas import Delta, Dense
from modular_experts.evaluation import batch_losses
from modular_experts.library import StoredExpert, make_record, open_expert, write_expert
from modular_experts.merging.objective import Objective

NAMES = [f"model.layers.{layer}.{name}_proj.weight" for layer in (0, 1) for name in ("self_attn.q", "mlp.down")]
FORMS = ("Sparse", "BlockSparse", "LowRank", "Dense")


def objective_on(base: Path, files: dict[str, Path], sharpness: float = 1.0, **settings):
    """Return the objective on two tasks, both held in; a random model is sure of nothing unless it is made sharper."""
    chosen, model = {name: files[name] for name in ("upper", "reverse")}, Base.open(base).load()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return Objective(model, mixture(chosen, base, eval_batch_size=4, **settings))


def random_experts(objective: Objective, size: float = 0.1) -> list[dict[str, Delta]]:
    """Return an expert of each form; the last does not move the first weight."""
    shapes = {name: objective.model.get_parameter(name).shape for name in NAMES}
    experts = [
        {
            name: random_delta(form, shape, seed, torch.float32, tile=(8, 8)) * size
            for seed, (name, shape) in enumerate(shapes.items())
        }
        for form in FORMS
    ]
    return [*experts[:-1], {name: experts[-1][name] for name in NAMES[1:]}]


def descent(objective: Objective, task: str, length: float) -> dict[str, Delta]:
    """Return the delta that goes down the gradient of a task's loss on its first batch, of a given length."""
    weights = [objective.model.get_parameter(name) for name in NAMES]
    sums, counts = batch_losses(objective.model, objective.batches[task][0])
    slopes = torch.autograd.grad(sums.sum() / counts.sum(), weights)
    norm = torch.cat([slope.flatten() for slope in slopes]).norm()
    return {name: Dense(-length / norm * slope) for name, slope in zip(NAMES, slopes, strict=True)}


def stored(
    folder: Path, experts: Sequence[Mapping[str, Delta]], base: Mapping[str, Any] | None = None
) -> list[StoredExpert]:
    """Return experts as they are opened, once they are written to a folder as `0`, `1` and so on."""
    base = base or {"id": "base", "revision": None, "fingerprint": "f" * 64}
    places = [folder / str(number) for number in range(len(experts))]
    for place, expert in zip(places, experts, strict=True):
        write_expert(place, expert.items(), make_record("SparseExpert", base, tasks=[f"task-{place.name}"]))
    return [open_expert(place) for place in places]


def state(model) -> dict[str, torch.Tensor]:
    """Return a copy of all weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same_bits(model, before: dict[str, torch.Tensor]) -> bool:
    """Return whether every weight is as it was."""
    return all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the labelled tokens."""
    chosen = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][chosen], labels[:, 1:][chosen])


def entropy_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy at the places that predict labelled tokens."""
    return torch.distributions.Categorical(logits=logits[:, :-1][labels[:, 1:] != IGNORED]).entropy().mean()
