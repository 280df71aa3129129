"""Train the gates of an expert on its own tasks, from which the router Phatgoose learns."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta
from modular_experts.evaluation import batch_losses
from modular_experts.experts.site import Factory, Site
from modular_experts.injection.inject import expert_layers
from modular_experts.injection.routed import Injected
from modular_experts.methods.method import DataStatistic
from modular_experts.progress import Counted, Progress
from modular_experts.routing.phatgoose import Gated

STEPS = 100


def train_gates(
    model: PreTrainedModel,
    expert: Mapping[str, Delta],
    batches: Iterable[Batch],
    steps: int | None = None,
    learning_rate: float = 1e-3,
    progress: Progress = iter,
) -> tuple[dict[str, DataStatistic], list[float]]:
    """Train one gate for each weight of an expert, with everything else frozen; return them, and the loss of each step.

    Args:
        model: The base, without experts; it is the same again afterwards.
        batches: Batches with targets, as `data/batch.py` describes them; each pass over them has another order, which
            is always the same.
        steps: Number of steps of AdamW, each on one batch; `STEPS` if not given.

    Raises:
        ValueError: There is no batch, or the expert moves something else than the weight of a linear layer.
    """
    rows = list(batches)
    if not rows:
        raise ValueError("gates need at least one row with a target, and there was none")
    losses = []
    with Injected(model, partial(_gated_sites, expert)):
        gates = {name: cast(Gated, layer.expert).gate for name, layer in expert_layers(model)}
        optimizer = torch.optim.AdamW(gates.values(), learning_rate, weight_decay=0.0)
        draw = torch.Generator().manual_seed(0)
        order: list[int] = []
        for _ in progress(Counted(range(STEPS if steps is None else steps), "steps")):
            if not order:
                order = torch.randperm(len(rows), generator=draw).tolist()
            sums, tokens = batch_losses(model, move_data_to_device(rows[order.pop()], model.device))
            loss = sums.sum() / tokens.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {name: DataStatistic(gate.detach()) for name, gate in gates.items()}, losses


def _gated_sites(expert: Mapping[str, Delta], sites: Sequence[Site]) -> dict[Site, Factory]:
    """Plan a `Gated` at the site of each weight that an expert moves."""
    known = {site.weight: site for site in sites}
    for name in expert:
        if name not in known:
            raise ValueError(
                f"the expert moves {name}, which is not the weight of a linear layer, so it cannot have a gate"
            )

    def gated(delta: Delta, weight: Tensor, site: Site) -> Gated:
        return Gated(weight, (delta.T if site.is_transposed else delta).to(weight.device))

    return {known[name]: partial(gated, delta) for name, delta in expert.items()}
