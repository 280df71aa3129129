"""Predict the memory of a fit without its base: two training steps on tensors that have shapes and no numbers.

`measure_fit` measures instead, and tells the time too, where the base can be loaded.
"""

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from modular_experts.base import Base
from modular_experts.base.quantised import packed, quantised_shapes, quantiser
from modular_experts.data import Batch, TaskMixture
from modular_experts.data.batch import MOST_BATCHES, size_of
from modular_experts.evaluation import batch_losses
from modular_experts.experts import SparseExpert
from modular_experts.injection import context_length, expert_layers, extra_losses, inject, moves_tokens_alone
from modular_experts.language_model import is_classifier
from modular_experts.native.kernel import KeptGradient
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.selection.schedule import Schedule, callbacks_of
from modular_experts.text import bytes_text
from modular_experts.training import loading
from modular_experts.training.activations import high_water, recompute
from modular_experts.training.estimate import Change, FitEstimate, facts_of_fit, logging_from, memory_of, validations_of
from modular_experts.training.learning_rate import training_length
from modular_experts.training.module import ExpertModule

Settings = dict[str, dict[str, Any]]
"""Arguments of `ExpertModule`, `TaskMixture` and Lightning's `Trainer`, by `model`, `data` and `trainer`."""


class UnpredictableError(ValueError):
    """Shapes alone do not tell what a fit takes."""


class LiveBytes(TorchDispatchMode):
    """Counts, while it is on, the bytes of each tensor that an operator makes, until nothing refers to it any more.

    Attributes:
        bytes: The bytes that are held now.
        most: The most that was held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.most = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's memory, unless another tensor shares it and is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._counted:
            self._counted.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage: int, size: int) -> None:
        self._counted.discard(storage)
        self.bytes -= size


class _LiveBytesOfShapes(LiveBytes):
    """Counts bytes of fake tensors, and supposes that each expert of a mixture-of-experts layer gets as many tokens."""

    _experts = 1

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        are_real = bool(inputs) and not any(isinstance(tensor, FakeTensor) for tensor in inputs)
        # `lift_fresh` makes a fake tensor of a constant, which is real.
        if are_real and func is not torch.ops.aten.lift_fresh.default:
            # The batch, numbers of experts, or a stand-in for a quantised weight: they are computed with.
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            # The labels are real, so they tell how many places of a tensor without numbers have one.
            args = (args[0], _numbered(args[1]), *args[2:])
        if func is torch.ops.aten.equal.default:
            # Whether the logits are the head's own; most models give them so.
            return True
        if func is torch.ops.aten.nonzero.default:
            return self._chosen(inputs[0])
        if func is torch.ops.aten._grouped_mm.default:
            # This operator has shapes for bfloat16 alone; a product with the matrix of one expert takes as much.
            return super().__torch_dispatch__(torch.ops.aten.mm.default, types, (inputs[0], inputs[1][0]))
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
        tokens = math.ceil(where.numel() / self._experts)
        return where.new_empty(tokens, where.ndim, dtype=torch.int64)


def _numbered(places: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the indices of a tensor with numbers in the place of each real mask."""
    indices: list[Tensor | None] = []
    for place in places:
        if place is None or isinstance(place, FakeTensor) or place.dtype != torch.bool:
            indices.append(place)
        else:
            with unset_fake_temporarily():
                indices += place.nonzero(as_tuple=True)
    return indices


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
        # Module and data ask it how many processes share a batch.
        module.trainer = trainer
        data.trainer = trainer
        module.setup("fit")
        base = _predictable_base(module)
        data.setup("fit")
        length = training_length(trainer, len(data.train_dataloader()))
        python = high_water(device)
        model = _shapes_of(base, module)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        live = _LiveBytesOfShapes()
        with fake, live:
            module.model = _with_experts(module, model, device)
            optimizer = module.make_optimizer()
        data.fit_context(context_length(module.model))
        data.choose_packing(lambda: moves_tokens_alone(module.model))
        train = list(itertools.islice(data.train_dataloader(), MOST_BATCHES))
        validation = list(itertools.islice(data.val_dataloader(), MOST_BATCHES))
        validations = validations_of(trainer, data, length, len(validation))
        validated = [max(validation, key=size_of)] if validations else []
        with fake, live:
            _rehearse(module, optimizer, trainer, max(train, key=size_of), validated)
        choices = [
            schedule.expected_choices(trainer, module, length, 0.0)[0]
            for schedule in callbacks_of(trainer, Schedule) or [MaskSchedule()]
        ]
    # On Linux, most of the memory of freed gradients was seen to stay unused when the next ones were made.
    freed = 0
    if device.type == "cpu":
        freed = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    most = python + live.most + native_plans(module.model) + freed
    return replace(
        facts_of_fit(module, data, trainer, optimizer, length),
        choices=sum(choices),
        validations=validations,
        bytes=memory_of(module, optimizer_bytes([optimizer]), python, most),
        predicted=True,
    )


def _predictable_base(module: ExpertModule) -> Base:
    """Return the base of a module on disk; raise if the memory of a fit on it cannot be predicted."""
    if not module.reads_base:
        raise UnpredictableError("shapes predict what a fit takes on a base on disk; give its directory as base")
    applied = loading.open_applied(module.applied, trains=True)
    base = loading.opened_base(module.base, applied, module.revision, module.quantise)
    method = (base.quantisation or {}).get("quant_method", "bitsandbytes")
    reason = ""
    if module.preferences:
        reason = "with a loss of preferences"
    elif module.acts_on == "answer":
        reason = "of experts that act on answers alone"
    elif is_classifier(base.structure.model):
        reason = "on a base that classifies"
    elif any(expert.is_routed for expert in applied):
        reason = "on top of a routed expert"
    elif method != "bitsandbytes" or (base.quantise or "").endswith("-torchao"):
        reason = "on a base that another library than bitsandbytes quantises"
    if reason:
        raise UnpredictableError(
            f"the memory of a fit {reason} cannot be predicted; a dry run without a size to fit into loads the base"
        )
    return base


