"""What a training step costs whose experts act on answers alone, beside ordinary experts and PEFT's LoRA.

A Llama of 135 million parameters with random weights takes steps on 8 rows: forward, backward, AdamW. Prompts have 20
or 200 tokens in the mean, answers 4 or 17, each up to a quarter more or less. PEFT's LoRA (rank 16, all linear layers)
and ours see the same rows. PEFT pads them and computes the logits of all places, as `Trainer` does. Ours come as `fit`
gives them: ordinary ones packed, those of answers padded. The ways take turns, on one thread; the numbers are ratios of
medians of CPU time, and of the most memory of a process that takes two steps in one way.

    python benchmarks/answer_step.py [--json] [--quick]      15 minutes; --quick: in small, to see that it runs
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from contenders import PROJECTIONS, language_model
from measuring import Parser, goal, high_water, in_own_process, medians, output, print_goals, print_machine, print_table

from modular_experts import LoRAExpert, SparseExpert, inject
from modular_experts.data.batch import Batch, Collator, Example, Tokens, repacked
from modular_experts.evaluation import batch_losses
from modular_experts.injection.answer_only import AnswerOnly

SHAPES = {"20 / 4": (20, 4), "20 / 17": (20, 17), "200 / 4": (200, 4)}
"""Tokens of prompt and answer, in the mean, by the name of the row."""
KINDS: dict[str, Any] = {
    "LoRA": partial(LoRAExpert, rank=16, alpha=32),
    "entries": partial(SparseExpert, keep_ratio=0.05),
}
WAYS = {"peft": "LoRA, PEFT", "LoRA": "LoRA", "LoRA of answers": "LoRA of answers"}
WAYS |= {"entries": "entries", "entries of answers": "entries of answers"}


def rows(prompt: int, answer: int, vocabulary: int) -> Batch:
    """Return a padded batch of 8 rows with tokens at random."""
    drawn = random.Random(0)
    examples = []
    for _ in range(8):
        before, behind = (round(length * drawn.uniform(0.75, 1.25)) for length in (prompt, answer))
        ids = torch.tensor([drawn.randrange(vocabulary) for _ in range(before + behind)])
        examples.append(Example("task", "", None, Tokens(ids, before)))
    return Collator(0, texts=False)(examples)


def step_of(way: str, base: Any, batch: Batch, alone: bool = False) -> Callable[[], None]:
    """Return a training step in a way, on the base if it is `alone` in its process, and else on a copy.

    Copies share the weights that stay as they are.
    """
    torch.manual_seed(0)
    kind, _, answers = way.partition(" of ")
    shared = {id(parameter): parameter for parameter in base.parameters()}
    # Entries write into the weights.
    model = base if alone else copy.deepcopy(base, {} if kind == "entries" else shared)
    if way == "peft":
        settings = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=PROJECTIONS)
        model = peft.get_peft_model(model, settings)
    else:
        inject(model, KINDS[kind], "all-linear")
        if answers:
            AnswerOnly(model)
        else:
            batch = repacked(batch)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        if way == "peft":
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            loss = model(**inputs, use_cache=False).loss
        else:
            sums, counts = batch_losses(model, batch)
            loss = sums.sum() / counts.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return a row of ratios for each shape, in time and in memory."""
    base: Any = language_model(options.quick).base
    found: dict[str, Any] = {"time": [], "memory": []}
    for name in list(SHAPES)[-1:] if options.quick else SHAPES:
        prompt, answer = SHAPES[name]
        batch = rows(prompt, answer, base.config.vocab_size)
        seconds = medians({way: step_of(way, base, batch) for way in WAYS}, 2 if options.quick else 7)
        found["time"].append({"shape": name} | {way: seconds[way] / seconds["peft"] for way in WAYS})
        quick = ["--quick"] if options.quick else []
        most = {way: in_own_process(__file__, "--memory", way, "--shape", name, *quick) for way in WAYS}
        found["memory"].append({"shape": name} | {way: most[way] / most["peft"] for way in WAYS})
    long = found["time"][-1]
    found["goals"] = [
        goal("a step at prompts of 200 tokens, LoRA of answers over PEFT's LoRA", long["LoRA of answers"], 0.3),
        goal("a step at prompts of 200 tokens, entries of answers over PEFT's LoRA", long["entries of answers"], 0.3),
        goal("memory there, LoRA of answers over PEFT's LoRA", found["memory"][-1]["LoRA of answers"], 0.7),
    ]
    return found


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    print_machine(report)
    print_table("CPU of a step over PEFT's, by tokens of prompt / answer", report["time"], WAYS)
    print_table("Memory of a process over PEFT's, base and imports among it", report["memory"], WAYS)
    print_goals(report["goals"])


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model, one length, two rounds: the numbers mean nothing")
    parser.add_argument("--memory", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        base: Any = language_model(options.quick).base
        step = step_of(options.memory, base, rows(*SHAPES[options.shape], base.config.vocab_size), True)
        step()
        step()
        print(json.dumps(high_water()))
    else:
        output(options, compare(options), show)


if __name__ == "__main__":
    main()
