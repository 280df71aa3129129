"""Watch a fit: which rows each step reads, and where trained values start; and state what the reference trains then."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from modular_experts import ExportExpert, FullExpert, LoRAExpert, MaskedExpert, MaskSchedule, SparseExpert
from modular_experts.injection import named_experts
from modular_experts.masks import RandomScore, SelectOnce
from soak import bases
from soak.case import Case
from soak.reference.files import Delta
from soak.reference.model import Logits, Part, Reference, Text, negative_log_likelihood, train

RATES = {"LoRAExpert": 3e-3, "FullExpert": 1e-4, "SparseExpert": 1e-3, "MaskedExpert": 1e-3}
"""The documented learning rate of each type."""
UNITS = ("element", "block", "row", "column")


@dataclass(frozen=True)
class Kind:
    """A type of expert with its settings, as `fit` takes it."""

    type: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.type.__name__

    @property
    def factory(self) -> Callable[..., Any]:
        return partial(self.type, **self.settings)

    def callbacks(self) -> list[Callback]:
        """Return the callbacks by which an expert keeps the entries that it chose at the first step."""
        if self.type is MaskedExpert:
            # Its own score is zero before the first step.
            return [MaskSchedule(score=RandomScore(), rule=SelectOnce(), seed=3)]
        return [MaskSchedule(rule=SelectOnce())] if self.type is SparseExpert else []


def random_kind(case: Case, types: Sequence[Callable[..., Any]] = ()) -> Kind:
    """Draw a type that the reference can train, and its settings."""
    draw = case.random
    chosen = draw.choice(list(types) or [LoRAExpert, FullExpert, SparseExpert, SparseExpert, MaskedExpert])
    if chosen is FullExpert:
        return Kind(FullExpert)
    if chosen is LoRAExpert:
        scale = {"alpha": draw.choice([4.0, 16.0]), "rank_stabilized": case.chance(0.3)}
        return Kind(LoRAExpert, {"rank": draw.randint(1, 6), **scale})
    units = draw.choice(UNITS)
    size = {"block_size": draw.choice([2, 5, 8, 16])} if units == "block" else {}
    return Kind(chosen, {"keep_ratio": draw.choice([0.02, 0.05, 0.3, 1.0]), "granularity": units, **size})


def random_modules(case: Case, kind: str, expert: Kind) -> str | list[str]:
    """Draw all linear layers of a base, or some of their names."""
    names = bases.LINEAR[kind]
    # Slices of tensors of three dimensions are not trained whole.
    has_slices = kind == "mixtral" and expert.type is not FullExpert
    if has_slices:
        names = [*names, "experts.down_proj", "gate_up_proj[1]"]
    if case.chance(0.5):
        return "all-linear" if has_slices or kind != "mixtral" else names
    return case.random.sample(names, case.random.randint(1, min(3, len(names))))


def trainer_of(folder: Path, out: Path, *callbacks: Callback, **settings: Any) -> dict[str, Any]:
    """Return settings of a trainer that exports the expert of the last step and writes nothing else."""
    export = ExportExpert(str(out.parent), out.name, monitor=None)
    quiet = {"default_root_dir": str(folder / "runs"), "logger": False, "enable_checkpointing": False}
    return {**quiet, "callbacks": [*callbacks, export], **settings}


class Watch(Callback):
    """Keeps the rows of each training batch, and the trained parameters of each site before the first step."""

    def __init__(self) -> None:
        self.batches: list[list[Text]] = []
        self.start: dict[str, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for site, expert in named_experts(pl_module.model):
            self.start[site] = {name: value.detach().clone() for name, value in expert.named_parameters()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(texts_of(batch))

    def steps(self, rows: int, batch_size: int, accumulation: int) -> list[list[Text]]:
        """Return the rows of each step; no step reads the last batches of an epoch and the first of the next."""
        in_epoch = math.ceil(rows / batch_size)
        steps: list[list[Text]] = []
        for number, batch in enumerate(self.batches):
            if number % in_epoch % accumulation == 0:
                steps.append([])
            steps[-1].extend(batch)
        return steps


def texts_of(batch: Mapping[str, Any]) -> list[Text]:
    """Return the rows of a batch, padded or packed, without padding."""
    texts = []
    for row, task in enumerate(batch["task"]):
        if task == "":
            continue
        if "row" in batch:
            mine = batch["row"] == row
            ids, labels = batch["input_ids"][mine], batch["labels"][mine]
        else:
            there = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row][there], batch["labels"][row][there]
        texts.append(Text(tuple(ids.tolist()), tuple((labels != -100).nonzero()[:, 0].tolist())))
    return texts


def check_rows(case: Case, read: Sequence[Text], known: Sequence[Text]) -> None:
    """Check that every epoch reads each known row once, as far as it goes."""
    counts = Counter(known)
    unknown = set(read) - counts.keys()
    case.need(not unknown, f"a step read a row that no file has: {sorted(unknown, key=str)[:1]}")
    for first in range(0, len(read), len(known)):
        epoch = Counter(read[first : first + len(known)])
        case.need(epoch <= counts, f"an epoch read rows again: {epoch - counts}")


def part_of(
    reference: Reference, kind: str, expert: Kind, name: str, delta: Delta, start: Mapping[str, Mapping[str, Tensor]]
) -> Part:
    """Return what a fit with this expert trained in a weight of the reference's base."""
    weight = reference.weight(name).clone()
    if expert.type is FullExpert:
        # The sums of a weight and its change are then rounded as in any training of the weight.
        return [weight], lambda trained: trained - weight
    if expert.type is not LoRAExpert:
        return [torch.zeros_like(weight)], lambda change: change * delta.kept
    rank = expert.settings["rank"]
    root = math.sqrt(rank) if expert.settings.get("rank_stabilized") else rank
    factors = start.get(name) or start[name.removesuffix(".weight")]
    scale = expert.settings.get("alpha", 16.0) / root
    if kind == "gpt2" and name.split(".")[-2] in bases.LINEAR["gpt2"]:
        # GPT-2 keeps its linear weights as (in, out).
        return [factors["up"], factors["down"]], lambda up, down: scale * (up @ down).T
    return [factors["up"], factors["down"]], lambda up, down: scale * up @ down


