"""What it saves to make the logits of answers alone, and to ask for them place by place.

A Llama of 135 million parameters with random weights and LoRA on its projections takes training steps, and forward
passes without gradients, on 16 rows of 32 tokens of which the last 4 to 8 are the answer. The logits come in three
ways, in turn, in an order drawn anew for each round, on one thread; the numbers are ratios of medians of CPU time:

* whole: `model(..., labels=...)`, the loss of transformers, over the whole vocabulary at every place;
* slice: `logits_to_keep` as a number, so that the head gets a slice of the hidden states;
* places: `evaluation.answer_logits`, which gathers the hidden states of labelled places for the head.

Generation of 8 tokens after 24 is transformers' own (a slice, too) beside `evaluation.generate_texts`. Then one layer
of that model takes a training step on 4 rows of 512 labelled tokens, in a process of its own, with all logits at once
and in parts (`likelihood.HEAD_BYTES`): CPU time, and growth of memory, over those of all at once.

    python benchmarks/answer_logits.py [--json] [--quick]      5 minutes; --quick: in small, to see that it runs
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from contenders import language_model
from measuring import Parser, high_water, in_own_process, medians, output, print_machine
from torch import Tensor, nn
from transformers import GenerationConfig

from modular_experts.data.batch import IGNORED, Batch
from modular_experts.evaluation import batch_losses, likelihood
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


def over_places(median: dict[str, float]) -> dict[str, float]:
    return {name: seconds / median["places"] for name, seconds in median.items()}


def compare(dtype: torch.dtype, rounds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Give a row of ratios for each work, with the largest difference of the losses."""
    model: Any = language_model(quick).base
    inject(model, lambda weight: LoRAExpert(weight, rank=16), r".*_proj")
    model.to(dtype)
    batch, kind = make_batch(model.config.vocab_size), {"dtype": str(dtype).removeprefix("torch.")}
    for name, work in {"training step": train, "forward": look}.items():
        calls = {way: partial(work, call, model, batch) for way, call in WAYS.items()}
        ratios, losses = over_places(medians(calls, rounds)), [call() for call in calls.values()]
        apart = max(losses) / min(losses) - 1
        yield kind | {"work": name} | ratios | {"losses_apart": apart}
    prompts = {key: batch[key][:, : LENGTH - ANSWER] for key in ("input_ids", "attention_mask")}
    settings = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=ANSWER, min_new_tokens=ANSWER, eos_token_id=0, pad_token_id=0
    )

    def write(in_one_piece: bool) -> Tensor:
        with evaluating(model, settings) if in_one_piece else nullcontext():
            return model.eval().generate(**prompts, generation_config=settings)

    written = medians({"slice": partial(write, False), "places": partial(write, True)}, rounds)
    yield kind | {"work": "generation"} | over_places(written)


def large_step(dtype: str, limit: str, quick: bool = True) -> dict[str, float]:
    """Return CPU seconds, growth of memory and loss of a step on many labelled tokens; `limit` is `HEAD_BYTES`."""
    model: Any = language_model(quick).base
    del model.model.layers[1:]
    inject(model, lambda weight: LoRAExpert(weight, rank=16), r".*_proj")
    model.to(getattr(torch, dtype))
    ids = torch.randint(model.config.vocab_size, (4, 513), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with patch.object(likelihood, "HEAD_BYTES", int(limit)):
        before, start = high_water(), time.process_time()
        loss = train(by_places, model, batch)
    return {"seconds": time.process_time() - start, "memory": high_water() - before, "loss": loss}


def in_parts(dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """Return a row for the step on many labelled tokens."""
    kind = str(dtype).removeprefix("torch.")
    limits = {"whole": 2**62, "parts": 0 if quick else likelihood.HEAD_BYTES}
    step = large_step if quick else partial(in_own_process, __file__, "--step")
    found = {way: step(kind, str(limit)) for way, limit in limits.items()}
    over = {name: found["parts"][name] / max(found["whole"][name], 1) for name in ("seconds", "memory")}
    apart = abs(found["parts"]["loss"] / found["whole"]["loss"] - 1)
    return {"dtype": kind, "time": over["seconds"], "memory": over["memory"], "losses_apart": apart}


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model: the numbers mean nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step:
        dtype, limit = options.step
        print(json.dumps(large_step(dtype, limit, options.quick)))
        return
    rounds = 1 if options.quick else options.repeats
    rows = [row for dtype in DTYPES for row in compare(dtype, rounds, options.quick)]
    parts = [in_parts(dtype, options.quick) for dtype in DTYPES[: 1 if options.quick else 2]]
    output(options, {"rows": rows, "parts": parts}, show)


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print_machine(report)
    print("CPU time over that of places\n\n| | whole | slice | places | losses apart |\n|---|---|---|---|---|")
    for row in report["rows"]:
        cells = [f"{row[name]:.2f}" if name in row else "" for name in WAYS]
        apart = f"{row['losses_apart']:.0e}" if "losses_apart" in row else ""
        print(f"| {row['dtype']}, {row['work']} | {' | '.join(cells)} | {apart} |")
    print("\n2048 labelled tokens in parts, over all at once\n\n| | time | memory | losses apart |\n|---|---|---|---|")
    for row in report["parts"]:
        print(f"| {row['dtype']} | {row['time']:.2f} | {row['memory']:.2f} | {row['losses_apart']:.0e} |")


if __name__ == "__main__":
    main()
