"""What an evaluation costs: rows padded and each answer decoded from its prompt, or rows packed and targets as drafts.

SmolLM2-135M, alone and with an expert of the task, scores test rows of real task files by their losses, greedy answers
and choices, on one thread. Each batch is scored in two ways, which take turns in going first:

* padded: a pass over rows, a pass over prompts padded on the left, and a step for each token of the longest answer;
* packed: a pass over packed rows, which also verifies the targets as drafts of the answers (`evaluation/drafts.py`),
  and steps for the rows whose answers are others, from the keys and values of that pass.

A line gives the share of padding among all tokens that the model reads (an answer that has ended is padding, too), the
places that the head is asked for over tokens that are labelled or written, the share of right answers, how many answers
differ between the ways, and the CPU time of `padded` over that of `packed`.

    MODULAR_EXPERTS_DATA=DIR python benchmarks/evaluation_cost.py [--experts library/{task}]      10 minutes

Without `--experts`, the base alone is measured.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import pretrained
from measuring import Parser, output, print_machine

from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.data.batch import IGNORED, prompts_of
from modular_experts.evaluation import answer_text, batch_losses, choice_log_likelihoods, generate_tokens
from modular_experts.evaluation.drafts import choices_behind_prompts, losses_and_answers, packs_evaluation
from modular_experts.library import open_expert

TASKS = ["banking77", "blimp_pick", "clinc_banking", "clinc_work", "country_capital", "gsm8k_number", "snips_slots"]
WAYS = ("padded", "packed")


def compare(model: Any, tokenizer: Any, data: TaskMixture, new_tokens: int) -> dict[str, Any]:
    """Return what both ways cost and found over the test rows of a task."""
    if not packs_evaluation(model):
        raise SystemExit("this model does not keep packed rows apart, so there is one way to evaluate it")
    counts: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    seconds, losses = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0.0)
    current = WAYS[0]

    def read(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        counts[current]["read"] += keywords["input_ids"].numel()

    def asked(_: Any, __: Any, logits: torch.Tensor) -> None:
        counts[current]["asked"] += logits.shape[:-1].numel()

    hooks = [model.register_forward_pre_hook(read, with_kwargs=True), model.lm_head.register_forward_hook(asked)]
    rows = different = 0
    for number, batch in enumerate(data.test_dataloader()):
        answers = {}
        for current in WAYS if number % 2 else WAYS[::-1]:
            began = time.process_time()
            with torch.no_grad():
                if current == "packed":
                    (sums, _), answers[current] = losses_and_answers(model, tokenizer, batch, new_tokens)
                else:
                    answers[current] = generate_tokens(model, tokenizer, batch, new_tokens)
                    sums, _ = batch_losses(model, batch)
                if "choices" in batch:
                    likelihoods = choices_behind_prompts if current == "packed" else choice_log_likelihoods
                    likelihoods(model, batch["choices"] | {"task": ["" for _ in batch["choices"]["row"]]})
            seconds[current] += time.process_time() - began
            losses[current] += float(sums.sum())
            count = counts[current]
            labelled, tokens = int((batch["labels"] != IGNORED).sum()), int(batch["attention_mask"].sum())
            prompted, written = sum(map(len, prompts_of(batch))), sum(map(len, answers[current]))
            # A padded answer's first token comes from the pass over its prompt.
            steps = prompted + written - len(batch["task"])
            if current == "packed":
                steps = written = sum(map(_beyond, answers[current], batch["labels"]))
            count.update(needed=tokens + steps, answers=labelled + written)
            if "choices" in batch:
                choices = batch["choices"]
                compared = int((choices["labels"] != IGNORED).sum())
                needed = int(choices["attention_mask"].sum())
                if current == "packed":
                    # Each prompt is read once for all of its choices.
                    prompts = zip(choices["row"].tolist(), prompts_of(choices), strict=True)
                    needed = compared + sum(map(len, dict(prompts).values()))
                count.update(needed=needed, answers=compared)
            texts = [answer_text(tokenizer, row, end) for row, end in zip(answers[current], batch["end"], strict=True)]
            count["right"] += sum(text == target.strip() for text, target in zip(texts, batch["target"], strict=True))
        rows += len(batch["task"])
        different += sum(one != other for one, other in zip(*answers.values(), strict=True))
    for hook in hooks:
        hook.remove()
    return {
        "rows": rows,
        "padding": {way: 1 - count["needed"] / count["read"] for way, count in counts.items()},
        "head": {way: count["asked"] / count["answers"] for way, count in counts.items()},
        "right": {way: count["right"] / rows for way, count in counts.items()},
        "different": different,
        "losses_apart": abs(losses["packed"] / losses["padded"] - 1),
        "padded_over_packed": seconds["padded"] / seconds["packed"],
        "seconds": seconds,
    }


def _beyond(answer: list[int], labels: torch.Tensor) -> int:
    """Return how many tokens of an answer come after its first that is not the target's, which the draft gives, too."""
    target = labels[labels != IGNORED].tolist()
    pairs = enumerate(zip(answer, target, strict=False))
    agreed = next((place for place, (token, wanted) in pairs if token != wanted), len(target) - 1)
    return max(0, len(answer) - agreed - 1)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give a row for each task, of the base alone and with the task's expert."""
    model, tokenizer = pretrained(options.model, options.quick, options.dtype)
    model.eval()
    for task in options.tasks:
        data = TaskMixture([str(Path(options.data) / f"{task}.jsonl")], tokenizer, eval_limit=options.rows, seed=0)
        data.setup("test")
        experts = [open_expert(options.experts.format(task=task))] if options.experts else []
        for chosen in ([], experts) if experts else ([],):
            with applied(model, chosen, check=False):
                found = compare(model, tokenizer, data, 4 if options.quick else options.new_tokens)
            yield {"task": task, "expert": bool(chosen)} | found


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model: the speeds mean nothing")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names of task files")
    parser.add_argument("--experts", help="path of a task's expert, such as library/{task}")
    parser.add_argument("--rows", type=int, default=64, help="the most test rows of a task")
    parser.add_argument("--new-tokens", type=int, default=16, help="the most tokens of an answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / ".cache" / "smollm2"))
    parser.add_argument("--data", default=os.environ.get("MODULAR_EXPERTS_DATA", "."))
    options = parser.parse_args()
    torch.set_num_threads(1)
    output(options, {"rows": list(measure(options))}, show)


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print_machine(report)
    print("\n| task | rows | padding: padded | packed | head: padded | packed | right: padded | packed ", end="")
    print("| answers differ | losses apart | CPU, padded over packed |\n" + "|---" * 11 + "|")
    for row in report["rows"]:
        cells = [row["task"] + ", expert" * row["expert"], str(row["rows"])]
        for name, form in (("padding", "{:.1%}"), ("head", "{:.2f}"), ("right", "{:.1%}")):
            cells += [form.format(row[name][way]) for way in WAYS]
        cells += [str(row["different"]), f"{row['losses_apart']:.0e}", f"{row['padded_over_packed']:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
