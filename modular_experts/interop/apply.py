"""Apply: add experts to their base, and write the sum as an ordinary Hugging Face checkpoint that has proved itself.

The checkpoint is loaded again with plain transformers before it takes its place, and its logits are compared with those
of the model in memory. Merge rules are not applied here: several experts are simply added.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modular_experts.deltas import Delta, add
from modular_experts.interop.checkpoint import DType, find_base, fingerprint, load_base, quiet, resolve_base
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_base,
    check_target,
    new_directory,
    open_experts,
    union_of_weights,
)
from modular_experts.library.record import package_versions, plain

__all__ = ["Check", "applied", "apply", "apply_deltas"]

MANIFEST = "modular_experts.json"
_CARRIED = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "preprocessor_config.json", "generation_config.json", "LICENSE*"),
]

Progress = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class Check:
    """How far a reloaded checkpoint is from the model it was written from.

    Attributes:
        largest_difference: Largest absolute difference of a logit over the fixed prompts.
        tolerance: The largest that is accepted.
        prompts: Shape of the prompts, `(rows, tokens)`.
    """

    largest_difference: float
    tolerance: float
    prompts: tuple[int, int]


def apply(
    experts: Sequence[str | Path],
    out: str | Path,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: DType | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Check:
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

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The base is another one than the experts were trained on, a weight does not fit, or the reloaded
            checkpoint differs; nothing is written then.
    """
    target = check_target(out, overwrite, MANIFEST)
    opened = open_experts(experts)
    union_of_weights(opened)
    place = str(base or find_base(opened[0]))
    mark = fingerprint(directory := resolve_base(place, revision))
    check_base(opened, mark, place)
    model = load_base(directory, dtype)
    apply_deltas(model, opened, progress)
    origin = {"base": {"id": place, "revision": revision, "fingerprint": mark}, "experts": as_parents(opened)}
    with new_directory(target, overwrite, MANIFEST) as temporary:
        check = _write_checked(model, directory, temporary, tolerance)
        _write_manifest(temporary / MANIFEST, origin, check)
    return check


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
    owners = Counter(id(parameter) for parameter in parameters.values())
    shapes = {name: shape for expert in experts for name, shape in _shapes(expert).items()}
    for name, shape in shapes.items():
        if name not in parameters:
            raise ValueError(_unknown_weight(model, name, list(parameters)))
        if parameters[name].shape != shape:
            found = tuple(parameters[name].shape)
            raise ValueError(f"{name} of {type(model).__name__} has shape {found}, and its delta has {tuple(shape)}")
        if owners[id(parameters[name])] > 1:
            raise ValueError(_tied_weight(name, parameters))
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
    return (
        expert.shapes() if isinstance(expert, StoredExpert) else {name: delta.shape for name, delta in expert.items()}
    )


def _unknown_weight(model: nn.Module, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else f"; it has {', '.join(known[:3])} and others"
    return f"{type(model).__name__} has no weight {name}, which the expert moves{hint}"


def _tied_weight(name: str, parameters: Mapping[str, Tensor]) -> str:
    twins = [other for other, tensor in parameters.items() if tensor is parameters[name] and other != name]
    return (
        f"{name} is the same tensor as {', '.join(twins)} (tied), so a delta of the one alone cannot be applied; "
        "leave it out of the expert's modules, or train on a base whose embeddings are untied"
    )


def _write_checked(model: PreTrainedModel, base: Path, directory: Path, tolerance: float) -> Check:
    """Save the model and what belongs to it, load it again, and compare."""
    prompts = _prompts(model)
    reference = _logits(model, prompts)
    with quiet():
        try:
            model.save_pretrained(directory, max_shard_size="5GB")
        except SafetensorError as error:
            raise OSError(f"the checkpoint could not be written: {error}") from error
        _carry(base, directory)
        reloaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
    difference = (_logits(reloaded, prompts) - reference).abs().max().item()
    if not difference <= tolerance:  # written so that a difference that is not a number is refused too
        raise ValueError(
            f"the checkpoint was not written: loaded again, its logits differ by {difference:.3g} from those of the "
            f"model in memory, and the tolerance is {tolerance:.3g}"
        )
    return Check(difference, tolerance, (prompts.shape[0], prompts.shape[1]))


def _write_manifest(file: Path, origin: dict[str, Any], check: Check) -> None:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {**origin, "check": asdict(check), "versions": package_versions(), "created": created}
    file.write_text(json.dumps(plain(manifest), indent=2) + "\n", encoding="utf-8")


def _carry(base: Path, directory: Path) -> None:
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
