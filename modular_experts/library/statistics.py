"""Read and write the statistics of an expert's data, in `<expert>/statistics/<kind>.safetensors`.

Each tensor is float32 and named after its weight; tensors with the same bytes are stored once (the projections of one
attention layer have the same inputs). The file's metadata hold the expert's content hash, the base's fingerprint, the
data, and shape, norm and SHA-256 of each tensor.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from modular_experts.deltas import all_finite
from modular_experts.library.atomic import new_file
from modular_experts.library.expert import StoredExpert, hash_of_tables
from modular_experts.library.names import is_name
from modular_experts.library.record import Facts, plain
from modular_experts.library.tensorfile import MappedTensors, Table, TensorFileWriter, tensor_bytes
from modular_experts.places import check_free

if TYPE_CHECKING:
    from modular_experts.methods.method import DataStatistic

FOLDER = "statistics"
OF_INPUTS = ("prompt_parts", "prompts")
"""Kinds that the base reads from inputs alone, so that they are the same for every form of an expert."""
FORMAT = "modular-experts/statistics/1"
_FACTS = {"expert": str, "base": str, "tasks": dict, "data": dict, "among": list, "weights": dict}


class StoredStatistics(Mapping[str, "DataStatistic | None"]):
    """The statistics of one kind on one expert's data, by weight name, each read and checked on access.

    A weight for which this kind is not defined gives None.

    Attributes:
        file: The file.
        content_hash: SHA-256 over its metadata and, by their hashes, its tensors.
        facts: Its metadata without the table of weights: `expert` and `base` (hashes), `tasks` (rows of each), `data`
            (how the statistics were taken), `among` (content hashes of the experts of the one merge that they hold for;
            empty if they hold for any).
    """

    def __init__(self, expert: StoredExpert, kind: str) -> None:
        self.file = _file(expert, kind)
        self._anew = command_for([expert], kind, overwrite=True)
        try:
            tensors = safe_open(self.file, framework="pt")
            self.facts = json.loads((tensors.metadata() or {})["modular_experts"])
            if self.facts["format"] != FORMAT:
                raise self._damaged(f"its format is {self.facts['format']!r}, and this version reads {FORMAT!r}")
            if wrong := [name for name, kind in _FACTS.items() if not isinstance(self.facts[name], kind)]:
                raise self._damaged(f"{', '.join(wrong)} is of a wrong type")
            for name, entry in self.facts["weights"].items():
                if entry is None:
                    continue
                stored = tensors.get_slice(entry["tensor"])
                layout = stored.get_dtype(), list(stored.get_shape()), entry["inputs"] in (0, 1)
                if layout != ("F32", entry["shape"], True) or not isinstance(entry["norm"], float):
                    raise self._damaged(f"the tensor of {name} is not the one that its metadata describe")
        except SafetensorError as error:
            raise self._damaged(f"it is cut short, or lacks a tensor ({error})") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise self._damaged(f"its metadata do not describe statistics ({error!r})") from error
        self.content_hash = hash_of_tables(self.facts)
        self._table: Table = self.facts.pop("weights")
        self._tensors = MappedTensors(self.file)
        if self.facts["expert"] != expert.content_hash:
            raise ValueError(
                f"{self.file} was made for other contents of the expert ({self.facts['expert'][:12]}, not "
                f"{expert.content_hash[:12]}); take the statistics anew: {self._anew}"
            )

    @property
    def size_on_disk(self) -> int:
        """Bytes of the file."""
        return self.file.stat().st_size

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether a weight's statistic fits a weight of this shape, without reading it."""
        entry = self._table[name]
        if entry is None:
            return True
        fitting = [list(shape)]
        if len(shape) == 2:  # a Gram matrix of the inputs
            inputs = shape[entry["inputs"]]
            fitting.append([inputs, inputs])
        return list(entry["shape"]) in fitting

    def __getitem__(self, name: str) -> "DataStatistic | None":
        # Commands that only list or show experts do without the merge methods.
        from modular_experts.methods.method import DataStatistic

        entry = self._table[name]
        if entry is None:
            return None
        values = self._tensors[entry["tensor"]]
        if self._tensors.sha256(entry["tensor"]) != entry["sha256"] or not all_finite(values):
            raise self._damaged(f"the numbers of {name} are not what was written")
        norm = sum(other["norm"] ** 2 for other in self._table.values() if other) ** 0.5
        return DataStatistic(values, norm, entry["inputs"])

    def release(self, name: str) -> None:
        """Drop the memory that a statistic was read into; one that is still held stays valid."""
        entry = self._table[name]
        if entry is not None:
            self._tensors.release(entry["tensor"])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._table))

    def __len__(self) -> int:
        return len(self._table)

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.file} is damaged: {reason}; take the statistics anew: {self._anew}")


def open_statistics(expert: StoredExpert, kind: str) -> StoredStatistics:
    """Open an expert's statistics of one kind, reading only the header; raise what `StoredStatistics` does."""
    if not _file(expert, kind).is_file():
        raise FileNotFoundError(f"{expert.place} has no {kind} statistics; take them: {command_for([expert], kind)}")
    return StoredStatistics(expert, kind)


def kinds_of_statistics(expert: StoredExpert) -> list[str]:
    """Return the kinds of statistics that an expert has."""
    folder = expert.path / FOLDER
    return sorted(file.stem for file in folder.glob("*.safetensors") if is_name(file.stem)) if folder.is_dir() else []


