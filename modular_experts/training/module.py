"""ExpertModule trains and evaluates a causal language model with experts in it, as a LightningModule."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, distributed, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from modular_experts.base import Base
from modular_experts.base.base import DType
from modular_experts.base.quantised import Quantise
from modular_experts.base.structure import split_slice
from modular_experts.data.batch import Batch, DataSource, datamodule_of, is_filler, source_of
from modular_experts.data.epoch import seed_of_run
from modular_experts.deltas import Delta
from modular_experts.evaluation import batch_losses, check_packing, text_metrics
from modular_experts.evaluation.likelihood import keeps_rows_apart
from modular_experts.evaluation.metrics import Metrics
from modular_experts.experts import Expert
from modular_experts.experts.site import Factory, LayerPlan, Plan
from modular_experts.injection import (
    context_length,
    describe_experts,
    draw_experts,
    expert_layers,
    expert_state,
    extra_losses,
    inject,
    moves_tokens_alone,
    named_experts,
    task_vector,
    write_experts,
)
from modular_experts.injection.answer_only import AnswerOnly
from modular_experts.injection.save import anchor
from modular_experts.injection.sharded import shard
from modular_experts.injection.task_heads import TaskHeads, check_classes, task_heads, trained_task_heads
from modular_experts.language_model import is_classifier
from modular_experts.library import StoredExpert, as_parents
from modular_experts.library.record import Record
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.selection.schedule import Schedule, TrainingLength, callbacks_of, of_all_ranks
from modular_experts.training import checkpoint as checkpoints
from modular_experts.training import loading
from modular_experts.training.activations import recompute, recompute_if_needed
from modular_experts.training.evaluated import EvaluatedModule
from modular_experts.training.even_validation import EvenValidation
from modular_experts.training.learning_rate import LearningRateShape, WarmupLinear, training_length
from modular_experts.training.log_progress import LogProgress
from modular_experts.training.preferences import PreferenceLoss, start_of
from modular_experts.training.save_results import WritePredictions, WriteResults

if TYPE_CHECKING:
    BaseModel = str | Path | Base | nn.Module
    # If a plan is refused, the parser passes on the first cause alone.
    Experts = LayerPlan | Mapping[str, Factory] | Plan
else:
    # What the command line may be given.
    BaseModel = str
    Experts = LayerPlan | dict[str, Callable[[Tensor], Expert]]

log = logging.getLogger(__name__)


class ExpertModule(EvaluatedModule):
    """A causal language model whose layers carry experts.

    Args:
        base: A model directory (config.json, safetensors weights, tokenizer) or a Hugging Face hub id; from Python also
            a model that `from_pretrained` loaded. Such a model is changed in place and keeps its dtype.
        modules: The layers that get an expert: ends of their names (`q_proj`), regular expressions for full names
            (`.*\\.(q_proj|v_proj)`), or `all-linear`. Each must match at least one linear layer.
        expert: The expert type and its settings: `SparseExpert`, `LoRAExpert`, `FullExpert`, `MaskedExpert`, or the
            dotted path of your own.
        applied: Library experts that are added to the base first, to test them or to train on top: deltas, or one
            routed expert.
        dtype: Data type of the base; trained values are float32, beside a float64 base float64. For a base of half the
            memory give `bfloat16` with the precision `bf16-mixed`; `bf16-true` and `16-true` are refused.
        revision: Branch, tag or commit of a hub id.
        gradient_checkpointing: Recompute activations in backward instead of keeping them. If not given, a fit does so
            where it would else take more memory than there is.
        offload_activations: Keep what gradient checkpointing recomputes from, the inputs of blocks, in the memory of
            the CPU instead of a GPU's, which makes steps slower.
        optimizer: Any torch optimizer over the trained parameters. The default is AdamW without weight decay at the
            expert type's learning rate.
        scheduler: A shape (`WarmupLinear`, `WarmupCosine`, `ConstantRate`) or any torch scheduler, stepped every
            optimizer step. The default is `WarmupLinear`.
        max_new_tokens: Length limit of generated answers.
        experts: Instead of `modules` and `expert`, an expert type for each pattern of layers: {q_proj: LoRAExpert}; or
            a plan, a function from sites to expert types (`experts.site`).
        learning_rate: Peak rate of the default optimizer; the expert type's own if not given. An `optimizer` has a rate
            of its own.
        quantise: Quantise the linear layers of the base while it is loaded: `nf4`, `fp4` (4 bits) or `int8` of
            bitsandbytes, or a form of torchao. The expert is a delta of the base that is not quantised.
        shard_base: Let each of several processes hold a part of the base (FSDP2) and whole experts, for a base that one
            device cannot hold.
        metrics: Metrics beside exact match and rougeL, as `evaluation.text_metrics` takes them: [number, mine.length],
            or by name, also in the place of one: {rougeL: stemmed_rouge_l}.
        values: Data type of the trained values, their gradients, and the optimizer's moments; half the memory in
            `bfloat16`, in which the expert is also stored.
        loss: A loss of preferences, such as `DPO`, for rows with a chosen and a rejected answer. Without one, the loss
            is the cross-entropy of the targets.
        acts_on: What experts move: the whole `row`, or the `answer` alone, from the last token of the prompt on. The
            base then reads prompts alone and without gradients, which takes less time for each row.
    """

    length: TrainingLength
    seed: int

    def __init__(
        self,
        base: BaseModel,
        modules: str | list[str] | None = None,
        expert: Callable[[Tensor], Expert] | None = None,
        applied: list[str] | None = None,
        dtype: DType = "float32",
        revision: str | None = None,
        gradient_checkpointing: bool | None = None,
        offload_activations: bool = False,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        scheduler: LearningRateShape | Callable[[Optimizer], LRScheduler] | None = None,
        max_new_tokens: int = 64,
        experts: Experts | None = None,
        learning_rate: float | None = None,
        metrics: Metrics | None = None,
        values: Literal["float32", "bfloat16"] = "float32",
        quantise: Quantise | None = None,
        shard_base: bool = False,
        loss: PreferenceLoss | None = None,
        acts_on: Literal["row", "answer"] = "row",
    ) -> None:
        super().__init__()
        if learning_rate is not None and optimizer is not None:
            raise ValueError(
                f"learning_rate={learning_rate:g} is for the default optimizer; set model.optimizer.lr, or leave "
                "model.optimizer out"
            )
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate={learning_rate} must be above 0, such as 0.002")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if quantise and isinstance(base, nn.Module):
            raise ValueError(
                f"quantise={quantise!r} is for a base on disk; load the model with a quantization_config, or give the "
                "directory as base"
            )
        self.save_hyperparameters(ignore=["base"] if isinstance(base, nn.Module) else [])
        # What was made in Python, not by a config, cannot be stored: `load_from_checkpoint` needs it again.
        for name in [name for name, value in self.hparams.items() if not checkpoints.is_plain(value)]:
            del self.hparams[name]
        # The list keeps the model's parameters out of this module until experts are in it.
        self._given: list[nn.Module] = [base] if isinstance(base, nn.Module) else []
        self.base, self.revision = loading.place_of(base, revision)
        if isinstance(expert, str):
            raise ValueError(f"expert={expert!r} is a text; give a class, as LoRAExpert or partial(LoRAExpert, rank=4)")
        self.modules_pattern = modules
        self.expert = expert
        self.experts = experts
        self.applied = list(applied or [])
        if offload_activations and gradient_checkpointing is False:
            raise ValueError("offload_activations=True is for gradient_checkpointing=True; leave one of the two out")
        self.gradient_checkpointing = True if offload_activations else gradient_checkpointing
        if acts_on == "answer":
            # Recomputed blocks keep no keys and values, and the base's would be read with applied experts in it.
            refused = {
                "gradient_checkpointing": self.gradient_checkpointing,
                "shard_base": shard_base,
                "applied": applied,
            }
            for name in [name for name, value in refused.items() if value]:
                raise ValueError(f"acts_on='answer' does not go with {name}={refused[name]}; leave one of the two out")
            self.gradient_checkpointing = False
        self.dtype_name = dtype
        self.values = values
        self.offload_activations = offload_activations
        self.shard_base = shard_base
        self.quantise: Quantise | None = quantise or getattr(base, "quantise", None)
        self.optimizer = optimizer
        self.scheduler = scheduler or WarmupLinear()
        self.learning_rate = learning_rate
        """Peak rate of the optimizer, whichever it is, if set by the time it is made; Lightning's finder sets it."""
        self.max_new_tokens = max_new_tokens
        self.metrics = text_metrics(metrics)
        # Checkpoints hold trained tensors only; `on_load_checkpoint` is strict in Lightning's place.
        self.strict_loading = False
        self.config_file: Path | None = None
        """The file in which the command line keeps the configuration of the run."""
        self.tokenizer: Any = None
        """The base's tokenizer; read with the base, unless it was given before."""
        self.applied_experts: list[StoredExpert] = []
        self.results: Record = {}
        self.memory_limit: int | None = None
        """The most bytes that a fit may take; what is there if not given."""
        self._random_states: list[Record] | None = None
        self._state_of_step: Record | None = None
        self._resized = False
        self.classes: Mapping[str, Sequence[str]] = {}
        """The classes of each task for a base that classifies, if neither data nor a checkpoint tells them."""
        self.batch_losses: Callable[..., Any] = batch_losses
        """Computes the losses of a training batch, as `evaluation.batch_losses`; `Trained.before_fit` may replace it by
        a function that also returns sums over target tokens, by name, which are added to the loss."""
        self._logged: dict[str, Tensor] = {}
        self._gradients_checked = False
        self.preferences = loss
        self.acts_on = acts_on
        self._start: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Raise before the model is loaded if settings do not fit each other, or would round what is trained."""
        # A checkpoint that was only tested has left its random states; a resumed fit's is read later.
        self._random_states = None
        self.seed = seed_of_run()
        # Lightning's own loaders use a class that torch deprecates.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        if self.experts is not None and (self.expert is not None or self.modules_pattern):
            raise ValueError("model.experts replaces both model.expert and model.modules; give no other beside it")
        if (self.expert is None) != (not self.modules_pattern):
            present = "expert" if self.expert else "modules"
            missing = "modules" if self.expert else "expert"
            both = "give both (`expert=LoRAExpert` `modules=['q_proj', 'v_proj']`), or neither to test a base"
            raise ValueError(f"{present} is given but not {missing}; {both}")
        if self.acts_on == "answer" and not self.has_experts:
            raise ValueError("acts_on='answer' is for the experts of `expert=` and `modules=`; a stored one knows it")
        if stage == "fit" and not self.has_experts:
            raise ValueError("fit has no experts to train: give `expert=` and `modules=`")
        trainer = loading.trainer_of(self)
        if trainer is not None:
            loading.check_strategy(trainer)
            if stage == "fit" and self.offload_activations and trainer.strategy.root_device.type == "cpu":
                raise ValueError(
                    "offload_activations=True moves inputs of blocks from a GPU to the memory of the CPU, and this fit "
                    "computes on the CPU, where that does nothing; leave it out"
                )
            if self.has_experts:
                loading.check_precision(trainer)
        if self.shard_base:
            loading.prepare_sharding(trainer)
        if stage == "fit":
            source_of(trainer).learn_choices(self.preferences is not None)

    @property
    def has_experts(self) -> bool:
        """Whether experts are put into the model."""
        return self.experts is not None or self.expert is not None

    @property
    def planned_experts(self) -> Factory | Mapping[str, Factory] | Plan:
        """The experts to put into the model, as `inject` takes them beside `modules`."""
        experts = self.experts or self.expert
        assert experts is not None
        return experts

    @property
    def reads_base(self) -> bool:
        """Whether the base is not in memory, neither loaded nor given."""
        return not self._given and not hasattr(self, "model")

    def configure_model(self) -> None:
        """Load the base, add the applied experts, and inject; a second call only asks the data and the schedules."""
        trainer = loading.trainer_of(self)
        if not hasattr(self, "model"):
            self._load()
        elif is_classifier(self.model) and self.has_experts and trainer is not None and trainer.state.fn == "fit":
            check_classes(self.model, source_of(trainer).classes)
        source_of(trainer).fit_context(context_length(self.model))
        if trainer is not None and trainer.state.fn == "fit" and self.has_experts:
            for schedule in callbacks_of(trainer, Schedule):
                self._resized |= bool(schedule.before_optimizers(trainer, self))

    def _load(self) -> None:
        self.applied_experts = loading.open_applied(self.applied, self.has_experts)
        self.opened_base = loading.opened_base(self.base, self.applied_experts, self.revision, self.quantise)
        self.fingerprint = self.opened_base.fingerprint
        if self.tokenizer is None:
            self.tokenizer = self.opened_base.tokenizer()
        model: Any
        if self._given:
            model = self._given[0]
            loading.check_given(model, self.opened_base, self.has_experts)
            self.dtype_name = cast(DType, str(model.dtype).removeprefix("torch."))
        else:
            model = self.opened_base.load(self.dtype_name)
        loading.put_applied(model, self.applied_experts, self.has_experts)
        if self.gradient_checkpointing:
            recompute(model, self.offload_activations)
        if self.has_experts:
            inject(model, self.planned_experts, self.modules_pattern)
            trainer = loading.trainer_of(self)
            classes = source_of(trainer).classes or self.classes
            # Without a trainer, a checkpoint that comes next may tell the classes.
            if is_classifier(model) and (classes or trainer is not None):
                trained_task_heads(model, classes)
            loading.hold_values(model, getattr(torch, self.values))
            loading.check_on_top(model, self.applied_experts)
            if self.acts_on == "answer":
                AnswerOnly(model)
        self._start = start_of(model) if self.preferences else {}
        loading.warn_of_slow_bfloat16(loading.trainer_of(self), self.dtype_name)
        if self.shard_base:
            shard(model, self.trainer.strategy.root_device)
        self.model = model
        self._given = []
        # Before a training, because an expert may count in an attribute.
        self._facts = checkpoints.trained_facts(model, self.applied_experts)
        self._trained = self._names_of_trained()
        # DDP would send frozen weights to every rank at the start, and buffers before every forward pass. The former
        # are the same everywhere; the latter change only in choices of supports, which all ranks make alike.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        buffers = [name for name, _ in self.named_buffers()]
        # A private name of torch 2.13, which its own `_set_params_and_buffers_to_ignore_for_model` sets.
        self._ddp_params_and_buffers_to_ignore = frozen + buffers

    def _names_of_trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_callbacks(self) -> list[Callback]:
        """Add a mask schedule, validation by steps, progress and writers of results, each unless the user lists one.

        It is Lightning's first hook: the data, whose setup comes next, take the base's tokenizer here.
        """
        listed: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        defaults = [MaskSchedule(), EvenValidation(), LogProgress(), WriteResults(), WritePredictions()]
        if self.shard_base:
            defaults.append(loading.Reshard())
        added = [default for default in defaults if not callbacks_of(self.trainer, type(default))]
        if self.base:
            self.tokenizer = source_of(self.trainer).take_tokenizer(self.base, self.revision) or self.tokenizer
        for callback in [*listed, *added]:
            if isinstance(callback, LogProgress):
                callback.show_lines()
            elif isinstance(callback, EvenValidation) and self.trainer.state.fn == "fit":
                callback.take_over(self.trainer)
        return added

    def unfreeze(self) -> "ExpertModule":
        """Let the experts be trained again, after `freeze`; the base stays as it is."""
        super().unfreeze()
        for name, parameter in self.named_parameters():
            parameter.requires_grad = name in self._trained
        return self

    def make_optimizer(self) -> Optimizer:
        """Return the optimizer of the trained parameters, at its peak rate."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(trained)
        else:
            experts = [expert for _, expert in named_experts(self.model) if not isinstance(expert, TaskHeads)]
            rate = min(expert.learning_rate for expert in experts)
            # One pass over each tensor instead of a dozen. A fused step undoes the scale of a GradScaler itself, so
            # Lightning refuses to clip in mixed precision, even in bfloat16, which has none; and on a GPU torch
            # chooses a quick way alone.
            plugin = self.trainer.precision_plugin
            scaled = getattr(plugin, "scaler", None) is not None
            clipped = isinstance(plugin, MixedPrecision) and bool(self.trainer.gradient_clip_val)
            fused = self.trainer.strategy.root_device.type == "cpu" and not (scaled or clipped)
            optimizer = AdamW(trained, lr=rate, weight_decay=0.0, fused=fused or None)
        if self.learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
        return optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer()
        self.length = training_length(self.trainer)
        shape = self.scheduler
        total = self.length.total_steps
        if isinstance(shape, LearningRateShape):
            scheduler: LRScheduler = LambdaLR(optimizer, lambda step: shape.factor(step, total))
        else:
            scheduler = shape(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            # It needs a number of each validation; torch's own class does not say which.
            monitor = getattr(scheduler, "monitor", "val_loss")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Let experts prepare, log what is trained, and start from the same supports on every rank."""
        self.model.train()
        self._packs_evaluation = None
        self._gradients_checked = False
        if self.learning_rate is not None and set(checkpoints.peak_rates(self.trainer)) != {self.learning_rate}:
            # Lightning's finder of learning rates has set it; the schedule of the rate still has the peak before.
            self.trainer.strategy.setup_optimizers(self.trainer)
        if not hasattr(self, "length"):
            # A `configure_optimizers` of the user's has not asked for it.
            self.length = training_length(self.trainer)
        self.prepare_experts(datamodule_of(self.trainer))
        source = source_of(self.trainer)
        if source.packing:
            check_packing(self.model)
        else:
            # The data may not ask, and all processes take part in each pass over a sharded base.
            packs = self._packs() if self.shard_base else None
            source.choose_packing(lambda: self._packs() if packs is None else packs)
        recompute_if_needed(self)
        checkpoints.log_training(self.model, self.trainer, self.length)
        if self.trainer.world_size > 1:
            for _, expert in named_experts(self.model):
                for buffer in expert.buffers():
                    distributed.broadcast(buffer, src=0)

    def _packs(self) -> bool:
        """Return whether training rows may be packed."""
        return moves_tokens_alone(self.model) and keeps_rows_apart(self.model)

    def prepare_experts(self, data: object) -> float:
        """Let experts get ready for a training on these data; return how many seconds that took, 0 without work."""
        if isinstance(data, DataSource):
            data.learn_choices(self.preferences is not None)
        self.batch_losses = batch_losses
        started = time.monotonic()
        ready = [expert.before_fit(self, data) for _, expert in named_experts(self.model)]
        if self.preferences:
            if self.batch_losses is not batch_losses:
                _, expert = named_experts(self.model)[0]
                kind = type(self.preferences).__name__
                raise ValueError(f"{type(expert).__name__} has a loss of its own, so {kind} cannot train it")
            self.batch_losses = partial(self.preferences.batch_losses, self._start)
        return time.monotonic() - started if any(ready) else 0.0

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # When all set-up is over, the first step takes the random state of a checkpoint.
        draw_experts(self.model, f"{self.seed}/{self.trainer.global_step}")
        checkpoints.restore_random_state(self._random_states or [], self.trainer.global_rank)
        self._random_states = None
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._state_of_step = checkpoints.random_state()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | int]:
        """Return what backward takes (`loss`), the batch's mean per target token of all ranks plus what experts add
        (`mean_loss`), and the number of rows of all ranks (`rows`).
        """
        loss = self.loss(batch, in_step=True)
        means = self._logged
        rows: int | Tensor = is_filler(batch).count(False)
        if self.trainer.world_size > 1:
            numbers = torch.stack([*means.values(), loss.new_tensor(rows)])
            distributed.all_reduce(numbers)
            means = dict(zip(means, numbers / self.trainer.world_size, strict=False))
            rows = numbers[-1]
        for name, mean in means.items():
            self.log(name, mean, prog_bar=name == "loss", batch_size=len(batch["task"]))
        return {"loss": loss, "mean_loss": means["loss"], "rows": rows}

    def on_after_backward(self) -> None:
        """Tell after the first pass of a fit which experts cannot learn, such as one of a wrapper's vision tower."""
        if self._gradients_checked:
            return
        self._gradients_checked = True
        without = []
        for name, layer in expert_layers(self.model):
            trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            # A pass may leave out a matrix of a mixture of experts.
            is_matrix = split_slice(name)[1] is not None
            if trained and not is_matrix and all(parameter.grad is None for parameter in trained):
                without.append(name)
        if without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            text = "the loss does not depend on %s%s, so its expert learns nothing: leave it out"
            log.warning(text, without[0], more)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        write_experts(self.model)

    def loss(self, batch: Batch, in_step: bool = False) -> Tensor:
        """Return the mean loss per target token of the global batch, plus the sum of the terms that experts add.

        Its average over ranks is the loss of one process with all rows. With `in_step`, a batch that tells of its
        optimizer step counts by its share of the step's target tokens: the sum over the step's batches, however many,
        divided by `accumulate_grad_batches`, is the mean over all of them.
        """
        measure = self.batch_losses if self.model.training else batch_losses
        sums, counts, *more = measure(self.model, batch)
        count = counts.sum()
        if self.trainer.world_size > 1:
            distributed.all_reduce(count)
        tokens = count.clamp(min=1) / self.trainer.world_size
        mean = sums.sum() / tokens
        penalties = extra_losses(self.model)
        means = {name: term / tokens for added in more for name, term in added.items()}
        loss = sum((penalties | means).values(), start=mean)
        terms = {f"penalty/{name}": term for name, term in (penalties | means).items()}
        self._logged = {name: term.detach() for name, term in {"loss": loss, **terms}.items()}
        if not in_step or "step_terms" not in batch:
            return loss
        of_step = count.new_tensor(batch["step_terms"])
        parts = self.trainer.accumulate_grad_batches
        if self.trainer.world_size > 1:
            distributed.all_reduce(of_step)
        share = parts * count.to(mean.dtype) / of_step.clamp(min=1)
        return share * sum(means.values(), start=mean) + parts / batch["step_batches"] * sum(penalties.values())

    def model_facts(self) -> Record:
        """Return base, added experts and the trained kind of expert, for the results."""
        return {
            "base": self.base,
            "fingerprint": self.fingerprint,
            "applied": [{"name": expert.name, "content_hash": expert.content_hash} for expert in self.applied_experts],
            "expert": describe_experts(self.model)["kind"] if self.has_experts else None,
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained tensors and the experts' buffers; a resumed run loads the frozen base from its files."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        full = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in full if key.removeprefix(prefix) not in trained and ".expert." not in key]:
            del full[key]
        return full

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors, and report as missing only names that `state_dict` has: it leaves the base out."""
        loaded = super().load_state_dict(state_dict, strict=False, assign=assign)
        kept = self.state_dict()
        missing = [name for name in loaded.missing_keys if name in kept]
        if strict and (missing or loaded.unexpected_keys):
            differ = ", ".join([*missing, *loaded.unexpected_keys])
            raise RuntimeError(f"the tensors and these experts differ, which `configure_model()` makes first: {differ}")
        return type(loaded)(missing, loaded.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: Record) -> None:
        checkpoint["base_fingerprint"] = self.fingerprint
        checkpoint["quantise"] = self.quantise
        is_within = checkpoints.repeat_step(checkpoint, self.trainer.accumulate_grad_batches)
        state = self._state_of_step if is_within and self._state_of_step else checkpoints.random_state()
        checkpoint["random_states"] = of_all_ranks(self.trainer, state)
        checkpoint["resized"] = self._resized
        if is_classifier(self.model):
            checkpoint["classes"] = task_heads(self.model).classes
        checkpoint |= self._facts

    def on_load_checkpoint(self, checkpoint: Record) -> None:
        """Raise if the checkpoint was written with another base, other experts or settings, or others beneath."""
        self.classes = checkpoint.get("classes", {})
        self.configure_model()
        if self.classes and self.has_experts:
            # A test may read some of the tasks alone.
            trained_task_heads(self.model, self.classes)
            self._trained = self._names_of_trained()
        trainer = loading.trainer_of(self)
        if trainer is not None:
            # Lightning does so after the checkpoint is loaded, which would round what was trained in float64.
            trainer.precision_plugin.convert_module(self)
        checkpoints.check_base(checkpoint, self.base, self.fingerprint, self.quantise)
        # Experts that no schedule resized have the sizes of their settings. Version 1 wrote no such key.
        self._resized |= checkpoint.get("resized", True)
        if self._resized:
            checkpoints.resize_like(self.model, checkpoint["state_dict"])
        checkpoints.read_anchors(self.model, checkpoint["state_dict"])
        checkpoints.check_sizes(self.state_dict(), checkpoint["state_dict"])
        checkpoints.check_facts(checkpoint, self._facts)
        self._random_states = checkpoint.get("random_states")

    def task_vector(self) -> Iterable[tuple[str, Delta]]:
        """Yield `(weight name, delta)` for each expert, on the CPU, one at a time."""
        before = partial(anchor, self.opened_base, self.applied_experts, getattr(torch, self.dtype_name))
        for name, delta in task_vector(self.model, before):
            yield name, delta.to("cpu")

    def expert_state(self) -> dict[str, Tensor]:
        """Return the tensors that experts keep beside their deltas, on the CPU, by `<weight>/<name>`."""
        return {name: tensor.to("cpu") for name, tensor in expert_state(self.model).items()}

    def record_facts(self) -> Record:
        """Return kind, base, settings, training and parents of the experts, in plain values, for their record."""
        facts = describe_experts(self.model)
        if self.experts is None:
            # One factory has made all; the kernel in their settings may differ by the layer.
            facts["hyperparameters"] = next(expert_layers(self.model))[1].expert.settings()
        settings = {name: self.hparams.get(name) for name in ("modules", "optimizer", "scheduler", "dtype")}
        if isinstance(self.experts, Mapping):
            settings["modules"] = list(self.experts)
        settings |= {"loss": checkpoints.as_config(self.preferences)} if self.preferences else {}
        rate = max(checkpoints.peak_rates(self.trainer), default=None)
        settings |= facts["hyperparameters"] | {"learning_rate": rate}
        return {
            **facts,
            "base": self.opened_base.facts | {"id": self.base, "revision": self.revision},
            "hyperparameters": settings,
            "training": {
                **checkpoints.training_facts(self.trainer, self.dtype_name, self.config_file),
                **self.opened_base.quantised_facts(self.dtype_name),
            },
            "parents": as_parents(self.applied_experts),
        }