def check_fit(
    case: Case,
    reference: Reference,
    kind: str,
    expert: Kind | Callable[[str], Kind],
    deltas: Mapping[str, Delta],
    watch: "Watch",
    steps: Sequence[Sequence[Any]],
    rate: float | None = None,
    clip: float | None = None,
    loss: Callable[[Logits, Any], Tensor] = negative_log_likelihood,
) -> None:
    """Let the reference take the same steps, and compare the deltas; `expert` may differ from weight to weight."""
    kinds = {name: expert if isinstance(expert, Kind) else expert(name) for name in deltas}
    parts = {name: part_of(reference, kind, kinds[name], name, delta, watch.start) for name, delta in deltas.items()}
    first = next(iter(kinds.values()))
    trained = train(reference, parts, steps, rate or RATES[first.name], clip, loss)
    check_trained(case, deltas, trained, first.name)


def check_trained(case: Case, ours: Mapping[str, Delta], reference: Mapping[str, Tensor], text: str) -> None:
    """Compare trained deltas by their norms; Adam turns rounding of tiny gradients into steps of full size."""
    case.need(ours.keys() == reference.keys(), f"{text}: weights {sorted(ours.keys() ^ reference.keys())}")
    for name, delta in ours.items():
        error = (delta.values - reference[name]).norm().item()
        size = reference[name].norm().item()
        rounding = 3e-7 * math.sqrt(delta.values.numel())
        case.need(error <= 0.02 * size + rounding, f"{text} {name}: off by {error:.3g} of {size:.3g}")


def same_bytes(case: Case, first: Path, second: Path, text: str) -> None:
    """Check that two experts hold the same tensors, bit for bit."""
    ours, others = stored_tensors(first), stored_tensors(second)
    case.need(ours.keys() == others.keys(), f"{text}: tensors {sorted(ours.keys() ^ others.keys())[:4]}")
    differ = [name for name, tensor in ours.items() if not torch.equal(tensor, others[name])]
    case.need(not differ, f"{text}: {len(differ)} of {len(ours)} tensors differ: {differ[:2]}")


def stored_tensors(place: Path) -> dict[str, Tensor]:
    """Return all tensors of an expert as they are stored."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
