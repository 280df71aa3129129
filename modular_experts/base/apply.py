"""Apply: add experts to their base, and write the sum as an ordinary Hugging Face checkpoint that has proved itself.

The checkpoint is loaded again with plain transformers before it takes its place, and its logits are compared with those
of the model in memory. Merge rules are not applied here: several experts are simply added.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modular_experts.base.checkpoint import DType, find_base, fingerprint, load_base, quiet, resolve_base
from modular_experts.base.files import read_json
from modular_experts.base.streaming import Rounding, stored_keys, stream_sum
from modular_experts.base.structure import Skeleton, read_skeleton
from modular_experts.deltas import Delta, add
from modular_experts.deltas.task_vector import Sum, TaskVector
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_base,
    check_target,
    new_directory,
    open_experts,
    parent_ids,
    union_of_weights,
)
from modular_experts.library.record import package_versions, plain
from modular_experts.progress import Progress

__all__ = ["Check", "applied", "apply", "apply_deltas", "write_checkpoint"]

MANIFEST = "modular_experts.json"
_CARRIED = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "preprocessor_config.json", "generation_config.json", "LICENSE*"),
]


@dataclass(frozen=True)
class Check:
    """How far a reloaded checkpoint is from the model it was written from, and what its dtype could not hold.

    Attributes:
        largest_difference: Largest absolute difference of a logit over the fixed prompts.
        mean_difference: Mean absolute difference.
        tolerance: The largest that is accepted.
        prompts: Shape of the prompts, `(rows, tokens)`.
        rounding: What of the deltas was lost to rounding.
    """

    largest_difference: float
    mean_difference: float
    tolerance: float
    prompts: tuple[int, int]
    rounding: Rounding


def apply(
    experts: Sequence[str | Path],
    out: str | Path,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: DType | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
    check: bool = True,
) -> Check | None:
    """Write the base plus the sum of the experts' deltas as a full checkpoint, and check it by loading it again.

    Args:
        experts: Directories of the experts; their deltas are added up.
        out: Directory of the checkpoint.
        base: The base's directory or hub id; from the experts' record if none is given.
        revision: Branch, tag or commit of a hub id.
        dtype: Data type of the checkpoint; that of the base if none is given.
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded one.
        overwrite: Whether a checkpoint of ours that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.
        check: Whether the model is held in memory and loaded again; without it, no more than a weight is in memory.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The base is another one than the experts were trained on, a weight does not fit, or the reloaded
            checkpoint differs; nothing is written then.
    """
    target = check_target(out, overwrite, MANIFEST)
    opened = open_experts(experts)
    union_of_weights(opened)
    origin = {"experts": as_parents(opened)}
    key = json.dumps(parent_ids(origin["experts"]))
    return write_checkpoint(
        Sum(opened), opened, target, origin, base, revision, dtype, tolerance, overwrite, progress, check, key
    )


def write_checkpoint(
    deltas: TaskVector,
    experts: Sequence[StoredExpert],
    out: str | Path,
    origin: Mapping[str, Any],
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: DType | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
    check: bool = True,
    key: str | None = None,
) -> Check | None:
    """Write a base plus deltas as a full checkpoint, and check it by loading it again; `apply` says how.

    Args:
        deltas: The delta of each weight, asked for once, and its `shapes()`: a sum, a merge, an opened expert.
        experts: The experts that they were made from, which tell the base.
        out: Directory of the checkpoint.
        origin: What the manifest says about where the deltas come from.
        base: As for `apply`, and so are the others.
        revision: Branch, tag or commit of a hub id.
        dtype: Data type of the checkpoint.
        tolerance: Largest accepted difference of a logit.
        overwrite: Whether a checkpoint of ours that is there may be replaced.
        progress: Wraps the names of the weights.
        check: Whether it is checked.
        key: What the deltas depend on. With it, writing that was interrupted goes on with the file where it stopped.

    Raises:
        ValueError: As for `apply`.
    """
    target = check_target(out, overwrite, MANIFEST)
    place = str(base or find_base(experts[0]))
    mark = fingerprint(directory := resolve_base(place, revision))
    check_base(experts, mark, place)
    skeleton = read_skeleton(directory)
    check_fits(skeleton, deltas.shapes())
    whole = key and hashlib.sha256(json.dumps([key, mark, dtype, package_versions()]).encode()).hexdigest()
    with new_directory(target, overwrite, MANIFEST, whole) as temporary:
        found = _written(deltas, directory, skeleton, temporary, dtype, tolerance, progress, check)
        manifest = {"base": {"id": place, "revision": revision, "fingerprint": mark}, **origin}
        _write_manifest(temporary / MANIFEST, manifest, found)
    return found


def check_fits(skeleton: Skeleton, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse deltas that a model has no weight for, or a tied one.

    Raises:
        ValueError: A weight does not exist, has another shape, or is tied to another one.
    """
    for name, shape in shapes.items():
        if name not in skeleton.shapes:
            raise ValueError(_unknown_weight(skeleton.model, name, list(skeleton.shapes)))
        if skeleton.shapes[name] != shape:
            raise ValueError(_wrong_shape(skeleton.model, name, skeleton.shapes[name], shape))
        if skeleton.owners[name] != name:
            raise ValueError(_tied_weight(name, skeleton.owners[name]))


