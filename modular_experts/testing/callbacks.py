"""Check that a callback, built-in or your own, belongs to one fit at a time: `check_callback(MyCallback)`."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modular_experts.base.files import quiet_transformers
from modular_experts.data import TaskMixture
from modular_experts.experts import Expert, SparseExpert
from modular_experts.selection.schedule import Schedule
from modular_experts.training.estimate import SILENT, logging_from
from modular_experts.training.module import ExpertModule

_STEPS = 5
_SAVED = 3
_SEED = 0

Facts = dict[str, Any]
"""Things that must be equal after two fits, by their names."""


def check_callback(
    make: Callable[[], Callback],
    expert: Callable[[Tensor], Expert] = SparseExpert,
    result: Callable[[Any], object] | None = None,
    base: str | Path | None = None,
) -> None:
    """Check that a callback of `ExpertModule`, such as a `Schedule`, keeps its state within a fit.

    The battery trains experts in all linear layers for five steps, with a validation after each; the last step goes
    back, so that the fourth is the best. Losses, trained tensors, and the shares and costs of a schedule (but times and
    sizes in bytes) must be equal:

    - One object in two fits acts as two fresh objects: `setup` forgets the fit before.
    - It draws by the seed of its own fit, whichever seed the process had when it was made.
    - A run that is resumed after its third step, with a fresh object or a used one, ends as if nothing had been:
      `state_dict` holds all that `load_state_dict` needs, and neither reads what only an earlier fit left.
    - A second fit of a module begins with all that the first one trained.

    Args:
        make: Makes a callback with the same settings at each call.
        expert: The expert type that is trained, as the argument `expert` of `ExpertModule`.
        result: Called with a callback after its fit; returns anything else that must be equal.
        base: Directory of a base, for callbacks whose settings belong to one; a small random Llama if not given.

    Raises:
        AssertionError: The callback breaks a promise; the message names it.
    """
    silent = logging_from(logging.ERROR, "lightning.pytorch")
    seed = patch.dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), silent, isolate_rng(), seed:
        # Lightning warns of folders that are not empty, and of loaders without workers.
        warnings.simplefilter("ignore")
        seed_everything(_SEED, verbose=False)
        _check(_Case(make, expert, result, Path(folder), base))


def _check(case: "_Case") -> None:
    used = case.make()
    first, whole = case.fit(used)
    _compare(case.fit(used)[1], whole, "a callback in two fits must act as two fresh ones")
    seed_everything(_SEED + 1, verbose=False)
    early = case.make()
    _compare(case.fit(early)[1], whole, "a callback must draw by the seed of its fit, not by the one when it was made")
    saved = case.folder / "saved" / f"step={_SAVED}.ckpt"
    later = dict(whole)
    for part, facts in whole.items():
        if isinstance(facts, dict):  # by steps, of which those after the checkpoint count, or by names
            later[part] = {key: fact for key, fact in facts.items() if not isinstance(key, int) or key > _SAVED}
    for callback, which in ((case.make(), "fresh"), (used, "used")):
        _, rest = case.fit(callback, resume=saved)
        _compare(rest, later, f"a run that a {which} callback resumes must end as if it had not been interrupted")
    again = case.fit(used, first, rate=0.0)[1]["validation losses"]
    before = whole["validation losses"][max(whole["validation losses"])]
    after = again[max(again)]
    assert abs(after - before) < 1e-5, (
        "a second fit must begin with all that the first one trained; at a rate of zero, the validation loss goes from "
        f"{before:.6f} to {after:.6f}"
    )


@dataclass
class _Case:
    make: Callable[[], Callback]
    expert: Callable[[Tensor], Expert]
    result: Callable[[Any], object] | None
    folder: Path
    base: str | Path | None

    def __post_init__(self) -> None:
        self.tasks = self.folder / "rows.jsonl"
        if self.base is None:
            self.base = self.folder / "base"
            _write_base(self.base)
        rows = [
            {"input": f"{n} + 7 =", "target": str(n + 7), "split": "validation" if n % 6 == 5 else "train"}
            for n in range(24)
        ]
        self.tasks.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def fit(
        self, callback: Callback, module: ExpertModule | None = None, rate: float = 2e-2, resume: Path | None = None
    ) -> tuple[ExpertModule, Facts]:
        """Train a fresh module or go on with one; return it and all that must be equal."""
        seed_everything(_SEED, verbose=False)
        # What is drawn at random before the checkpoint is loaded must not matter.
        torch.manual_seed(1 if resume else 0)
        module = module or ExpertModule(str(self.base), "all-linear", self.expert)
        module.optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)
        module.scheduler = lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 if step < _STEPS - 1 else -1.0)
        watch = _Watch()
        saving = ModelCheckpoint(self.folder / "saved", "{step}", save_top_k=-1, every_n_train_steps=_SAVED)
        trainer = Trainer(
            max_steps=_STEPS if rate else 1,
            accelerator="cpu",
            devices=1,
            default_root_dir=self.folder,
            callbacks=[callback, watch, saving] if resume is None else [callback, watch],
            **SILENT | {"enable_checkpointing": resume is None},
        )
        data = TaskMixture({"name": "battery", "path": str(self.tasks)}, batch_size=4, tokenizer=str(self.base), seed=0)
        trainer.fit(module, data, ckpt_path=resume)
        facts: Facts = {"losses": watch.losses, "validation losses": watch.validations}
        facts["trained tensors"] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if isinstance(callback, Schedule):
            costs = callback.costs(trainer, module)
            facts["shares"] = sorted(callback.shares(module).items())
            facts["costs"] = sorted(item for item in costs.items() if not item[0].endswith(("_seconds", "_bytes")))
        if self.result is not None:
            facts["results"] = self.result(callback)
        return module, facts


class _Watch(Callback):
    """Keeps the loss of each step and of each validation, by the number of steps."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.validations: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        self.losses[trainer.global_step] = outputs["loss"].item()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations[trainer.global_step] = float(trainer.callback_metrics["val_loss"])


def _compare(facts: Facts, wanted: Facts, promise: str) -> None:
    for part, value in wanted.items():
        other = facts[part]
        if part == "trained tensors":
            nothing = torch.empty(0)
            pairs = {name: (value.get(name, nothing), other.get(name, nothing)) for name in value.keys() | other.keys()}
            unlike = [name for name, pair in pairs.items() if not torch.equal(*pair)]
            assert not unlike, f"{promise}; {len(unlike)} of {len(value)} trained tensors differ, as {min(unlike)}"
        else:
            assert other == value, f"{promise}; the {part} are {other} instead of {value}"


def _write_base(folder: Path) -> None:
    tokens = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=characters, **special).save_pretrained(folder)
