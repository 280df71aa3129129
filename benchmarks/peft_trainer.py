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
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

IGNORED = -100


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
            ids, labels = prompt + target, [IGNORED] * len(prompt) + target
            rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        columns = {key: [torch.tensor(row[key]) for row in batch] for key in batch[0]}
        return {key: pad_sequence(rows, True, IGNORED * (key == "labels")) for key, rows in columns.items()}

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