def _shapes_of(base: Base, module: ExpertModule) -> PreTrainedModel:
    """Return the base's model on the meta device, with quantised layers where the fit has them."""
    model: PreTrainedModel = base.structure.model
    dtype = getattr(torch, module.dtype_name)
    form = quantiser(base.quantise, dtype) if base.quantise else base.quantisation
    if form:
        quantised_shapes(model, form, dtype)
    return model


def _rehearse(
    module: ExpertModule, optimizer: Optimizer, trainer: Trainer, train: Batch, validation: list[Batch]
) -> None:
    """Pass validation batches forward and take two training steps; raise if that needs numbers."""

    def loss_of(batch: Batch) -> Tensor:
        with trainer.precision_plugin.forward_context():
            losses, _ = batch_losses(module.model, move_data_to_device(batch, trainer.strategy.root_device))
            return sum(extra_losses(module.model).values(), start=losses.sum())

    try:
        for batch in validation:
            with torch.no_grad():
                loss_of(batch)
        # The second step begins with the gradients and the moments of the first.
        for _ in range(2):
            loss = loss_of(train)
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


def _with_experts(module: ExpertModule, model: PreTrainedModel, device: torch.device) -> nn.Module:
    """Return the model with experts in it, as the module would load it, but for the numbers."""
    dtype = getattr(torch, module.dtype_name)
    # A tied weight is one parameter under several names, here too.
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _without_numbers(parameter, dtype, device)
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    if module.gradient_checkpointing:
        recompute(model)
    inject(model, module.planned_experts, module.modules_pattern)
    loading.hold_values(model, getattr(torch, module.values))
    # A kernel of a CPU would plan by the numbers of the support.
    for expert in _with_plan(model) if device.type == "cpu" else ():
        expert.chooser = _Planned(expert.indices, expert.shape, expert.tile)
    return model.train()


def _without_numbers(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a frozen parameter of the shape and data type that a loaded base has, packed where it is quantised."""
    if type(parameter) is not nn.Parameter:
        with device:
            return packed(parameter, dtype)
    loaded = dtype if parameter.is_floating_point() else parameter.dtype
    return nn.Parameter(torch.empty(parameter.shape, dtype=loaded, device=device), requires_grad=False)


def _with_plan(model: nn.Module) -> list[SparseExpert]:
    """Return the experts whose native kernel plans for each support, which keep entries or tiles."""
    sparse = [layer.expert for _, layer in expert_layers(model) if isinstance(layer.expert, SparseExpert)]
    return [expert for expert in sparse if expert.granularity in ("element", "block")]


def native_plans(model: nn.Module) -> int:
    """Return the bytes of the native kernels' plans: 8 for an entry, and 4 for a tile."""
    planned = [expert for expert in _with_plan(model) if expert.chooser is not None]
    return sum(expert.kept_units * (8 if expert.granularity == "element" else 4) for expert in planned)


def changes_to_fit(
    most: int, estimate: FitEstimate, savings: Iterator[dict[str, bool | int | str]], peak_of: Callable[[Settings], int]
) -> list[Change]:
    """Return changes after which the fit of an estimate takes at most `most` bytes; none if it does already.

    Each of the `savings` is tried on top of the earlier ones that help, and `peak_of` predicts the memory of the fit
    with them. Raise ValueError if all of them together are not enough.
    """
    peak = estimate.peak
    changes: list[Change] = []
    taken: Settings = {"model": {}, "data": {}, "trainer": {}}
    for settings in savings:
        if peak <= most:
            return changes
        tried = {group: dict(arguments) for group, arguments in taken.items()}
        for name, value in settings.items():
            group, _, argument = name.partition(".")
            tried[group][argument] = value
        try:
            smaller = peak_of(tried)
        except ValueError:  # such as values in bfloat16 of a full expert
            continue
        # Less than a hundredth is not worth a slower or a rounded fit.
        if smaller < 0.99 * peak:
            # A smaller batch takes the place of the one before it.
            if changes and changes[-1].settings.keys() == settings.keys():
                changes.pop()
            changes.append(Change(settings, smaller))
            peak = smaller
            taken = tried
    if peak <= most:
        return changes
    tried_all = ""
    if changes:
        arguments = (f"`{name}={value!r}`" for change in changes for name, value in change.settings.items())
        tried_all = f" and {bytes_text(peak)} with {' '.join(arguments)}"
    raise ValueError(
        f"nothing makes this fit take at most {bytes_text(most)}: it takes {bytes_text(estimate.peak)}{tried_all}; "
        "take fewer layers, a smaller share of them, shorter rows or a smaller base"
    )


def savings_of(module: ExpertModule, batch_size: int, parts: int) -> Iterator[dict[str, bool | int | str]]:
    """Yield settings that take less memory, cheapest first; the steps of the fit and their rows stay the same.

    Gradient checkpointing costs a second forward pass, and a batch in parts makes each product smaller; a base in
    bfloat16 rounds the weights beside the experts, and values in bfloat16 round what is trained. A step has `parts`
    batches of `batch_size` rows.
    """
    if not module.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    while batch_size % 2 == 0:
        batch_size //= 2
        parts *= 2
        yield {"data.batch_size": batch_size, "trainer.accumulate_grad_batches": parts}
    if module.dtype_name == "float32":
        yield {"model.dtype": "bfloat16", "trainer.precision": "bf16-mixed"}
    if module.values == "float32":
        yield {"model.values": "bfloat16"}