def check_statistics_targets(experts: Sequence[StoredExpert], kind: str, overwrite: bool = False) -> None:
    """Raise FileExistsError if an expert has statistics that may not be replaced; call it before any work."""
    for expert in experts:
        check_free(_file(expert, kind), overwrite)


def carry_statistics(expert: StoredExpert, other: StoredExpert) -> None:
    """Copy the statistics of inputs alone from an expert to another form of the same expert."""
    for kind in set(kinds_of_statistics(expert)) & set(OF_INPUTS):
        old = open_statistics(expert, kind)
        write_statistics(other, kind, old.items(), old.facts["tasks"], old.facts["data"], overwrite=True)


def write_statistics(
    expert: StoredExpert,
    kind: str,
    statistics: "Iterable[tuple[str, DataStatistic | None]]",
    tasks: Mapping[str, int],
    data: Facts,
    among: Sequence[StoredExpert] = (),
    overwrite: bool = False,
) -> StoredStatistics:
    """Write statistics beside an expert, one tensor in memory at a time; the file appears when it is complete.

    `tasks` counts the rows of each task, and `data` tells in plain values how they were read; `among` are the experts
    of the merge that the statistics hold for, if they hold only in that merge.
    """
    check_statistics_targets([expert], kind, overwrite)
    facts: Table = {"format": FORMAT, "kind": kind, "expert": expert.content_hash}
    facts |= {"base": expert.record["base"]["fingerprint"], "tasks": dict(tasks), "data": plain(data)}
    facts |= {"among": [other.content_hash for other in among]}
    with new_file(_file(expert, kind)) as temporary, TensorFileWriter(temporary) as writer:
        table: Table = {}
        written: dict[str, str] = {}
        for name, statistic in statistics:
            if statistic is None:
                table[name] = None
                continue
            values = statistic.values.detach().to("cpu", torch.float32).contiguous()
            if not all_finite(values):
                raise ValueError(f"the statistic of {name} holds numbers that are not finite, so it was not stored")
            shape = list(values.shape)
            digest = hashlib.sha256(tensor_bytes(values)).hexdigest()
            if (key := f"{shape} {digest}") not in written:
                writer.write(name, values)
            table[name] = {
                "tensor": written.setdefault(key, name),
                "shape": shape,
                "inputs": statistic.inputs,
                "sha256": digest,
                "norm": values.double().norm().item(),
            }
        writer.finish(json.dumps({**facts, "weights": table}, sort_keys=True))
    return StoredStatistics(expert, kind)


def command_for(experts: Sequence[StoredExpert], kind: str, overwrite: bool = False) -> str:
    """Return the arguments with which `statistics` takes statistics of experts; the user fills in their tasks."""
    places = [os.path.relpath(expert.place) for expert in experts]
    arguments = f"`statistics` with `experts={places}`, `kind={kind!r}` and `tasks=`"
    return f"{arguments}, `overwrite=True`" if overwrite else arguments


def _file(expert: StoredExpert, kind: str) -> Path:
    assert is_name(kind), kind
    file = expert.path / FOLDER / f"{kind}.safetensors"
    for place in (file.parent, file):
        if place.is_symlink():
            raise ValueError(f"{place} is a link, and links out of {expert.path} are not followed; remove it")
    return file


class Gathered:
    """The statistics of one kind of the experts of a merge: a call with a weight's name gives one per expert.

    A call for another weight drops the last one's, so that one weight of every expert is in memory at a time.
    """

    def __init__(self, opened: Sequence[StoredStatistics]) -> None:
        self._opened = opened
        self.content_hashes = [statistics.content_hash for statistics in opened]
        self._name: str | None = None

    def __call__(self, name: str) -> "list[DataStatistic | None]":
        if self._name not in (None, name):
            for statistics in self._opened:
                statistics.release(str(self._name))
        self._name = name
        return [statistics[name] for statistics in self._opened]


def gather_statistics(
    experts: Sequence[StoredExpert], kind: str | None, shapes: Mapping[str, Sequence[int]]
) -> Gathered:
    """Return a function from a name to the statistics of a weight, one per expert; an empty list without a kind."""
    if kind is None:
        return Gathered([])
    lacking = [expert for expert in experts if not _file(expert, kind).is_file()]
    if lacking and lacking[0].acts_on_answers:
        raise ValueError(
            f"this method needs {kind} statistics, and no command takes them of {lacking[0].place}: it acts on answers "
            "alone, and they would count prompts, too; take a method without statistics (`methods` lists them)"
        )
    if lacking:
        raise ValueError(
            f"{lacking[0].place} has no {kind} statistics, which this method needs; take them for all experts of the "
            f"merge: {command_for(experts, kind, overwrite=len(lacking) < len(experts))}"
        )
    opened = [open_statistics(expert, kind) for expert in experts]
    hashes = {expert.content_hash for expert in experts}
    for expert, statistics in zip(experts, opened, strict=True):
        missing = [name for name in shapes if name not in statistics]
        unfit = [name for name, shape in shapes.items() if name in statistics and not statistics.fits(name, shape)]
        among = set(statistics.facts["among"])
        problem = ""
        if missing:
            more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
            problem = f"do not cover {missing[0]}{more}, which another expert moves"
        elif unfit:
            problem = f"have the wrong shape for {unfit[0]}"
        elif among and among != hashes:
            problem = "were taken in a merge of other experts"
        if problem:
            raise ValueError(
                f"the {kind} statistics of {expert.place} {problem}; take them for all experts of the merge: "
                f"{command_for(experts, kind, overwrite=True)}"
            )
    return Gathered(opened)
