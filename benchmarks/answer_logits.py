"""What it saves to make the logits of answers alone, and to ask for them place by place.

A Llama of 135 million parameters with random weights and LoRA on its projections takes training steps, and forward
passes without gradients, on 16 rows of 32 tokens of which the last 4 to 8 are the answer. The logits come in three
ways, in turn, in an order drawn anew for each round, on one thread; the numbers are ratios of medians of CPU time:

* whole: `model(..., labels=...)`, the loss of transformers, over the whole vocabulary at every place;
* slice: `logits_to_keep` as a number, so that the head gets a slice of the hidden states;
* places: `evaluation.answer_logits`, which gathers the hidden states of labelled places for the head.

Generation of 8 tokens after 24 is transformers' own (a slice, too) beside `evaluation.generate`.

    python benchmarks/answer_logits.py [--json] [--quick]      5 minutes; --quick: in small, to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from contenders import language_model
from step_report import machine
from torch import Tensor, nn
from transformers import GenerationConfig

from modular_experts.data.batch import IGNORED, Batch
from modular_experts.evaluation import batch_losses
from modular_experts.evaluation.generation import evaluating
from modular_experts.experts import LoRAExpert
from modular_experts.injection import inject

Way = Callable[[nn.Module, Batch], Tensor]
ROWS, LENGTH, ANSWER = 16, 32, 8
DTYPES = [torch.float32, torch.bfloat16]


def whole(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, use_cache=False).loss


def by_slice(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    kept = LENGTH - int((labels != IGNORED).int().argmax(1).min()) + 1
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1 - kept :].flatten())


def by_places(model: nn.Module, batch: Batch) -> Tensor:
    sums, counts = batch_losses(model, batch)
    return sums.sum() / counts.sum()


WAYS: dict[str, Way] = {"whole": whole, "slice": by_slice, "places": by_places}


def make_batch(vocabulary: int) -> Batch:
    """Return rows of random tokens; row k has an answer of `ANSWER - k % 5` tokens."""
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    starts = LENGTH - ANSWER + torch.arange(ROWS)[:, None] % 5
    labels = ids.masked_fill(torch.arange(LENGTH) < starts, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(way: Way, model: nn.Module, batch: Batch) -> float:
    loss = way(model, batch)
    loss.backward()
    model.zero_grad()
    return loss.item()


@torch.no_grad()
def look(way: Way, model: nn.Module, batch: Batch) -> float:
    return way(model, batch).item()


def race(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median time of each call over that of `places`, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, found = list(calls), {}
    for _ in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            gc.collect()
            start = time.process_time()
            found[name] = calls[name]()
            seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {name: median[name] / median["places"] for name in calls}, found


def compare(dtype: torch.dtype, rounds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Give a row of ratios for each work, with the largest difference of the losses."""
    model: Any = language_model(quick).base
    inject(model, lambda weight: LoRAExpert(weight, rank=16), r".*_proj")
    model.to(dtype)
    batch, kind = make_batch(model.config.vocab_size), {"dtype": str(dtype).removeprefix("torch.")}
    for name, work in {"training step": train, "forward": look}.items():
        ratios, losses = race({way: partial(work, call, model, batch) for way, call in WAYS.items()}, rounds)
        apart = max(abs(loss / losses["places"] - 1) for loss in losses.values())
        yield kind | {"work": name} | ratios | {"losses_apart": apart}
    prompts = {key: batch[key][:, : LENGTH - ANSWER] for key in ("input_ids", "attention_mask")}
    settings = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=ANSWER, min_new_tokens=ANSWER, eos_token_id=0, pad_token_id=0
    )

    def write(in_one_piece: bool) -> Tensor:
        with evaluating(model, settings) if in_one_piece else nullcontext():
            return model.eval().generate(**prompts, generation_config=settings)

    ratios, _ = race({"slice": partial(write, False), "places": partial(write, True)}, rounds)
    yield kind | {"work": "generation"} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model: the numbers mean nothing")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    rounds = 1 if options.quick else options.repeats
    rows = [row for dtype in DTYPES for row in compare(dtype, rounds, options.quick)]
    report = {"machine": machine(), "quick": options.quick, "rows": rows}
    if options.json:
        print(json.dumps(report))
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print("CPU time over that of places\n\n| | whole | slice | places | losses apart |\n|---|---|---|---|---|")
    for row in report["rows"]:
        cells = [f"{row[name]:.2f}" if name in row else "" for name in WAYS]
        apart = f"{row['losses_apart']:.0e}" if "losses_apart" in row else ""
        print(f"| {row['dtype']}, {row['work']} | {' | '.join(cells)} | {apart} |")


if __name__ == "__main__":
    main()
