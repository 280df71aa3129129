"""Keep what a checkpoint of a training holds, and say what it trains, in a log and in the record of the expert."""

import dataclasses
import logging
import random
import types
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from modular_experts.data.batch import source_of
from modular_experts.experts import SparseExpert
from modular_experts.injection import ExpertLayer, expert_layers, named_experts
from modular_experts.language_model import acts_on_answers
from modular_experts.library import StoredExpert
from modular_experts.library.record import Facts, Record
from modular_experts.selection.schedule import TrainingLength, callbacks_of
from modular_experts.training.log_progress import LogProgress

log = logging.getLogger(__name__)


def is_plain(value: object) -> bool:
    """Return whether a checkpoint may hold a setting: it is loaded as numbers, texts and containers of these."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return isinstance(value, str | int | float | None)


def as_config(value: Any) -> Any:
    """Return settings in which classes and objects stand as a YAML file names them; refuse what has no such form."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: as_config(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_config(item) for item in value]
    if isinstance(value, type | types.FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial) and not value.args:
        return {"class_path": as_config(value.func), "init_args": as_config(value.keywords)}
    if dataclasses.is_dataclass(value):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]
        settings = {field.name: as_config(content) for field, content in fields if content is not field.default}
        # A task stands by its fields where a list of tasks is wanted.
        return settings if hasattr(value, "held_in") else {"class_path": as_config(type(value)), "init_args": settings}
    raise ValueError(f"{value!r} has no form in a config; name its class, or {{class_path: ..., init_args: ...}}")


def repeat_step(checkpoint: Facts, parts: int) -> bool:
    """Let a checkpoint within a step go on from the first of the step's batches; return whether it is within one."""
    # No checkpoint holds the gradients of batches before it.
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current = progress["current"]
    ends_epoch = progress["is_last_batch"] and current["processed"] == current["ready"]
    begun = 0 if ends_epoch else current["processed"] % parts
    # An exception within a batch leaves it ready; what it drew is drawn again.
    is_within = begun > 0 or current["processed"] < current["ready"]
    if is_within:
        progress["is_last_batch"] = False
        for counts in (current, progress["total"]):
            counts |= dict.fromkeys(counts, counts["processed"] - begun)
    return is_within


def random_state() -> Record:
    """Return the random state of this process: without it, dropout would differ after a resume."""
    version, numbers, gauss = random.getstate()
    state: Record = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(states: Sequence[Facts], rank: int) -> None:
    """Take the random state of a rank; one that the checkpoint has no state for keeps its own."""
    if rank < len(states):
        torch.set_rng_state(states[rank]["torch"])
        version, numbers, gauss = states[rank]["python"]
        random.setstate((version, tuple(numbers), gauss))
        if "cuda" in states[rank] and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[rank]["cuda"])


def check_base(checkpoint: Facts, base: str, fingerprint: str, quantise: str | None = None) -> None:
    """Raise if a checkpoint was written with another base."""
    theirs = checkpoint.get("base_fingerprint")
    if theirs != fingerprint:
        raise ValueError(
            f"the checkpoint was trained on a base with fingerprint {str(theirs)[:12]}, and {base} has "
            f"{fingerprint[:12]}; give the base that it was trained on"
        )
    trained = checkpoint.get("quantise")
    if trained != quantise:
        raise ValueError(f"the checkpoint was trained with quantise={trained}, and quantise={quantise} is set now")


