"""Teach the gate of LoRA-IR the tasks of the data, which is the first stage of its training."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.data import TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.rows import spread_evenly
from modular_experts.injection import named_experts
from modular_experts.routing.lora_ir import TaskGate
from modular_experts.statistics.prompts import name_of, prompts
from modular_experts.statistics.take import batches_by_length

log = logging.getLogger(__name__)


def teach_tasks(model: nn.Module, data: Any) -> float:
    """Teach the task gate of a model, if it has one that has learned nothing yet.

    The gate reads training prompts, each whole and without a part of its front, and learns the task of each. Every
    process does the same. The log shows how far it is, and then how many validation prompts it sends to the expert of
    their task.

    Args:
        model: A causal language model with the experts of a `LoRAIR` plan; it is the same afterwards but for the gate.
        data: The `TaskMixture` that the model is about to be trained on.

    Returns:
        How many seconds that took, 0 if there was nothing to teach.

    Raises:
        ValueError: The data are not a `TaskMixture`, or have another number of held-in tasks than there are experts, or
            a task has too few rows.
    """
    found = [expert for _, expert in named_experts(model) if isinstance(expert, TaskGate) and not expert.has_learned]
    if not found:
        return 0.0
    (gate,), started = found, time.monotonic()
    if not isinstance(data, TaskMixture):
        raise ValueError(
            f"the router of LoRAIR learns the tasks of a TaskMixture, and the data are of type {type(data).__name__}; "
            "give the trainer a TaskMixture as datamodule"
        )

    def vectors(examples: list[Example], parts: bool) -> Tensor:
        batches = batches_by_length(spread_evenly(examples, gate.prompts), data)
        read = prompts(model, batches, [], parts, gate.router.depths)  # type: ignore[arg-type]
        return torch.cat([read[name_of(depth)].values for depth in gate.router.depths], 1)

    tasks, read = sorted(data.input_examples(["train"]).items()), list[Tensor]()
    gate.check(len(tasks))
    for number, (_, examples) in enumerate(tasks, start=1):
        read.append(vectors(examples, parts=True))
        if number * 10 // len(tasks) > (number - 1) * 10 // len(tasks):
            log.info("the router has read the prompts of %d of %d tasks", number, len(tasks))
    gate.learn(read)
    sentence = f"the router learned {len(tasks)} tasks"
    if all("validation" in task["rows"] for task in data.contents.values()):
        there = sorted(data.input_examples(["validation"]).items())
        chosen = [gate.router.scores(vectors(examples, parts=False)).argmax(1) for _, examples in there]
        right = sum(int((own == number).sum()) for number, own in enumerate(chosen))
        sentence += f", and sends {right} of {sum(map(len, chosen))} validation prompts to the expert of their task"
    seconds = time.monotonic() - started
    log.info("%s, in %.1f s", sentence, seconds)
    return seconds
