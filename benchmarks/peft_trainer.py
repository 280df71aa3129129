"""Train PEFT's LoRA with transformers' `Trainer`, and save the adapter: the peer in `time_to_quality.py`.

Rows become tokens as `TaskMixture` makes them: the input, a space, the target and end-of-sequence, with the loss on the
last two. It imports nothing of this package.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "data", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    rows = []
    for row in map(json.loads, Path(options.data).read_text(encoding="utf-8").splitlines()):
        if row["split"] == "train":
            prompt = tokenizer(row["input"], add_special_tokens=False)["input_ids"]
            target = tokenizer(" " + row["target"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in batch)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in batch])

        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in batch]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }

    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    settings = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(model, settings)
    trainer = Trainer(
        adapted,
        TrainingArguments(
            output_dir=options.out or "runs",
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=options.rate,
            lr_scheduler_type="linear",
            # As many steps of warm-up as `WarmupLinear` takes.
            warmup_steps=-(-6 * options.steps // 100),
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            seed=options.seed,
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
    if options.out:
        adapted.save_pretrained(options.out)


# Nothing imports this file, and `make bench` runs those that ask for their own name.
main()