def check_sizes(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Raise if the tensors of a checkpoint have other names or sizes than the experts'."""
    ours = {key: tuple(tensor.shape) for key, tensor in own.items()}
    theirs = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    unlike = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if unlike:
        raise ValueError(
            f"the checkpoint's experts are not those configured: {len(unlike)} tensors differ, first {unlike[0]}, "
            f"with shape {theirs.get(unlike[0])} there and {ours.get(unlike[0])} here; give `expert=` and "
            "`modules=` as the fit that wrote it had them"
        )


def described(kind: str, settings: Facts) -> str:
    """Return the type of an expert with its settings, as they would be written in Python."""
    return f"{kind}({', '.join(f'{name}={value}' for name, value in settings.items())})"


def trained_facts(model: nn.Module, applied: Sequence[StoredExpert]) -> Record:
    """Return which experts are trained by place, whether they act on rows or answers, and which lie beneath."""
    experts: Record = {}
    for place, expert in named_experts(model):
        # Which kernel computes a gradient depends on the machine.
        settings = {name: value for name, value in expert.settings().items() if name != "backend"}
        experts[place] = [type(expert).__name__, settings]
    acts_on = "answer" if acts_on_answers(model) else "row"
    beneath = {stored.content_hash: stored.name for stored in applied}
    return {"experts": experts, "acts_on": acts_on, "applied": beneath}


def check_facts(checkpoint: Facts, own: Facts) -> None:
    """Raise if a checkpoint was trained with other experts, or on top of others; older ones do not tell."""
    theirs = {name: checkpoint.get(name, facts) for name, facts in own.items()}
    before = now = ""
    if own["acts_on"] != checkpoint.get("acts_on", "row"):
        before = f"acts_on={checkpoint.get('acts_on', 'row')}"
        now = f"acts_on={own['acts_on']}"
    if own["applied"].keys() != theirs["applied"].keys():
        before = _applied_text(theirs["applied"])
        now = _applied_text(own["applied"])
    for place, expert in own["experts"].items():
        trained = theirs["experts"].get(place, expert)
        if trained != expert:
            before = described(*trained)
            now = described(*expert)
            break
    if before:
        raise ValueError(f"the checkpoint was trained with {before}, and {now} is set now; set the former again")


def _applied_text(applied: Mapping[str, str]) -> str:
    names = [f"{name} ({content_hash[:12]})" for content_hash, name in applied.items()]
    return f"applied=[{', '.join(names)}]"


def resize_like(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give each expert of a model the sizes that its tensors have in a checkpoint."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, _, own = key.partition(".expert.")
        by_layer.setdefault(layer, {})[own] = value
    for name, module in model.named_modules():
        if isinstance(module, ExpertLayer) and (theirs := by_layer.get(f"model.{name}")):
            module.expert.size_like(module.matrix, theirs)


def read_anchors(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Read a sparse expert's entries of the base from the base itself if either run has `shard_base`, without them."""
    for name, layer in model.named_modules():
        expert = getattr(layer, "expert", None)
        place = f"model.{name}.expert."
        stored = state.get(f"{place}anchor")
        if not isinstance(layer, ExpertLayer) or not isinstance(expert, SparseExpert) or stored is None:
            continue
        if (stored.numel() == 0) != (expert.anchor.numel() == 0):
            expert.restore(layer.matrix)
            state[f"{place}anchor"] = expert.base_of(layer.matrix, state[f"{place}indices"])


def peak_rates(trainer: Trainer) -> list[float]:
    """Return the highest learning rate of each group of trained parameters."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [group.get("initial_lr", group["lr"]) for group in groups]


def log_training(model: nn.Module, trainer: Trainer, length: TrainingLength) -> None:
    """Log the experts, how many numbers they train, and the length of the training."""
    layers = [layer for _, layer in expert_layers(model)]
    experts = [expert for _, expert in named_experts(model)]
    kinds = {described(type(expert).__name__, expert.settings()) for expert in experts}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    places = f"{len(layers)} weights"
    others = len(experts) - len(layers)
    if others:
        places += f" and {others} other modules"
    size = sum(layer.matrix.numel() for layer in layers)
    share = f", {trained / size:.2%} of these weights" if size else ""
    log.info("%s in %s: %s trained parameters%s", ", ".join(sorted(kinds)), places, f"{trained:,}", share)
    rates = sorted({f"{rate:g}" for rate in peak_rates(trainer)})
    facts = [f"learning rate {' and '.join(rates)}"]
    rows = source_of(trainer).batch_size
    parts = trainer.accumulate_grad_batches
    if rows:
        facts.append(f"batch size {rows} x {parts} accumulated" if parts > 1 else f"batch size {rows}")
    epochs = f"{length.total_steps / length.steps_per_epoch:.3g}"
    unit = "epoch" if epochs == "1" else "epochs"
    facts.append(f"{length.total_steps} steps ({epochs} {unit})")
    log.info("%s", ", ".join(facts))


def training_facts(trainer: Trainer, dtype: str, config_file: Path | None) -> Facts:
    """Return how an expert was trained, for its record."""
    source = source_of(trainer)
    return {
        "batch_size": source.batch_size or None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "rows": next((progress.rows for progress in callbacks_of(trainer, LogProgress)), None),
        "dtype": dtype,
        "precision": str(trainer.precision),
        "config": None if config_file is None else str(config_file),
        "data": source.contents,
    } | dict(source.reading)
