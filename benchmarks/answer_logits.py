"""What it saves to make logits for the answers only, and to ask for them place by place.

A Llama of 135 million parameters with random weights and LoRA on its projections takes training steps, and forward
passes without gradients, on 16 rows of 32 tokens of which the last 4 to 8 are the answer. The logits come in three
ways, in turn, in an order drawn anew for each round, on one thread; the numbers are ratios of medians of CPU time:

* whole: `model(..., labels=...)`, the loss of transformers, over the whole vocabulary at every place;
* slice: `logits_to_keep` as a number, so that the head gets a slice of the hidden states;
* places: `evaluation.answer_logits`, which names the places.

    python benchmarks/answer_logits.py [--json] [--quick]      3 minutes; --quick: in small, to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from contenders import language_model
from step_report import machine
from torch import Tensor, nn

from modular_experts.data.batch import IGNORED, Batch
from modular_experts.evaluation import batch_losses, row_losses
from modular_experts.experts import LoRAExpert
from modular_experts.injection import inject

ROWS, LENGTH, ANSWER = 16, 32, 8
DTYPES = [torch.float32, torch.bfloat16]


def whole(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, use_cache=False).loss


def by_slice(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    kept = LENGTH - int((labels != IGNORED).int().argmax(1).min()) + 1
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    sums, counts = row_losses(logits[:, :-1], labels[:, 1 - kept :])
    return sums.sum() / counts.sum()


def by_places(model: nn.Module, batch: Batch) -> Tensor:
    sums, counts = batch_losses(model, batch)
    return sums.sum() / counts.sum()


WAYS: dict[str, Callable[[nn.Module, Batch], Tensor]] = {"whole": whole, "slice": by_slice, "places": by_places}


def make_batch(vocabulary: int) -> Batch:
    """Return rows of random tokens; row k has an answer of `ANSWER - k % 5` tokens."""
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    starts = LENGTH - ANSWER + torch.arange(ROWS)[:, None] % 5
    labels = ids.masked_fill(torch.arange(LENGTH) < starts, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def compare(dtype: torch.dtype, train: bool, rounds: int, quick: bool) -> dict[str, Any]:
    """Return the time of each way over that of `places`, and the largest difference of their losses."""
    model = language_model(quick).base
    inject(model, lambda weight: LoRAExpert(weight, rank=16), r".*_proj")
    model.to(dtype)
    batch, seconds, losses = make_batch(model.config.vocab_size), {name: [] for name in WAYS}, {}
    order = list(WAYS)
    for _ in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            gc.collect()
            start = time.process_time()
            with nullcontext() if train else torch.no_grad():
                loss = WAYS[name](model, batch)
                if train:
                    loss.backward()
            seconds[name].append(time.process_time() - start)
            losses[name] = loss.item()
            model.zero_grad()
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    apart = max(abs(loss / losses["places"] - 1) for loss in losses.values())
    kind = {"dtype": str(dtype).removeprefix("torch."), "work": "training step" if train else "forward"}
    return kind | {name: median[name] / median["places"] for name in WAYS} | {"losses_apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model: the numbers mean nothing")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    rounds = 1 if options.quick else options.repeats
    rows = [compare(dtype, train, rounds, options.quick) for dtype in DTYPES for train in (True, False)]
    if options.json:
        print(json.dumps({"machine": machine(), "quick": options.quick, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print("CPU time over that of places\n\n| | whole | slice | places | losses apart |\n|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[name]:.2f}" for name in WAYS]
        print(f"| {row['dtype']}, {row['work']} | {' | '.join(cells)} | {row['losses_apart']:.0e} |")


if __name__ == "__main__":
    main()
