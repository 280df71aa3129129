"""Predict the memory of a fit without its base: two training steps on tensors that have shapes and no numbers."""

import itertools
import logging
import weakref
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from modular_experts.base import Base
from modular_experts.base.quantised import packed, quantised_shapes, quantiser
from modular_experts.data import Batch, TaskMixture
from modular_experts.data.batch import IGNORED, MOST_BATCHES, size_of
from modular_experts.evaluation.likelihood import HEAD_BYTES, PART
from modular_experts.experts import SparseExpert
from modular_experts.injection import context_length, expert_layers, extra_losses, inject, moves_tokens_alone
from modular_experts.native.kernel import KeptGradient
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.selection.schedule import Schedule, callbacks_of
from modular_experts.training import loading
from modular_experts.training.activations import high_water, recompute
from modular_experts.training.estimate import FitEstimate, estimate_of, logging_from, memory_of, validations_of
from modular_experts.training.learning_rate import training_length
from modular_experts.training.module import ExpertModule


class UnpredictableError(ValueError):
    """Shapes alone do not tell what a fit takes."""


class Held(TorchDispatchMode):
    """Counts, while it is on, the bytes of each tensor that an operator makes, until nothing refers to it any more.

    Attributes:
        bytes: What is there now.
        most: The most that was there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._there: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self.count(tensor)
        return found

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's memory, unless another tensor shares it and is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._there:
            self._there.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage: int, size: int) -> None:
        self._there.discard(storage)
        self.bytes -= size


class _HeldOfShapes(Held):
    """Counts bytes of fake tensors, and supposes that each expert of a mixture-of-experts layer gets as many tokens."""

    _experts = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        real = given and not any(isinstance(one, FakeTensor) for one in given)
        if real and func is not torch.ops.aten.lift_fresh.default:  # which makes a fake tensor of a constant
            with unset_fake_temporarily():  # numbers of experts, or what stands for a quantised weight
                return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.nonzero.default:
            return self._chosen(given[0])
        if func is torch.ops.aten._grouped_mm.default:  # which knows shapes in bfloat16 alone
            args, kwargs, func = (given[0], given[1][0]), {}, torch.ops.aten.mm.default
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _chosen(self, where: Tensor) -> Tensor:
        """Return which experts get tokens `(experts, 1)`, or which choices and tokens `(tokens, 2)` an expert gets.

        The base asks which experts it must run (the last number stands for none), and then for each of them, which of
        the places `(choices, tokens)` are its own.
        """
        if where.ndim == 1:
            self._experts = len(where) - 1
            with unset_fake_temporarily():
                return torch.arange(len(where))[:, None]
        return where.new_empty(-(-where.numel() // self._experts), where.ndim, dtype=torch.int64)


class BatchShape(NamedTuple):
    """What of a batch decides how much memory a step takes."""

    rows: int
    length: int
    labelled: int
    padded: bool
    packed: bool

    @classmethod
    def of(cls, batch: Batch) -> "BatchShape":
        packed, labels = "row" in batch, batch["labels"]
        padded = not packed and not bool(batch["attention_mask"].all())
        return cls(labels.shape[0], labels.shape[1], int((labels[:, 1:] != IGNORED).sum()), padded, packed)


class _Planned(KeptGradient):
    """Stands for the kernels of a CPU, which make no more than the gradient of the kept units."""

    name = "planned"

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        tile = () if self.tile == (1, 1) else self.tile
        return x.new_empty(self.units.numel(), *tile, dtype=torch.float32)


def predict(module: ExpertModule, data: TaskMixture, trainer: Trainer) -> FitEstimate:
    """Predict the memory of the fit of these three, for one process, from shapes alone: the base is not loaded.

    Deltas that are applied first take no memory of their own. Afterwards the module has a `model` without numbers and
    cannot be trained; the data have a tokenizer already.

    Raises:
        UnpredictableError: The base is in memory, or quantised by another library than bitsandbytes, the loss is of
            preferences, an expert that is applied first chooses by the input, or the model does not compute with
            shapes alone.
        ValueError: What a fit would refuse.
    """
    device = trainer.strategy.root_device
    with logging_from(logging.CRITICAL, "modular_experts", "lightning.pytorch", "torch._subclasses.fake_tensor"):
        module.trainer = data.trainer = trainer  # which tells how many processes share a batch
        module.setup("fit")
        base = _predictable_base(module)
        data.setup("fit")
        length = training_length(trainer, len(data.train_dataloader()))
        python, mode, held = high_water(device), FakeTensorMode(), _HeldOfShapes()
        model, dtype = base.structure.model, getattr(torch, module.dtype_name)
        if form := quantiser(base.quantise, dtype) if base.quantise else base.quantisation:
            quantised_shapes(model, form, dtype)
        with mode, held:
            module.model = _with_experts(module, model, device)
            optimizer = module.make_optimizer()
        data.fit_context(context_length(module.model))
        data.choose_packing(lambda: moves_tokens_alone(module.model))
        loaders = data.train_dataloader(), data.val_dataloader()
        train, validation = (list(itertools.islice(one, MOST_BATCHES)) for one in loaders)
        validations = validations_of(trainer, data, length, len(validation))
        shapes = [BatchShape.of(max(found, key=size_of)) for found in (train, validation) if found]
        with mode, held:
            _rehearse(module, optimizer, trainer, shapes[0], shapes[1:] if validations else [])
        choices = [
            one.expected_choices(trainer, module, length, 0.0)[0]
            for one in callbacks_of(trainer, Schedule) or [MaskSchedule()]
        ]
    # On Linux, most of the memory of freed gradients was seen to stay unused when the next ones were made.
    freed = sum(one.nbytes for one in module.parameters() if one.requires_grad) if device.type == "cpu" else 0
    most = python + held.most + native_plans(module.model) + freed
    parts = memory_of(module, optimizer_bytes([optimizer]), python, most)
    told = {"length": length, "choices": sum(choices), "validations": validations, "bytes": parts}
    return estimate_of(module, data, trainer, optimizer, **told, predicted=True)


def _predictable_base(module: ExpertModule) -> Base:
    """Return the base of a module on disk; raise if the memory of a fit on it cannot be predicted."""
    if not module.reads_base:
        raise UnpredictableError("shapes predict what a fit takes on a base on disk; give its directory as base")
    applied = loading.open_applied(module.applied, trains=True)
    base = loading.opened_base(module.base, applied, module.revision, module.quantise)
    reasons = ["with a loss of preferences"] * bool(module.preferences)
    reasons += ["on top of a routed expert"] * any(expert.is_routed for expert in applied)
    method = (base.quantisation or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or (base.quantise or "").endswith("-torchao"):
        reasons.append("on a base that another library than bitsandbytes quantises")
    if reasons:
        raise UnpredictableError(
            f"the memory of a fit {reasons[0]} cannot be predicted; a dry run without a size to fit into loads the base"
        )
    return base


def _rehearse(
    module: ExpertModule, optimizer: Optimizer, trainer: Trainer, train: BatchShape, validation: list[BatchShape]
) -> None:
    """Pass validation batches forward and take two training steps; raise if that needs numbers."""
    try:
        for shape in validation:
            with torch.no_grad():
                loss_of(module.model, shape, trainer)
        # The second step begins with the gradients and the moments of the first.
        for _ in range(2):
            loss = loss_of(module.model, train, trainer)
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    except RuntimeError as error:
        # Most often because what is computed depends on numbers, such as the choices of a router.
        raise UnpredictableError(
            f"the memory of a fit of {module.base} cannot be predicted, because its model does not compute with "
            f"shapes alone ({type(error).__name__}); a dry run without a size to fit into loads it"
        ) from None


def _with_experts(module: ExpertModule, model: Any, device: torch.device) -> nn.Module:
    """Return the model with experts in it, as the module would load it, but for the numbers."""
    made: dict[int, Tensor] = {}
    dtype = getattr(torch, module.dtype_name)
    for part in model.modules():
        for name, one in part._parameters.items():
            if one is not None and id(one) not in made:
                kind = dtype if one.is_floating_point() else one.dtype
                if type(one) is nn.Parameter:
                    made[id(one)] = nn.Parameter(torch.empty(one.shape, dtype=kind, device=device), requires_grad=False)
                else:
                    with device:
                        made[id(one)] = packed(one, dtype)
            part._parameters[name] = one if one is None else made[id(one)]
        for name, one in part._buffers.items():
            part._buffers[name] = one if one is None else torch.empty(one.shape, dtype=one.dtype, device=device)
    if module.gradient_checkpointing:
        recompute(model)
    inject(model, cast(Any, module.experts or module.expert), module.modules_pattern)
    loading.hold_values(model, getattr(torch, module.values))
    for expert in _with_plan(model) if device.type == "cpu" else ():
        expert.chooser = _Planned(expert.indices, expert.shape, expert.tile)
    return model.train()


def _with_plan(model: nn.Module) -> list[SparseExpert]:
    found = [layer.expert for _, layer in expert_layers(model) if isinstance(layer.expert, SparseExpert)]
    return [one for one in found if one.granularity in ("element", "block")]


def native_plans(model: nn.Module) -> int:
    """Return the bytes of the native kernels' plans: 8 for an entry, and 4 for a tile."""
    planned = [one for one in _with_plan(model) if one.chooser is not None]
    return sum(one.kept_units * (8 if one.granularity == "element" else 4) for one in planned)


