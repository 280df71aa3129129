"""One training step of a linear layer under each expert type, as a ratio to the same layer frozen.

Frozen (forward, and backward to the input only) is the bound. LoRA has the rank that comes nearest to the sparse
expert's number of trained parameters. All run in turn in one process, on one thread; CPU time, medians.

    python benchmarks/sparse_step.py [--keep 0.05] [--repeats 15] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import inject

SHAPES = [(576, 576), (1536, 576), (576, 1536)]
TOKENS = 1024


def kinds(keep: float, shape: tuple[int, int]) -> dict[str, Callable | None]:
    """Return a factory per row of the table."""
    rank = max(1, round(keep * shape[0] * shape[1] / sum(shape)))
    return {
        "frozen": None,
        "full": FullExpert,
        f"LoRA, rank {rank}": partial(LoRAExpert, rank=rank),
        "dense, masked": partial(MaskedExpert, keep_ratio=keep, dense_start=False),
        "sparse, elements": partial(SparseExpert, keep_ratio=keep),
        "sparse, 16 x 16": partial(SparseExpert, keep_ratio=keep, granularity="block", block_size=16),
    }


def prepare(shape: tuple[int, int], factory: Callable | None) -> Callable[[Tensor, Tensor], None]:
    """Return one step: forward, backward, AdamW, and the next forward's write into the weight."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    if factory is None:
        model.requires_grad_(False)
    else:
        inject(model, factory, "0")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True) if trained else None

    def step(x: Tensor, grad: Tensor) -> None:
        model(x.detach().requires_grad_()).backward(grad)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(keep: float, shape: tuple[int, int], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of a step by kind, measured in turn."""
    steps = {name: prepare(shape, factory) for name, factory in kinds(keep, shape).items()}
    x, grad = torch.randn(TOKENS, shape[1]), torch.randn(TOKENS, shape[0])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            step(x, grad)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ratios = {}
    for shape in SHAPES:
        seconds = measure(options.keep, shape, options.repeats)
        ratios[f"{shape[0]} x {shape[1]}"] = {name: value / seconds["frozen"] for name, value in seconds.items()}
    if options.json:
        json.dump({"keep": options.keep, "tokens": TOKENS, "over_frozen": ratios}, sys.stdout, indent=2)
        return
    print(
        f"time of a step over the frozen layer's, {options.keep:.0%} kept, {TOKENS} tokens, torch {torch.__version__}"
    )
    for shape, row in ratios.items():
        print(shape)
        for name, ratio in row.items():
            print(f"  {name:<20}{ratio:6.2f}")


if __name__ == "__main__":
    main()
