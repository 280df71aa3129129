"""ExpertModule trains and evaluates a causal language model with experts in it, as a LightningModule.

It meets the data only in a batch (`data/batch.py`). Schedules (`callbacks/schedule.py`) choose what is trained, and
`callbacks.ExportExpert` writes it to a library.
"""

from __future__ import annotations

import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from modular_experts.base import Base
from modular_experts.base.apply import apply_deltas
from modular_experts.callbacks.even_validation import EvenValidation
from modular_experts.callbacks.mask_schedule import MaskSchedule
from modular_experts.callbacks.progress import LogProgress
from modular_experts.callbacks.results import WritePredictions, WriteResults
from modular_experts.callbacks.schedule import TrainingLength, schedules
from modular_experts.data.batch import is_filler
from modular_experts.deltas import Delta, add
from modular_experts.evaluation import (
    TaskScores,
    batch_losses,
    check_packing,
    paired_losses,
    score_batch,
    text_metrics,
)
from modular_experts.evaluation.drafts import packs_evaluation
from modular_experts.evaluation.generation import answer_texts, cut_answers, generate_tokens, warn_of_cut_answers
from modular_experts.evaluation.likelihood import keeps_rows_apart
from modular_experts.experts import Expert
from modular_experts.experts.site import Factory, LayerPlan, Plan
from modular_experts.injection import (
    consistency,
    context_length,
    describe_experts,
    draw,
    expert_layers,
    expert_state,
    inject,
    moves_tokens_alone,
    named_experts,
    penalties,
    task_vector,
    write_experts,
)
from modular_experts.injection.attach import attached, needs_injection
from modular_experts.injection.route import put_beneath
from modular_experts.library import StoredExpert, as_parents, open_experts, warn_unlike_training
from modular_experts.library.compatibility import check_mergeable
from modular_experts.training.learning_rate import LearningRateShape, WarmupLinear, training_length
from modular_experts.training.task_gate import teach_tasks

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    BaseModel = str | Path | Base | nn.Module
    # Of what refuses a plan, the parser passes on the cause of the first alone.
    Experts = LayerPlan | Mapping[str, Factory] | Plan
else:
    # What the command line may be given.
    BaseModel = str
    Experts = LayerPlan | dict[str, Callable[[Tensor], Expert]]


