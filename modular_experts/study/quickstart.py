"""Run the quickstart: train its base, a small Llama that learns the tasks mostly in another format, and do its study.

The base's training stops at a target: after a fixed number of steps, bases of different seeds differ so much that their
merges cannot be compared.
"""

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modular_experts.base.device import cores
from modular_experts.base.files import quiet
from modular_experts.data import Equal, Task, TaskMixture
from modular_experts.evaluation import batch_losses, greedy_matches, measure
from modular_experts.library import check_target, new_directory
from modular_experts.study import Study, read_study, run_study
from modular_experts.study.processes import MOST_PROCESSES, LocalProcesses
from modular_experts.study.quickstart_plan import EVAL_BATCH, NEW_TOKENS, Plan
from modular_experts.study.run import PIECES, State, claim
from modular_experts.training.estimate import SILENT, logging_from

FACTS = "training.json"  # how the base was trained; it lies beside the weights
CHATTY_SHARE = 0.7
BATCH_SIZE, VALIDATION_BATCH = 64, 512
LEARNING_RATE = 3e-3
WARMUP = 50
CHECK_EVERY = 50  # steps between two validations
USUAL_STEPS = 600  # those that seed 0 needs to meet its target


def make_base(plan: Plan, directory: Path, progress: Callable[[float], object] = lambda done: None) -> None:
    """Train the base and write it to `directory`, whole or not at all.

    Each validation calls `progress` with an estimate of the share that is done.
    """
    check_target(directory, overwrite=True, marker=FACTS)
    seed_everything(plan.seed, verbose=False)
    # Two threads gain a quarter on idle cores, and lose a factor of twenty where one of the cores is busy.
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(plan)
    module = BaseTraining(make_model(plan, tokenizer), plan, progress)
    trainer = Trainer(
        max_epochs=-1,
        max_steps=plan.base_limit + plan.base_decay,
        check_val_every_n_epoch=None,
        val_check_interval=min(CHECK_EVERY, plan.base_limit),
        num_sanity_val_steps=0,
        accelerator="cpu",
        gradient_clip_val=1.0,
        **SILENT,
    )
    trainer.fit(module, _mixture(plan, tokenizer))
    # Test the base on the words of the experts in its chatty format, which shows the skill that it has.
    words = plan.words(chatty=True)
    tasks = [Task(name, source=task(**words)) for name, task in plan.held_in.items()]
    data = TaskMixture(tasks, tokenizer, eval_batch_size=EVAL_BATCH)
    data.setup("test")
    scores = measure(module.model, tokenizer, data.test_dataloader(), data.roles, 2 * NEW_TOKENS)
    facts = {
        "plan": asdict(plan),
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "steps": module.global_step,
        "target_reached": module.best >= plan.base_target,
        "latent": {"held_in": scores["held_in"]},
    }
    with new_directory(directory, overwrite=True, marker=FACTS) as temporary, quiet():
        module.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def make_model(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden,
        intermediate_size=3 * plan.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class BaseTraining(LightningModule):
    """Train a whole model until it answers enough validation words, then let the learning rate fall to zero."""

    def __init__(self, model: LlamaForCausalLM, plan: Plan, progress: Callable[[float], object]) -> None:
        super().__init__()
        self.model, self.plan, self.progress = model, plan, progress
        self.reached: int | None = None  # the step at which the target was met or given up
        self.best = 0.0
        self._right = self._rows = 0

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = {"scheduler": LambdaLR(optimizer, self._rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        sums, counts = batch_losses(self.model, batch)
        return sums.sum() / counts.sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.reached is not None and self.global_step >= self.reached + self.plan.base_decay:
            self.trainer.should_stop = True

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        matches = greedy_matches(self.model, batch)
        self._right, self._rows = self._right + int(matches.sum()), self._rows + len(matches)

    def on_validation_epoch_end(self) -> None:
        share, self._right, self._rows = self._right / self._rows, 0, 0
        self.best = max(self.best, share)
        if self.reached is None and (share >= self.plan.base_target or self.global_step >= self.plan.base_limit):
            self.reached = self.global_step
        # Before the target is met, nobody knows when it will be.
        turn = self.reached or max(USUAL_STEPS, self.global_step)
        self.progress(min(1.0, self.global_step / (turn + self.plan.base_decay)))

    def _rate(self, step: int) -> float:
        cooling = 0.0 if self.reached is None else (step - self.reached) / self.plan.base_decay
        return min(1.0, (step + 1) / WARMUP) * max(0.0, 1.0 - cooling)


def make_tokenizer(plan: Plan) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer in which each word of the suite is one token, and other text is spelt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than there are words, so every word becomes a token
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tasks = [task(train=40, validation=0, test=0) for task in {**plan.held_in, **plan.held_out}.values()]
    rows = [row for task in tasks for row in task.rows()]
    tokenizer.train_from_iterator([f"{row['input']} {row['target']} , {row['target']}" for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def _mixture(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> TaskMixture:
    tasks = []
    for name, task in {**plan.held_in, **plan.held_out}.items():
        for chatty, share in ((True, CHATTY_SHARE), (False, 1 - CHATTY_SHARE)):
            # Validation uses chatty words alone: they show the skill, and plain answers need not be good.
            words = task(
                seed=~plan.seed,  # experts have words of their own
                train=plan.base_rows,
                validation=plan.validation_rows * chatty,
                test=0,
                chatty=chatty,
            )
            tasks.append(Task(f"{name}-chatty" if chatty else name, source=words, weight=share))
    return TaskMixture(tasks, tokenizer, BATCH_SIZE, VALIDATION_BATCH, mixing=Equal(), seed=plan.seed, packing=False)


def prepare_base(plan: Plan, out: Path, progress: Callable[[float], object] = lambda share: None) -> Path:
    """Train the base of a plan in the directory `out`, unless it is there; `progress` takes the share that is done."""
    claim(out)
    base = out / "base"
    _check_plan(plan, base)
    # A study takes a directory that holds a base only if this file is there.
    (out / PIECES).touch()
    if not (base / FACTS).exists():
        # Lightning's advice is about a trainer this small.
        with logging_from(logging.ERROR, "lightning.pytorch"), warnings.catch_warnings(action="ignore"):
            make_base(plan, base, progress)
    return base


def run_plan(
    plan: Plan, out: Path, progress: Callable[[State, int | None], None] = lambda state, processes: None
) -> tuple[Study, State]:
    """Do the remaining work of a plan in the directory `out`; `progress` is as for `run_study`."""
    out = out.absolute()
    study = read_study(**plan.study(prepare_base(plan, out)))
    # Without GPUs, because on them the numbers would be others.
    with LocalProcesses(devices=[""] * min(cores(), MOST_PROCESSES)) as processes:
        return study, run_study(study, out, retry=True, executor=processes, progress=progress)


def _check_plan(plan: Plan, base: Path) -> None:
    if not base.exists():
        return
    with suppress(OSError, ValueError, KeyError):
        if json.loads((base / FACTS).read_text(encoding="utf-8"))["plan"] == json.loads(json.dumps(asdict(plan))):
            return
    raise ValueError(
        f"{base.parent} holds a quickstart of other settings, such as another seed, or of an older version; give "
        "another --out, or remove the directory"
    )
