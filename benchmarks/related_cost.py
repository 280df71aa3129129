"""What a training step of an expert costs beside that of a LoRA: for `related_systems` and `related_experts`.

Measured on a Llama of 135 million parameters with random weights: training steps of 2 x 128 tokens in turn, in an order
drawn anew for each round, as medians of CPU time, and the peak memory of a process of its own.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import language_model
from sparse_step import high_water
from torch import nn

from modular_experts.evaluation import batch_losses
from modular_experts.injection import draw, extra_losses, inject, named_experts
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.routing import MoLoRAExpert
from modular_experts.systems.lora_ir.plan import TaskGate

__all__ = ["costs", "own_memory", "parameters", "print_costs"]

Plans = Callable[[str], Any]
"""Gives the plan of a name."""


def parameters(model: nn.Module) -> dict[str, int]:
    """Return how many numbers are trained, and how many of them one token meets: of k of n experts, k / n."""
    trained = active = 0
    experts: list[Any] = [expert for _, expert in named_experts(model)]
    of_prompt = next((expert.k for expert in experts if isinstance(expert, TaskGate)), None)
    for expert in experts:
        taken = expert.k if isinstance(expert, MoLoRAExpert) else of_prompt
        for name, parameter in expert.named_parameters():
            trained += parameter.numel()
            share = 1 if taken is None or name == "router" else taken / expert.experts
            active += round(share * parameter.numel())
    return {"trained": trained, "active": active}


def costs(store: JSONLines, script: str, plans: Plans, names: Sequence[str], repeats: int, small: bool) -> list[Any]:
    """Return for each name the time of a step and the memory of a process, also over those of the first name.

    Args:
        store: Where results are kept.
        script: The calling file, whose option `--own-cost NAME` prints `own_memory`.
        plans: A function of that file.
        names: What is compared.
        repeats: Rounds of steps after a warm-up.
        small: Measure a tiny model in this process, to see that it works.
    """
    with LocalProcesses(1) as pool:
        pieces = [Piece(("memory", name), _memory, (script, plans, name, small)) for name in names]
        pieces.append(Piece(("time", *names), _times, (plans, names, repeats, small)))
        run(pieces, store, pool, print_progress()).raise_failures()
    peaks, times = {name: store["memory", name] for name in names}, store["time", *names]
    first = names[0]
    return [
        {"name": name, "time": times[name]["seconds"] / times[first]["seconds"], "memory": peaks[name] / peaks[first]}
        | {"seconds": times[name]["seconds"], "bytes": peaks[name]}
        | {key: times[name][key] / times[first][key] for key in ("trained", "active")}
        for name in names
    ]


def print_costs(rows: Sequence[dict[str, Any]]) -> None:
    print("\n| 135 million parameters | trained | active | time of a step | peak memory |\n" + "|---" * 5 + "|")
    for row in rows:
        cells = [row["name"], *(f"{row[key]:.2f}" for key in ("trained", "active", "time", "memory"))]
        print("| " + " | ".join(cells) + " |")


def own_memory(plans: Plans, name: str, small: bool) -> int:
    """Return the peak memory, in bytes, of this process after two training steps."""
    torch.set_num_threads(1)
    step, _ = _step(plans(name), small)
    for _ in range(2):
        step()
    return high_water()


def _memory(script: str, plans: Plans, name: str, small: bool) -> int:
    if small:
        return own_memory(plans, name, small)
    command = [sys.executable, str(Path(script).absolute()), "--own-cost", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _times(plans: Plans, names: Sequence[str], repeats: int, small: bool) -> dict[str, dict[str, float]]:
    """Return the median CPU seconds of a step of each name, and its numbers of parameters."""
    torch.set_num_threads(1)
    random.seed(0)
    steps = {name: _step(plans(name), small) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    for _ in range(repeats + 1):
        random.shuffle(order)
        for name in order:
            started = time.process_time()
            steps[name][0]()
            seconds[name].append(time.process_time() - started)
    return {
        name: {"seconds": statistics.median(seconds[name][1:]), **parameters(model)}
        for name, (_, model) in steps.items()
    }


@cache
def _base(small: bool) -> nn.Module:
    return language_model(small).base


def _step(plan: Any, small: bool) -> tuple[Callable[[], None], nn.Module]:
    """Return a training step of a plan, as `ExpertModule` makes it, and the model; models share their weights."""
    shared = _base(small)
    base: Any = copy.deepcopy(shared, {id(parameter): parameter for parameter in shared.parameters()})
    size = (2, 32) if small else (2, 128)
    ids = torch.randint(base.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    batch: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    torch.manual_seed(0)
    inject(base, plan)
    for gate in [expert for _, expert in named_experts(base) if isinstance(expert, TaskGate)]:
        gate.learn([torch.randn(16, gate.router.weight.shape[1]) for _ in range(gate.experts)])
    base.train()
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-3, fused=True)
    training = SimpleNamespace(model=base, batch_losses=batch_losses)
    for _, expert in named_experts(base):
        expert.before_fit(training, None)

    def step() -> None:
        draw(base, "0")
        sums, counts, *added = training.batch_losses(base, batch)
        terms = [*extra_losses(base).values(), *(one / counts.sum() for found in added for one in found.values())]
        sum(terms, start=sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, base
