"""Run the quickstart: train a small base, and do the study of `quickstart.yaml` on it.

The base is a Llama that learns the tasks of the suite mostly in another format. Its training stops at a target: after a
fixed number of steps, bases of different seeds differ so much that their merges cannot be compared.
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modular_experts.base.device import cores
from modular_experts.base.files import quiet_transformers
from modular_experts.data import Batch, Equal, Task, TaskMixture
from modular_experts.data.suite import HELD_IN, HELD_OUT, WordTask
from modular_experts.evaluation import batch_losses, greedy_matches, measure
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import Facts, Record
from modular_experts.study import Study, read_study, run_study
from modular_experts.study.processes import MOST_PROCESSES, LocalProcesses
from modular_experts.study.run import PIECES, State, claim
from modular_experts.training.estimate import SILENT, logging_from

STUDY = Path(__file__).with_name("quickstart.yaml")
FACTS = "training.json"  # how the base was trained; it lies beside the weights
CHATTY_SHARE = 0.7
BATCH_SIZE = 64
VALIDATION_BATCH = 512
TEST_BATCH = 448
CHATTY_TOKENS = 20  # more than any answer in the base's format has
LEARNING_RATE = 3e-3
WARMUP = 50
CHECK_EVERY = 50  # steps between two validations
USUAL_STEPS = 600  # those that seed 0 needs to meet its target


@dataclass(frozen=True)
class Sizes:
    """The sizes of the base and of its training; the defaults make the quickstart, and smaller ones a test of it."""

    width: int = 96  # feed-forward layers are three times as wide
    rows: int = 1000  # training rows of each task in each of the two formats
    target: float = 0.6  # share of right validation words at which the learning rate begins to fall
    limit: int = 2500  # the most steps before that
    decay: int = 250  # steps until the learning rate is zero
    validation: int = 16  # words of each task
    test: int = 48


@dataclass(frozen=True)
class SmallBase:
    """The base of a quickstart: its seed, and the tasks that it learns."""

    seed: int
    held_in: tuple[type[WordTask], ...]
    sizes: Sizes = Sizes()

    @property
    def tasks(self) -> tuple[type[WordTask], ...]:
        return (*self.held_in, *HELD_OUT)

    @property
    def settings(self) -> Record:
        """All that the weights depend on, as JSON holds it."""
        return {"seed": self.seed, "tasks": len(self.held_in), **asdict(self.sizes)}


def description(seed: int = 0, tasks: int = len(HELD_IN)) -> Record:
    """Return the quickstart's study as `read_study` takes it, in which the first `tasks` held-in tasks get experts."""
    if not 2 <= tasks <= len(HELD_IN):
        raise ValueError(f"tasks={tasks} must be from 2 to {len(HELD_IN)}; a merge needs two experts")
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    study["seeds"] = [seed]
    for task in [*study["tasks"]["held_in"], *study["tasks"]["held_out"]]:
        task["source"]["init_args"]["seed"] = seed
    study["tasks"]["held_in"] = study["tasks"]["held_in"][:tasks]
    study["counts"] = [count for count in study["counts"] if count == "all" or count < tasks]
    study["multitask"]["steps"] = max(1, study["multitask"]["steps"] * tasks // len(HELD_IN))
    return study


def small_base(study: Facts, sizes: Sizes = Sizes()) -> SmallBase:
    """Return the base on which a description from `description` runs."""
    return SmallBase(study["seeds"][0], HELD_IN[: len(study["tasks"]["held_in"])], sizes)


def prepare_base(base: SmallBase, out: Path, progress: Callable[[float], object] = lambda share: None) -> Path:
    """Train the base in the directory `out`, unless it is there; `progress` takes the share that is done."""
    claim(out)
    place = out / "base"
    _check_same(base, place)
    # A study takes a directory that holds a base only if this file is there.
    (out / PIECES).touch()
    if not (place / FACTS).exists():
        # Lightning's advice is about a trainer this small.
        with logging_from(logging.ERROR, "lightning.pytorch"), warnings.catch_warnings(action="ignore"):
            make_base(base, place, progress)
    return place


def run_quickstart(
    study: Facts,
    out: Path,
    sizes: Sizes = Sizes(),
    progress: Callable[[State, int | None], None] = lambda state, processes: None,
) -> tuple[Study, State]:
    """Do the remaining work of a quickstart in the directory `out`; `progress` is as for `run_study`.

    Args:
        study: What `description` returns.
        out: The directory, which then holds the base and all that a study makes.
        sizes: The sizes of the base, if it is still to be trained.
        progress: Called after each piece of the study.

    Raises:
        FileExistsError: `out` holds other things.
        ValueError: `out` holds a quickstart of other settings.
    """
    out = out.absolute()
    base = prepare_base(small_base(study, sizes), out)
    checked = read_study(**{**study, "base": str(base)})
    # On GPUs the numbers would be others.
    without_gpus = ["" for _ in range(min(cores(), MOST_PROCESSES))]
    with LocalProcesses(devices=without_gpus) as processes:
        return checked, run_study(checked, out, retry=True, executor=processes, progress=progress)


def make_base(base: SmallBase, directory: Path, progress: Callable[[float], object] = lambda share: None) -> None:
    """Train the base and write it to `directory`, whole or not at all.

    Each validation calls `progress` with an estimate of the share that is done.
    """
    check_target(directory, overwrite=True, marker=FACTS)
    seed_everything(base.seed, verbose=False)
    # Two threads gain a quarter on idle cores, and lose a factor of twenty where one of the cores is busy.
    torch.set_num_threads(1)
    sizes = base.sizes
    tokenizer = make_tokenizer(base.tasks)
    module = BaseTraining(make_model(sizes.width, tokenizer), sizes, progress)
    trainer = Trainer(
        max_epochs=-1,
        max_steps=sizes.limit + sizes.decay,
        check_val_every_n_epoch=None,
        val_check_interval=min(CHECK_EVERY, sizes.limit),
        num_sanity_val_steps=0,
        accelerator="cpu",
        gradient_clip_val=1.0,
        **SILENT,
    )
    trainer.fit(module, _training_rows(base, tokenizer))
    # Test the base on the words of the experts in its chatty format, which shows the skill that it has.
    chatty = [
        Task(task.name(), source=task(base.seed, validation=sizes.validation, test=sizes.test, chatty=True))
        for task in base.held_in
    ]
    data = TaskMixture(chatty, tokenizer, eval_batch_size=TEST_BATCH)
    data.setup("test")
    scores = measure(module.model, tokenizer, data.test_dataloader(), data.roles, CHATTY_TOKENS)
    facts = {
        "settings": base.settings,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "steps": module.global_step,
        "target_reached": module.best >= sizes.target,
        "latent": {"held_in": scores["held_in"]},
    }
    with new_directory(directory, overwrite=True, marker=FACTS) as temporary, quiet_transformers():
        module.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def make_model(width: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
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


def make_tokenizer(tasks: Sequence[type[WordTask]]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer in which each word of the tasks is one token, and other text is spelt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than there are words, so every word becomes a token
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = [row for task in tasks for row in task(train=40, validation=0, test=0).rows()]
    tokenizer.train_from_iterator([f"{row['input']} {row['target']} , {row['target']}" for row in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


class BaseTraining(LightningModule):
    """Train a whole model until it answers enough validation words, then let the learning rate fall to zero."""

    def __init__(self, model: LlamaForCausalLM, sizes: Sizes, progress: Callable[[float], object]) -> None:
        super().__init__()
        self.model = model
        self.sizes = sizes
        self.progress = progress
        self.reached: int | None = None  # the step at which the target was met or given up
        self.best = 0.0
        self._right = self._rows = 0

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = AdamW(self.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._rate), "interval": "step"},
        }

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        sums, counts = batch_losses(self.model, batch)
        return sums.sum() / counts.sum()

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        if self.reached is not None and self.global_step >= self.reached + self.sizes.decay:
            self.trainer.should_stop = True

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        matches = greedy_matches(self.model, batch)
        self._right += int(matches.sum())
        self._rows += len(matches)

    def on_validation_epoch_end(self) -> None:
        share = self._right / self._rows
        self._right = self._rows = 0
        self.best = max(self.best, share)
        if self.reached is None and (share >= self.sizes.target or self.global_step >= self.sizes.limit):
            self.reached = self.global_step
        # Before the target is met, nobody knows when it will be.
        turn = self.reached or max(USUAL_STEPS, self.global_step)
        self.progress(min(1.0, self.global_step / (turn + self.sizes.decay)))

    def _rate(self, step: int) -> float:
        warmth = min(1.0, (step + 1) / WARMUP)
        if self.reached is None:
            return warmth
        return warmth * max(0.0, 1.0 - (step - self.reached) / self.sizes.decay)


def _training_rows(base: SmallBase, tokenizer: PreTrainedTokenizerFast) -> TaskMixture:
    """Return words in both formats, which no expert reads; validation words are chatty, which shows the skill."""
    sizes = base.sizes
    rows: list[Task] = []
    for task in base.tasks:
        chatty = task(~base.seed, train=sizes.rows, validation=sizes.validation, test=0, chatty=True)
        plain = task(~base.seed, train=sizes.rows, validation=0, test=0)
        rows.append(Task(f"{task.name()}-chatty", source=chatty, weight=CHATTY_SHARE))
        rows.append(Task(task.name(), source=plain, weight=1 - CHATTY_SHARE))
    return TaskMixture(rows, tokenizer, BATCH_SIZE, VALIDATION_BATCH, mixing=Equal(), seed=base.seed, packing=False)


def _check_same(base: SmallBase, place: Path) -> None:
    """Raise ValueError if another base is at a place."""
    if not place.exists():
        return
    with suppress(OSError, ValueError, KeyError):
        if json.loads((place / FACTS).read_text(encoding="utf-8"))["settings"] == base.settings:
            return
    raise ValueError(
        f"{place.parent} holds a quickstart of other settings, such as another seed, or of an older version; give "
        "another `out=`, or remove the directory"
    )
