"""What padding costs in training, and what packed batches save of it.

SmolLM2-135M takes training steps with LoRA on its projections, on one
thread: real rows, read by `TaskMixture`, of all files in one mixture and of the last file alone. Batches hold the same
number of rows in two ways, which take turns step by step: padded in the order that is drawn (`plain`), and packed
(`packed`).

A row of the table gives the share of padding in an epoch, and the tokens of data per second of CPU time over those of
`plain`. `packed` reads the rows of `plain`, so the mean loss of its steps is the same to rounding.

    MODULAR_EXPERTS_DATA=DIR python benchmarks/packing.py [--json] [--quick]      8 minutes; --quick: in small
"""

import argparse
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from contenders import pretrained
from measuring import Parser, output, print_machine
from torch import nn

from modular_experts.data import TaskMixture
from modular_experts.evaluation import batch_losses, check_packing
from modular_experts.experts import LoRAExpert
from modular_experts.injection import inject

WAYS: dict[str, dict[str, Any]] = {"plain": {"packing": False}, "packed": {"packing": True}}


def compare(model: nn.Module, tokenizer: Any, files: list[Path], batch_size: int, steps: int) -> dict[str, Any]:
    """Return the row of one mixture and batch size; the experts start anew, and so does each way."""
    mixtures = {
        way: TaskMixture([str(file) for file in files], tokenizer, batch_size, seed=0, **options)
        for way, options in WAYS.items()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    values = {way: [value.clone() for value in start] for way in WAYS}
    optimizers = {way: torch.optim.AdamW(values[way], lr=2e-3, weight_decay=0.0) for way in WAYS}
    batches = {way: list(islice(mixture.train_dataloader(), steps)) for way, mixture in mixtures.items()}
    seconds, tokens, losses = (dict.fromkeys(WAYS, 0.0) for _ in range(3))

    def step(way: str, number: int) -> None:
        batch = batches[way][number]
        for parameter, value in zip(trained, values[way], strict=True):
            parameter.data, parameter.grad = value, None
        began = time.process_time()
        sums, counts = batch_losses(model, batch)
        loss = sums.sum() / counts.sum()
        loss.backward()
        seconds[way] += time.process_time() - began
        tokens[way] += int((batch["row"] >= 0).sum() if "row" in batch else batch["attention_mask"].sum())
        losses[way] += loss.item()
        for parameter, value in zip(trained, values[way], strict=True):
            value.grad = parameter.grad
        optimizers[way].step()

    order = list(WAYS)
    for number in range(steps):
        random.shuffle(order)
        for way in order:
            step(way, number)
    for parameter, value in zip(trained, start, strict=True):
        parameter.data, parameter.grad = value, None
    speeds = {way: tokens[way] / seconds[way] for way in WAYS}
    return {
        "padding": {way: mixture.padding() for way, mixture in mixtures.items()},
        "speed": {way: speed / speeds["plain"] for way, speed in speeds.items()},
        "tokens_per_second": speeds["plain"],
        "loss": {way: loss / steps for way, loss in losses.items()},
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give a row for each mixture and batch size."""
    files = sorted(Path(options.data).glob("*.jsonl"))
    if not files:
        raise SystemExit(f"{options.data} has no .jsonl files; name their folder in MODULAR_EXPERTS_DATA")
    model, tokenizer = pretrained(options.model, options.quick)
    inject(model, lambda weight: LoRAExpert(weight, rank=16), r".*_proj")
    check_packing(model)
    mixtures = {f"all {len(files)} files": files, files[-1].stem: files[-1:]}
    for name, chosen in mixtures.items():
        for batch_size in (8, 32):
            steps = 2 if options.quick else options.rows // batch_size
            yield {"rows": name, "batch_size": batch_size} | compare(model, tokenizer, chosen, batch_size, steps)


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model and two steps: the speeds mean nothing")
    parser.add_argument("--rows", type=int, default=128, help="rows that each way trains on, in each line")
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / ".cache" / "smollm2"))
    parser.add_argument("--data", default=os.environ.get("MODULAR_EXPERTS_DATA", "."))
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    output(options, {"rows": list(measure(options))}, show)


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print_machine(report)
    print("\n| rows | a batch | padding: plain | packed | speed: packed |")
    print("|---|---|---|---|---|")
    for row in report["rows"]:
        shares = " | ".join(f"{share:.1%}" for share in row["padding"].values())
        print(f"| {row['rows']} | {row['batch_size']} | {shares} | {row['speed']['packed']:.2f} |")


if __name__ == "__main__":
    main()