@torch.no_grad()
def apply_deltas(model: nn.Module, experts: Sequence[Mapping[str, Delta]], progress: Progress = iter) -> None:
    """Add the sum of experts to a model in place: taken in float32, rounded once to the dtype of each weight.

    Args:
        model: A model with the weights that the experts name, before experts are injected.
        experts: Name and delta of each weight, such as opened library experts.
        progress: Wraps the names of the weights while they are gone through.

    Raises:
        ValueError: A weight does not exist, has another shape, or is tied to another one; nothing has been added then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(parameter), name) for name, parameter in parameters.items()}
    shapes = {name: shape for expert in experts for name, shape in _shapes(expert).items()}
    for name, shape in shapes.items():
        if name not in parameters:
            raise ValueError(_unknown_weight(type(model).__name__, name, list(parameters)))
        if parameters[name].shape != shape:
            raise ValueError(_wrong_shape(type(model).__name__, name, parameters[name].shape, shape))
        if owners[name] != name:
            raise ValueError(_tied_weight(name, owners[name]))
    for name in progress(sorted(shapes)):
        delta = add([expert[name] for expert in experts if name in expert])
        delta.to(parameters[name].device).add_to(parameters[name])


@contextmanager
def applied(model: nn.Module, experts: Sequence[Mapping[str, Delta]], scale: float = 1.0) -> Iterator[None]:
    """Add experts to a model for a while; afterwards every weight is what it was, bit for bit.

    So many merges, or many scales of one, are measured on one loaded model. A copy of each moved weight is held.

    Args:
        model: As for `apply_deltas`.
        experts: Name and delta of each weight, such as opened library experts.
        scale: Factor of all deltas.
    """
    moved = {name for expert in experts for name in expert}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in moved}
    try:
        apply_deltas(model, [{name: expert[name] * scale for name in expert} for expert in experts])
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)


def _shapes(expert: Mapping[str, Delta]) -> dict[str, torch.Size]:
    return expert.shapes() if isinstance(expert, TaskVector) else {name: delta.shape for name, delta in expert.items()}


def _unknown_weight(model: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else f"; it has {', '.join(known[:3])} and others"
    return f"{model} has no weight {name}, which the expert moves{hint}"


def _wrong_shape(model: str, name: str, found: torch.Size, wanted: torch.Size) -> str:
    return f"{name} of {model} has shape {tuple(found)}, and its delta has {tuple(wanted)}"


def _tied_weight(name: str, owner: str) -> str:
    return (
        f"{name} is the same tensor as {owner} (tied), so it has no delta of its own; leave it out of the expert's "
        f"modules, store the delta under {owner}, which moves both, or train on a base whose embeddings are untied"
    )


def _written(
    deltas: TaskVector,
    base: Path,
    skeleton: Skeleton,
    directory: Path,
    dtype: DType | None,
    tolerance: float,
    progress: Progress,
    check: bool,
) -> Check | None:
    """Write the checkpoint, from the files of the base where they hold every weight that moves, else from memory."""
    streams = set(deltas) <= set(stored_keys(base, skeleton))
    model = load_base(base, None if streams else dtype) if check or not streams else None
    parameters = dict(model.named_parameters(remove_duplicate=False)) if model else {}
    kind = getattr(torch, dtype) if dtype else None
    with quiet():
        try:
            if streams:
                rounding = stream_sum(
                    base, skeleton, deltas, directory, kind, progress, partial(_add_to_model, parameters, kind)
                )
                _write_config(base, directory, dtype)
            else:
                assert model is not None
                rounding = _save_from_memory(model, deltas, directory, progress)
        except SafetensorError as error:
            raise OSError(f"the checkpoint could not be written: {error}") from error
        carry(base, directory)
    if model is None or not check:
        return None
    prompts = _prompts(model)
    for weight in parameters.values():  # one by one: `model.to` would round the tables of positions too
        weight.data = weight.to(kind) if kind else weight.data
    reference = _logits(model, prompts)
    del model, parameters
    return _compared(directory, prompts, reference, tolerance, rounding)


@torch.no_grad()
def _add_to_model(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype | None, name: str, delta: Delta) -> None:
    """Add a delta to the model in memory, which the checkpoint will be compared with."""
    if not parameters:
        return
    weight = parameters[name]
    if dtype is None or dtype == weight.dtype:
        delta.add_to(weight)
    else:  # rounded once, from the base's dtype to that of the checkpoint
        weight.data = delta.add_to(weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)).to(dtype)


def _save_from_memory(
    model: PreTrainedModel, deltas: Mapping[str, Delta], directory: Path, progress: Progress
) -> Rounding:
    """Write an architecture whose files hold other tensors than its weights, which transformers cuts or joins."""
    apply_deltas(model, [deltas], progress)
    model.save_pretrained(directory, max_shard_size="5GB")
    return Rounding()


def _compared(directory: Path, prompts: Tensor, reference: Tensor, tolerance: float, rounding: Rounding) -> Check:
    """Load the checkpoint as anyone would, and compare."""
    with quiet():
        reloaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
    difference = (_logits(reloaded, prompts) - reference).abs()
    largest = difference.max().item()
    if not largest <= tolerance:  # written so that a difference that is not a number is refused too
        raise ValueError(
            f"the checkpoint was not written: loaded again, its logits differ by {largest:.3g} from those of the "
            f"model in memory, and the tolerance is {tolerance:.3g}"
        )
    return Check(largest, difference.mean().item(), tolerance, (prompts.shape[0], prompts.shape[1]), rounding)


def _write_config(base: Path, directory: Path, dtype: DType | None) -> None:
    config = read_json(base / "config.json", "so it is not the directory of a model")
    if dtype:
        config.pop("torch_dtype", None)  # the older name of the same key
        config["dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_manifest(file: Path, origin: Mapping[str, Any], check: Check | None) -> None:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    found = asdict(check) if check else None
    manifest = {**origin, "check": found, "versions": package_versions(), "created": created}
    file.write_text(json.dumps(plain(manifest), indent=2) + "\n", encoding="utf-8")


def carry(base: Path, directory: Path) -> None:
    """Copy what makes the checkpoint usable - tokenizer, generation settings, licence - byte for byte."""
    for file in sorted({file for pattern in _CARRIED for file in base.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, directory / file.name)


def _prompts(model: PreTrainedModel) -> Tensor:
    """Return token ids `(2, 24)` that depend on the vocabulary's size and nothing else."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(48, device=model.device).view(2, 24) * 7919 + 11) % vocabulary


@torch.no_grad()
def _logits(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    return model.eval()(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=False).logits.float()