class ExpertModule(LightningModule):
    """A causal language model whose layers carry experts.

    Args:
        base: A model directory (config.json, safetensors weights, tokenizer) or a Hugging Face hub id; from Python also
            a model that `from_pretrained` loaded. Such a model is changed in place and keeps its dtype.
        modules: The layers that get an expert: ends of their names (`q_proj`), regular expressions for full names
            (`.*\\.(q_proj|v_proj)`), or `all-linear`. Each must match at least one linear layer.
        expert: The expert type and its settings: `SparseExpert`, `LoRAExpert`, `FullExpert`, `MaskedExpert`, or the
            dotted path of your own.
        applied: Library experts that are added to the base first, to test them or to train on top: deltas, and one
            routed expert.
        dtype: Data type of the base; trained values are float32, beside a float64 base float64. For a base of half the
            memory give `bfloat16` with the precision `bf16-mixed`; `bf16-true` and `16-true` are refused.
        revision: Branch, tag or commit of a hub id.
        gradient_checkpointing: Recompute activations in backward instead of keeping them.
        optimizer: Any torch optimizer over the trained parameters. The default is AdamW without weight decay at the
            expert type's learning rate.
        scheduler: A shape (`WarmupLinear`, `WarmupCosine`, `Constant`) or any torch scheduler, stepped every optimizer
            step. The default is `WarmupLinear`.
        max_new_tokens: Length limit of generated answers.
        generate_in_fit: Whether validation during training also generates answers, beside taking the loss.
        experts: Instead of `modules` and `expert`, an expert type for each pattern of layers: {q_proj: LoRAExpert}; or
            a plan such as `HiLo`, a function from sites to expert types (`experts.site`).
        check_base: Whether a loaded model is compared with the files of its base, weight by weight.
        learning_rate: Peak rate of the default optimizer; the expert type's own if not given. An `optimizer` has a rate
            of its own.
        metrics: Functions of a generated text and its target, by name, beside exact match and rougeL, or in the place
            of one: {rougeL: modular_experts.evaluation.stemmed_rouge_l}.
    """

    length: TrainingLength

    def __init__(
        self,
        base: BaseModel,
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
        experts: Experts | None = None,
        check_base: bool = True,
        learning_rate: float | None = None,
        metrics: dict[str, Callable[[str, str], float]] | None = None,
    ) -> None:
        super().__init__()
        if learning_rate is not None and optimizer is not None:
            raise ValueError(
                f"learning_rate={learning_rate:g} is the rate of the default optimizer, and the one that is given has "
                "its own; set model.optimizer.lr, or leave model.optimizer out"
            )
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate={learning_rate} must be above 0, such as 0.002")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        self.save_hyperparameters(ignore=["base"] if isinstance(base, nn.Module) else [])
        # What was made in Python, not by a config, cannot be stored: `load_from_checkpoint` needs it again.
        for name in [name for name, value in self.hparams.items() if not _is_plain(value)]:
            del self.hparams[name]
        # The list keeps the model's parameters out of this module until experts are in it.
        self._given: list[nn.Module] = [base] if isinstance(base, nn.Module) else []
        if isinstance(base, nn.Module):
            config: Any = getattr(base, "config", None)
            self.base = str(getattr(config, "_name_or_path", "") or "")
            self.revision = revision or getattr(config, "_commit_hash", None)
        elif isinstance(base, Base):
            self.base, self.revision = base.place, revision or base.revision
        else:
            self.base, self.revision = str(base), revision
        self.modules_pattern, self.expert, self.experts = modules, expert, experts
        self.applied = list(applied or [])
        self.dtype_name, self.gradient_checkpointing, self.check_base = dtype, gradient_checkpointing, check_base
        self.optimizer, self.scheduler = optimizer, scheduler or WarmupLinear()
        self.learning_rate = learning_rate
        """Peak rate of the optimizer, whichever it is, if set by the time it is made; Lightning's finder sets it."""
        self.max_new_tokens, self.generate_in_fit = max_new_tokens, generate_in_fit
        self.metrics = text_metrics(metrics)
        # Checkpoints hold trained tensors only; `on_load_checkpoint` is strict in Lightning's place.
        self.strict_loading = False
        self.config_file: Path | None = None
        """The file in which the command line keeps the configuration of the run."""
        self.tokenizer: Any = None
        """The base's tokenizer; read with the base, unless it was given before."""
        self.applied_experts: list[StoredExpert] = []
        self.results: dict[str, Any] = {}
        self._random_states: list[dict[str, Any]] | None = None
        self._resized = False
        self._penalties: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Raise before the model is loaded if training has no experts, experts have no layers, or the trainer's
        precision would round what is trained.
        """
        # A checkpoint that was only tested has left its random states; that of a resumed fit is read later.
        self._random_states = None
        # Lightning calls its own loaders by what torch deprecates.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        if self.experts is not None and (self.expert is not None or self.modules_pattern):
            raise ValueError("model.experts replaces both model.expert and model.modules; give no other beside it")
        if (self.expert is None) != (not self.modules_pattern):
            given, missing = ("expert", "modules") if self.expert else ("modules", "expert")
            raise ValueError(
                f"{given} is given but not {missing}; give both (--expert LoRAExpert --modules q_proj v_proj), or "
                "neither to test a base"
            )
        if stage == "fit" and not self.has_experts:
            raise ValueError("fit has no experts to train: give model.expert and model.modules")
        if self._trainer is not None and self.has_experts:
            self._check_precision(self._trainer)

    def _check_precision(self, trainer: Trainer) -> None:
        layer = nn.utils.skip_init(nn.Linear, 1, 1, dtype=torch.float32)  # draws no random numbers
        (weight, _) = trainer.precision_plugin.convert_module(nn.Sequential(layer)).parameters()
        if weight.dtype.itemsize < torch.float32.itemsize:
            raise ValueError(
                f"trainer.precision={trainer.precision} also rounds the trained values, which must stay float32; for a "
                "base in half the memory set model.dtype bfloat16 and trainer.precision bf16-mixed"
            )

    @property
    def has_experts(self) -> bool:
        """Whether experts are put into the model."""
        return self.experts is not None or self.expert is not None

    def configure_model(self) -> None:
        """Load the base, add the applied experts, and inject; a second call only asks the data and the schedules."""
        if not hasattr(self, "model"):
            self._load()
        trainer = self._trainer
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "fit_context"):
            data.fit_context(context_length(self.model))
        if trainer is not None and trainer.state.fn == "fit" and self.has_experts:
            for schedule in schedules(trainer):
                schedule.before_optimizers(trainer, self)
                self._resized |= schedule.resizes

    def _load(self) -> None:
        self.applied_experts = open_experts(self.applied, mergeable=False) if self.applied else []
        routed = [expert for expert in self.applied_experts if expert.routed]
        others = [expert for expert in self.applied_experts if not needs_injection(expert)]
        # Of what chooses by the input, training goes on from a routed expert alone.
        check_mergeable([one for one in self.applied_experts if not one.routed] if self.has_experts else others)
        if self.has_experts and len(routed) > 1:
            raise ValueError(f"{routed[0].name} and {routed[1].name} are both routed; train on top of one of them")
        if not self.base:
            raise ValueError(
                "the model does not name its directory (config._name_or_path), whose files deltas start from; load it "
                "with from_pretrained, or give the directory as base"
            )
        self.opened_base = Base.open(self.base, self.applied_experts, self.revision)
        self.fingerprint = self.opened_base.fingerprint
        if self.tokenizer is None:
            self.tokenizer = self.opened_base.tokenizer()
        model: Any
        if self._given:
            model = self._given[0]
            if self.has_experts and (there := len(named_experts(model))):
                raise ValueError(
                    f"the model holds {there} experts already; fit their module again to train them further, or take "
                    "them out with modular_experts.eject(model)"
                )
            if self.check_base:
                self.opened_base.check_loaded(model)
            self.dtype_name = str(model.dtype).removeprefix("torch.")  # type: ignore[assignment]
        else:
            model = self.opened_base.load(self.dtype_name)
        if len(others) < len(self.applied_experts) and not self.has_experts:
            attached(model, self.applied_experts, check=False)
        else:
            apply_deltas(model, others)
            for expert in routed:
                put_beneath(model, expert)
        model.requires_grad_(False)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.experts is not None:
            inject(model, self.experts)
        elif self.expert is not None and self.modules_pattern:
            inject(model, self.expert, self.modules_pattern)
        chooses = [type(one).__name__ for _, one in named_experts(model) if not one.mergeable]
        if self.has_experts and routed and chooses:
            raise ValueError(
                f"{chooses[0]} chooses by the input, as {routed[0].name} does, and the two could not be used together; "
                "train an expert that is a delta, such as LoRAExpert"
            )
        self._warn_of_slow_bfloat16()
        self.model, self._given = model, []
        # DDP would send frozen weights to every rank at the start, and buffers before every forward pass. The former
        # are the same everywhere; the latter change only in choices of supports, which all ranks make alike.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        buffers = [name for name, _ in self.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = frozen + buffers

    def _warn_of_slow_bfloat16(self) -> None:
        trainer = self._trainer
        if trainer is None or trainer.strategy.root_device.type != "cpu":
            return
        options = ["model.dtype float32"] if self.dtype_name == "bfloat16" else []
        options += ["trainer.precision 32-true"] if str(trainer.precision).startswith("bf16") else []
        can = torch.cpu.get_capabilities()
        # On x86 and on ARM; a processor of another kind is not known to be slow.
        instructions = {"x86_64": ["avx512_bf16", "amx_bf16", "avx10_2"], "arm64": ["bf16"], "aarch64": ["bf16"]}
        known = instructions.get(str(can.get("architecture")), [])
        if options and known and not any(can.get(name) for name in known):
            log.warning(
                "this processor has no instructions for bfloat16, which took seven times as long as float32 on such a "
                "one; %s avoids that",
                " and ".join(options),
            )

    def configure_callbacks(self) -> list[Callback]:
        """Add a mask schedule, validation by steps, progress and writers of results, each unless the user lists one."""
        listed: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        schedule = MaskSchedule()
        schedule.is_default = True
        defaults = [schedule, EvenValidation(), LogProgress(), WriteResults(), WritePredictions()]
        added = [default for default in defaults if not any(isinstance(one, type(default)) for one in listed)]
        if self.trainer.state.fn == "fit":
            next(one for one in [*listed, *added] if isinstance(one, EvenValidation)).take_over(self.trainer)
        return added

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trained parameters and its schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(trained)
        else:
            rate = min(expert.learning_rate for _, expert in named_experts(self.model))
            # One pass over each tensor instead of a dozen. A fused step undoes the scale of a GradScaler itself, so
            # Lightning could not clip; and on a GPU torch chooses a quick way alone.
            scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
            fused = self.trainer.strategy.root_device.type == "cpu" and not scaled
            optimizer = AdamW(trained, lr=rate, weight_decay=0.0, fused=fused or None)
        if self.learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
        self.length = training_length(self.trainer)
        shape, total = self.scheduler, self.length.total_steps
        if isinstance(shape, LearningRateShape):
            scheduler: LRScheduler = LambdaLR(optimizer, lambda step: shape.factor(step, total))
        else:
            scheduler = shape(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Teach a router that learns first, log what is trained, and start from the same supports on every rank."""
        self.model.train()
        if self.learning_rate is not None and set(self._peak_rates()) != {self.learning_rate}:
            # Lightning's finder of learning rates has set it; the schedule of the rate still has the peak before.
            self.trainer.strategy.setup_optimizers(self.trainer)
        data: Any = getattr(self.trainer, "datamodule", None)
        teach_tasks(self.model, data)
        if getattr(data, "packing", False):
            check_packing(self.model)
        elif hasattr(data, "choose_packing"):
            data.choose_packing(lambda: moves_tokens_alone(self.model) and keeps_rows_apart(self.model))
        layers = [layer for _, layer in expert_layers(self.model)]
        experts = [expert for _, expert in named_experts(self.model)]
        kinds = set()
        for expert in experts:
            settings = ", ".join(f"{name}={value}" for name, value in expert.settings().items())
            kinds.add(f"{type(expert).__name__}({settings})")
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        places = f"{len(layers)} weights"
        if others := len(experts) - len(layers):
            places += f" and {others} other modules"
        share = f", {trained / size:.2%} of these weights" if (size := sum(la.weight.numel() for la in layers)) else ""
        log.info("%s in %s: %s trained parameters%s", ", ".join(sorted(kinds)), places, f"{trained:,}", share)
        length, parts = self.length, self.trainer.accumulate_grad_batches
        rows = getattr(data, "batch_size", None)
        batch = [] if rows is None else [f"batch size {rows}" + (f" x {parts} accumulated" if parts > 1 else "")]
        rates = sorted({f"{rate:g}" for rate in self._peak_rates()})
        epochs = f"{length.total_steps / length.steps_per_epoch:.3g}"
        passes = f"{length.total_steps} steps ({epochs} epoch{'s' * (epochs != '1')})"
        log.info("%s", ", ".join([f"learning rate {' and '.join(rates)}", *batch, passes]))
        if self.trainer.world_size > 1:
            for buffer in (buffer for expert in experts for buffer in expert.buffers()):
                distributed.broadcast(buffer, src=0)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Let experts draw what is random in this step; restore the random state of a checkpoint before the first one,
        when all set-up is over.
        """
        draw(self.model, f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{self.trainer.global_step}")
        states, rank = self._random_states or [], self.trainer.global_rank
        self._random_states = None
        # A rank that the checkpoint has no state for keeps its own.
        if rank < len(states):
            torch.set_rng_state(states[rank]["torch"])
            version, numbers, gauss = states[rank]["python"]
            random.setstate((version, tuple(numbers), gauss))
            if "cuda" in states[rank] and torch.cuda.is_available():
                torch.cuda.set_rng_state(states[rank]["cuda"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return the loss per target token plus the experts' penalties (`loss`), its mean over ranks (`mean_loss`), and
        the number of rows of all ranks (`rows`). That mean is logged, and the penalties' by name.
        """
        loss = self.loss(batch)
        means = {"loss": loss.detach()} | {f"penalty/{name}": term for name, term in self._penalties.items()}
        rows: int | Tensor = is_filler(batch).count(False)
        if self.trainer.world_size > 1:
            numbers = torch.stack([*means.values(), loss.new_tensor(rows)])
            distributed.all_reduce(numbers)
            means, rows = dict(zip(means, numbers / self.trainer.world_size, strict=False)), numbers[-1]
        for name, mean in means.items():
            self.log(name, mean, prog_bar=name == "loss", batch_size=len(batch["task"]))
        return {"loss": loss, "mean_loss": means["loss"], "rows": rows}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and write the experts' new values into the weights."""
        super().optimizer_step(*args, **kwargs)
        write_experts(self.model)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss per target token of the global batch, plus the sum of the experts' penalties.

        Experts that ask for consistency predict each token twice, and pay for the divergence. The average of the loss
        over ranks is the loss of one process with all rows.
        """
        weight = consistency(self.model) if self.model.training else 0.0
        divergence: Tensor | None = None
        if weight:
            sums, counts, divergence = paired_losses(self.model, batch)
        else:
            sums, counts = batch_losses(self.model, batch)
        tokens = counts.sum()
        if self.trainer.world_size > 1:
            distributed.all_reduce(tokens)
        tokens = tokens.clamp(min=1) / self.trainer.world_size
        loss = sums.sum() / tokens
        terms = penalties(self.model)
        if divergence is not None:
            terms["consistency"] = weight * divergence / tokens
        self._penalties = {name: term.detach() for name, term in terms.items()}
        return sum(terms.values(), start=loss)

    def on_test_start(self) -> None:
        """Warn of applied experts that meet rows or a base in another form than in their training."""
        if self.trainer.state.fn != "fit" and self.trainer.is_global_zero:
            data: Any = getattr(self.trainer, "datamodule", None)
            reading = getattr(data, "reading_of", lambda tasks: dict[str, Any]())
            warn_unlike_training(self.applied_experts, reading, self.dtype_name)

    on_validation_start = on_predict_start = on_test_start

    def on_validation_epoch_start(self) -> None:
        """Set the scores of all tasks to zero."""
        roles = getattr(getattr(self.trainer, "datamodule", None), "roles", None)
        if roles is None:
            raise ValueError("scores need a data module with `roles`, a dict from task name to role")
        self.scores = TaskScores(roles, self.metrics).to(self.device)
        self._packs_evaluation = packs_evaluation(self.model)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch; within `fit` by its loss, unless `generate_in_fit`."""
        generates = self.generate_in_fit or self.trainer.state.fn != "fit"
        tokens = self.max_new_tokens if generates else None
        score_batch(self.scores, self.model, self.tokenizer, batch, tokens, self._packs_evaluation)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch by its loss, greedy generations and choices."""
        score_batch(self.scores, self.model, self.tokenizer, batch, self.max_new_tokens, self._packs_evaluation)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return the task, input, target and generation of each row; a row of the data without a target has none."""
        answers = generate_tokens(self.model, self.tokenizer, batch, self.max_new_tokens)
        cut = cut_answers(self.model, self.tokenizer, batch, answers, self.max_new_tokens)
        self._cut += [one for one, filler in zip(cut, is_filler(batch), strict=True) if not filler]
        texts = answer_texts(self.tokenizer, batch, answers)
        columns = zip(batch["task"], batch["input"], batch["target"], texts, strict=True)
        rows = [dict(zip(("task", "input", "target", "generation"), row, strict=True)) for row in columns]
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def on_predict_epoch_start(self) -> None:
        """Forget which answers of an earlier prediction the context ended."""
        self._cut: list[bool] = []

    def on_predict_epoch_end(self) -> None:
        """Log how many answers of this process the context ended."""
        warn_of_cut_answers(self.model, sum(self._cut), len(self._cut), self.max_new_tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over tasks as `val_loss`, and each task's."""
        self.on_test_epoch_end()
        self.log_dict({f"val_loss/{name}": task["loss"] for name, task in self.results["tasks"].items()})
        losses = [task["loss"] for task in self.results["tasks"].values()]
        self.log("val_loss", sum(losses) / max(len(losses), 1), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        """Compute the results of all tasks, and name what was scored."""
        self.results = self.scores.compute()
        for name, cut in self.scores.cut.items() if self.trainer.is_global_zero else ():
            rows = self.results["tasks"].get(name, {}).get("rows", 0)
            warn_of_cut_answers(self.model, cut, rows, self.max_new_tokens, name)
        self.results["model"] = {
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the base, and the random state of every rank: without it, dropout would differ after a resume."""
        # Plain numbers and tensors, so that a checkpoint loads with `weights_only=True`.
        version, numbers, gauss = random.getstate()
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        states: list[Any] = [state] * self.trainer.world_size
        if self.trainer.world_size > 1:
            distributed.all_gather_object(states, state)
        checkpoint["base_fingerprint"] = self.fingerprint
        checkpoint["random_states"] = states
        checkpoint["resized"] = self._resized

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint was written with another base, or with experts of other types or sizes."""
        self.configure_model()
        if self._trainer is not None:
            # Lightning does so after the checkpoint is loaded, which would round what was trained in float64.
            self._trainer.precision_plugin.convert_module(self)
        base = checkpoint.get("base_fingerprint")
        if base != self.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on a base with fingerprint {str(base)[:12]}, and {self.base} has "
                f"{self.fingerprint[:12]}; give the base that it was trained on"
            )
        # Experts that no schedule resized have the sizes of their settings. Version 1 wrote no such key.
        self._resized |= checkpoint.get("resized", True)
        if self._resized:
            self.resize_like(checkpoint["state_dict"])
        ours, theirs = (
            {key: tuple(tensor.shape) for key, tensor in state.items()}
            for state in (self.state_dict(), checkpoint["state_dict"])
        )
        unlike = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if unlike:
            raise ValueError(
                f"the checkpoint's experts are not those configured: {len(unlike)} tensors differ, first {unlike[0]}, "
                f"with shape {theirs.get(unlike[0])} there and {ours.get(unlike[0])} here; give the expert and modules "
                "of the checkpoint"
            )
        self._random_states = checkpoint.get("random_states")

    def resize_like(self, state: dict[str, Any]) -> None:
        """Give each expert the sizes that its tensors have in a checkpoint."""
        for name, layer in expert_layers(self.model):
            prefix = f"model.{name.removesuffix('weight')}expert."
            theirs = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if theirs:
                layer.expert.size_like(layer.matrix, theirs)

    def task_vector(self) -> Iterable[tuple[str, Delta]]:
        """Yield `(weight name, delta)` for each expert, on the CPU, one at a time."""
        for name, delta in task_vector(self.model, self._anchor):
            yield name, delta.to("cpu")

    def expert_state(self) -> dict[str, Tensor]:
        """Return the tensors that experts keep beside their deltas, on the CPU, by `<weight>/<name>`."""
        return {name: tensor.to("cpu") for name, tensor in expert_state(self.model).items()}

    def record_facts(self) -> dict[str, Any]:
        """Return kind, base, settings, training and parents of the experts, in plain values, for their record."""
        facts = describe_experts(self.model)
        if self.experts is None:  # of one factory, the first expert's settings; its kernel may differ by the layer
            facts["hyperparameters"] = next(expert_layers(self.model))[1].expert.settings()
        settings = {name: self.hparams.get(name) for name in ("modules", "optimizer", "scheduler", "dtype")}
        if isinstance(self.experts, Mapping):
            settings["modules"] = list(self.experts)
        settings |= facts["hyperparameters"] | {"learning_rate": max(self._peak_rates(), default=None)}
        return {
            **facts,
            "base": {"id": self.base, "revision": self.revision, "fingerprint": self.fingerprint},
            "hyperparameters": settings,
            "training": self._training_facts(),
            "parents": as_parents(self.applied_experts),
        }

    def _training_facts(self) -> dict[str, Any]:
        data: Any = getattr(self.trainer, "datamodule", None)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        facts = {
            "batch_size": getattr(data, "batch_size", None),
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "rows": next((one.rows for one in callbacks if isinstance(one, LogProgress)), None),
            "dtype": self.dtype_name,
            "precision": str(self.trainer.precision),
            "config": None if self.config_file is None else str(self.config_file),
            "data": getattr(data, "contents", {}),
        }
        return facts | getattr(data, "reading", {})

    def _peak_rates(self) -> list[float]:
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return [group.get("initial_lr", group["lr"]) for group in groups]

    def _anchor(self, name: str) -> Tensor:
        """Read a base weight from its file and add the applied experts, as before training."""
        weight = self.opened_base.weight(name).to(getattr(torch, self.dtype_name))
        moved = [expert[name] for expert in self.applied_experts if name in expert]
        return add(moved).add_to(weight.clone()) if moved else weight


def _is_plain(value: Any) -> bool:
    """Return whether a checkpoint may hold a setting: it is loaded as numbers, texts and containers of these."""
    if isinstance(value, dict | list):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int | float | None)