def loss_of(model: Any, shape: BatchShape, trainer: Trainer) -> Tensor:
    """Return the loss of a batch as `batch_losses` makes it, which looks at numbers to find the labelled tokens."""
    device, head = trainer.strategy.root_device, model.get_output_embeddings()
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64, device=device)
    places, labels = (torch.zeros(shape.labelled, dtype=torch.int64, device=device) for _ in range(2))
    in_parts = 4 * shape.labelled * head.weight.shape[0] > HEAD_BYTES and type(head) is nn.Linear
    states: list[Tensor] = []

    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(arguments[0][places, places])
        return (states[0][None, : 1 if in_parts else None], *arguments[1:])

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), y, reduction="none")

    inputs = {"attention_mask": ids + 1} if shape.padded else {"position_ids": ids} if shape.packed else {}
    hook = head.register_forward_pre_hook(gather)
    try:
        with trainer.precision_plugin.forward_context():
            logits = model(input_ids=ids, **inputs, use_cache=False).logits[0]
            hook.remove()
            if in_parts and torch.is_grad_enabled():
                parts = zip(states.pop().split(PART), labels.split(PART), strict=True)
                found = [checkpoint(lambda x, y: losses(head(x), y), *part, use_reentrant=False) for part in parts]
            else:
                found = [losses(logits, labels)]
            return sum(extra_losses(model).values(), start=torch.cat(found).sum())
    finally:
        hook.remove()
