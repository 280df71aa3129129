"""ExpertModule: a base language model with experts in it, as a LightningModule. Training, evaluation and exact resume.

It meets the data only in a batch (`data/batch.py`). Which entries are trained is the business of
`callbacks.MaskSchedule`, what is written to a library that of `callbacks.ExportExpert`. Causal language models only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from modular_experts.base import Base
from modular_experts.base.apply import apply_deltas
from modular_experts.callbacks.mask_schedule import MaskSchedule
from modular_experts.callbacks.results import WritePredictions, WriteResults
from modular_experts.callbacks.schedule import TrainingLength, schedules
from modular_experts.deltas import Delta, add
from modular_experts.evaluation import TaskScores, batch_losses, generate, score_batch
from modular_experts.experts import Expert
from modular_experts.experts.selectable import Selectable
from modular_experts.injection import expert_layers, inject, task_vector, write_experts
from modular_experts.library import StoredExpert, as_parents, open_experts
from modular_experts.training.learning_rate import LearningRateShape, WarmupLinear, training_length
from modular_experts.training.resume import collect_random_states, restore_random_states

__all__ = ["ExpertModule"]

log = logging.getLogger(__name__)

_PLAIN = (str, int, float, list, dict, type(None))  # what a checkpoint may hold of the settings


class ExpertModule(LightningModule):
    """A causal language model whose linear layers carry experts.

    Args:
        base: A model directory (config.json, safetensors weights, tokenizer), or a Hugging Face hub id.
        modules: Regular expressions; layers whose full name one matches get an expert, such as `.*\\.(q_proj|v_proj)`.
            Each must match at least one linear layer.
        expert: The expert type and its settings: `SparseExpert`, `LoRAExpert`, `FullExpert`, `MaskedExpert`, or the
            dotted path of your own.
        applied: Library experts whose deltas are added to the base before anything else, to test them or to train on
            top.
        dtype: Data type of the base; trained values are float32 beside any of them.
        revision: Branch, tag or commit of a hub id.
        gradient_checkpointing: Recompute activations in backward instead of keeping them.
        optimizer: Any torch optimizer over the trained parameters; AdamW without weight decay at the expert type's
            learning rate if none is given.
        scheduler: A shape (`WarmupLinear`, `WarmupCosine`, `Constant`) or any torch scheduler, stepped every optimizer
            step; `WarmupLinear` if none is given.
        max_new_tokens: Length limit of generated answers.
        generate_in_fit: Also generate in the validation passes of training, where otherwise only the loss is taken.
    """

    length: TrainingLength

    def __init__(
        self,
        base: str,
        modules: str | list[str] | None = None,
        expert: Callable[[Tensor], Expert] | None = None,
        applied: list[str] | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        revision: str | None = None,
        gradient_checkpointing: bool = False,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        scheduler: LearningRateShape | Callable[[Optimizer], LRScheduler] | None = None,
        max_new_tokens: int = 64,
        generate_in_fit: bool = False,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1; an answer has a token")
        self.save_hyperparameters()
        for name in [name for name, value in self.hparams.items() if not isinstance(value, _PLAIN)]:
            del self.hparams[name]  # made in Python, not by a config: it cannot be stored, and is given again
        self.base, self.modules_pattern, self.expert = base, modules, expert
        self.applied = list(applied or [])
        self.dtype_name, self.revision, self.gradient_checkpointing = dtype, revision, gradient_checkpointing
        self.optimizer, self.scheduler = optimizer, scheduler or WarmupLinear()
        self.max_new_tokens, self.generate_in_fit = max_new_tokens, generate_in_fit
        self.strict_loading = False  # checkpoints hold trained tensors only; on_load_checkpoint is strict
        self.applied_experts: list[StoredExpert] = []
        self.results: dict[str, Any] = {}
        self._random_states: list[dict[str, Any]] | None = None
        self._resized = False

    def setup(self, stage: str) -> None:
        """Refuse to train nothing, before anything is loaded.

        Raises:
            ValueError: Training has no expert to train, or an expert no place to be.
        """
        if (self.expert is None) != (not self.modules_pattern):
            given, missing = ("expert", "modules") if self.expert else ("modules", "expert")
            raise ValueError(f"model.{given} is given but not model.{missing}; training needs both, a plain test none")
        if stage == "fit" and self.expert is None:
            raise ValueError("fit trains experts, and none is configured: give model.expert and model.modules")

    def configure_model(self) -> None:
        """Load the base, add the applied experts, and inject; a second call loads nothing."""
        if not hasattr(self, "model"):
            self._load()
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit" and self.expert is not None:
            for schedule in schedules(trainer):
                schedule.before_optimizers(trainer, self)
                self._resized |= schedule.resizes

    def _load(self) -> None:
        self.applied_experts = open_experts(self.applied) if self.applied else []
        self.opened_base = Base.open(self.base, self.applied_experts, self.revision)
        self.fingerprint = self.opened_base.fingerprint
        self.tokenizer = self.opened_base.tokenizer()
        model = self.opened_base.load(self.dtype_name)
        apply_deltas(model, self.applied_experts)
        model.requires_grad_(False)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.expert is not None and self.modules_pattern:
            inject(model, self.expert, self.modules_pattern)
        self.model = model
        _leave_to_this_module(self)

    def configure_callbacks(self) -> list[Callback]:
        """Add a mask schedule and the writers of results and predictions, each unless the user lists one."""
        listed: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        defaults = [MaskSchedule.default(), WriteResults(), WritePredictions()]
        return [added for added in defaults if not any(isinstance(callback, type(added)) for callback in listed)]

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trained parameters and its schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(trained)
        else:
            rate = min(layer.expert.learning_rate for _, layer in expert_layers(self.model))
            optimizer = AdamW(trained, lr=rate, weight_decay=0.0)
        self.length = training_length(self.trainer)
        shape, total = self.scheduler, self.length.total_steps
        if isinstance(shape, LearningRateShape):
            scheduler: LRScheduler = LambdaLR(optimizer, lambda step: shape.factor(step, total))
        else:
            scheduler = shape(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Start from the same supports on every rank, and say what is trained."""
        self.model.train()
        log.info(_summary(self))
        if self.trainer.world_size > 1:
            for _, layer in expert_layers(self.model):
                for buffer in layer.expert.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Go on with the random state of the checkpoint, once, when all set-up is over."""
        if self._random_states is not None:
            restore_random_states(self._random_states)
            self._random_states = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss per target token."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["task"]))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and write the new values into the weights."""
        super().optimizer_step(*args, **kwargs)
        write_experts(self.model)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss per target token of the global batch: its average over ranks is that of one process
        with all rows.
        """
        sums, counts = batch_losses(self.model, batch)
        tokens = counts.sum()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(tokens)
            tokens = tokens / self.trainer.world_size
        return sums.sum() / tokens.clamp(min=1)

    def on_validation_epoch_start(self) -> None:
        self._start_scores()

    def on_test_epoch_start(self) -> None:
        self._start_scores()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch; within `fit` by its loss, unless `generate_in_fit`."""
        self._score(batch, generates=self.generate_in_fit or self.trainer.state.fn != "fit")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch by its loss, greedy generations and choices."""
        self._score(batch, generates=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return task, input, target and generation of each row."""
        texts = generate(self.model, self.tokenizer, batch, self.max_new_tokens)
        columns = zip(batch["task"], batch["input"], batch["target"], texts, strict=True)
        return [dict(zip(("task", "input", "target", "generation"), row, strict=True)) for row in columns]

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over tasks as `val_loss`, and each task's."""
        self._finish_scores()
        self.log_dict({f"val_loss/{name}": task["loss"] for name, task in self.results["tasks"].items()})
        losses = [task["loss"] for task in self.results["tasks"].values()]
        self.log("val_loss", sum(losses) / max(len(losses), 1), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self._finish_scores()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained tensors and the experts' buffers; the frozen base is read again from its files."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        full = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in full if key.removeprefix(prefix) not in trained and ".expert." not in key]:
            del full[key]
        return full

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["base_fingerprint"] = self.fingerprint
        checkpoint["random_states"] = collect_random_states()
        checkpoint["resized"] = self._resized

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or of other experts.

        Raises:
            ValueError: The fingerprint differs, or trained tensors are missing or have nowhere to go.
        """
        self.configure_model()
        theirs = checkpoint.get("base_fingerprint")
        if theirs != self.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on a base with fingerprint {str(theirs)[:12]}, and {self.base} has "
                f"{self.fingerprint[:12]}; give the base that it was trained on"
            )
        # Experts that no schedule resized have the sizes of their settings. Version 1 wrote no such key.
        self._resized |= checkpoint.get("resized", True)
        if self._resized:
            self._resize_like(checkpoint["state_dict"])
        ours, stored = self.state_dict(), checkpoint["state_dict"]
        unlike = sorted(key for key in ours.keys() | stored.keys() if _shape(ours.get(key)) != _shape(stored.get(key)))
        if unlike:
            raise ValueError(
                f"the checkpoint's experts are not those configured: {len(unlike)} tensors differ, the first is "
                f"{unlike[0]} with shape {_shape(stored.get(unlike[0]))} there and {_shape(ours.get(unlike[0]))} here"
            )
        self._random_states = checkpoint.get("random_states")

    def _resize_like(self, state: dict[str, Any]) -> None:
        """Let each packed expert keep as many units as its counterpart in a checkpoint."""
        for name, layer in expert_layers(self.model):
            theirs = state.get(f"model.{name.removesuffix('weight')}expert.indices")
            if isinstance(layer.expert, Selectable) and layer.expert.packed is not None and theirs is not None:
                units = torch.arange(min(theirs.numel(), layer.expert.units), device=layer.matrix.device)
                if units.numel() != layer.expert.kept_units:
                    layer.expert.resize(layer.matrix, units)

    def task_vector(self) -> Iterable[tuple[str, Delta]]:
        """Yield `(weight name, delta)` for each expert, on the CPU, one at a time."""
        for name, delta in task_vector(self.model, self._anchor):
            yield name, delta.to("cpu")

    def record_facts(self) -> dict[str, Any]:
        """Return kind, base, settings and parents of the trained experts, in plain values, for their record."""
        expert = next(expert_layers(self.model))[1].expert
        settings = {name: self.hparams.get(name) for name in ("modules", "optimizer", "scheduler", "dtype")}
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        peaks = [group.get("initial_lr", group["lr"]) for group in groups]
        return {
            "kind": type(expert).__name__,
            "base": {"id": self.base, "revision": self.revision, "fingerprint": self.fingerprint},
            "hyperparameters": settings | expert.settings() | {"learning_rate": max(peaks, default=None)},
            "parents": as_parents(self.applied_experts),
        }

    def _anchor(self, name: str) -> Tensor:
        """Return a base weight as it was before training: read again, applied experts added."""
        weight = self.opened_base.weight(name).to(getattr(torch, self.dtype_name))
        moved = [expert[name] for expert in self.applied_experts if name in expert]
        return add(moved).add_to(weight.clone()) if moved else weight

    def _start_scores(self) -> None:
        roles = getattr(getattr(self.trainer, "datamodule", None), "roles", None)
        if roles is None:
            raise ValueError(
                "scores need the tasks' roles: give the data module `roles`, a dict from task name to role"
            )
        self.scores = TaskScores(roles).to(self.device)

    def _score(self, batch: dict[str, Any], generates: bool) -> None:
        limit = self.max_new_tokens if generates else None
        score_batch(self.scores, self.model, self.tokenizer, batch, limit)

    def _finish_scores(self) -> None:
        self.results = self.scores.compute()
        self.results["model"] = {
            "base": self.base,
            "fingerprint": self.fingerprint,
            "applied": [{"name": expert.name, "content_hash": expert.content_hash} for expert in self.applied_experts],
            "expert": type(next(iter(expert_layers(self.model)))[1].expert).__name__ if self.expert else None,
        }


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _leave_to_this_module(module: LightningModule) -> None:
    """Keep DDP away from frozen weights, which are the same everywhere, and from buffers, which change only in
    selections.

    Otherwise it would send all of them to every rank at the start, and all buffers before every forward pass.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    module._ddp_params_and_buffers_to_ignore = frozen + buffers  # type: ignore[assignment]


def _summary(module: ExpertModule) -> str:
    layers = [layer for _, layer in expert_layers(module.model)]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    theirs = sum(layer.weight.numel() for layer in layers)
    total = sum(parameter.numel() for name, parameter in module.model.named_parameters() if ".expert." not in name)
    kinds = ", ".join(sorted({f"{type(layer.expert).__name__}({_words(layer.expert.settings())})" for layer in layers}))
    share = f"{trained / theirs:.2%} of these weights, {trained / total:.2%} of the base's {total:,}"
    return f"{kinds} in {len(layers)} weights: {trained:,} trained parameters, {share}"


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
