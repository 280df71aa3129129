"""Read and write one expert: a directory with `expert.json` (where it comes from), `delta.safetensors` (how far each
weight moves) and, for some types, `state.safetensors` (`state.py`).

The tensors of a weight are named after it and the form of its delta: `<weight>/values` with `/indices` (Sparse) or
`/blocks` (BlockSparse), either of which may be encoded in bytes as `/gaps` or `/mask`; `<weight>/up` with `/down`
(LowRank), `<weight>/dense` (Dense). A table in the file's metadata gives, for each weight, its form, shape and number
of kept entries, and dtype, shape and SHA-256 of each tensor; the content hash is the SHA-256 of that table, and of the
state's where there is one, whatever the order of writing (of a routed expert see `record.hash_of_all`). Every read is
checked against the table, and the table against `expert.json`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Size, Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.library.atomic import new_directory
from modular_experts.library.encoded import StoredValues, check_encoding
from modular_experts.library.kept_inputs import INPUTS_FILE, Prompt, read_inputs, write_inputs
from modular_experts.library.names import check_target
from modular_experts.library.packing import NUMBERS, PackedDelta, check_layout, pack, unpack
from modular_experts.library.record import (
    ANSWER,
    DELTA_FILE,
    FORMAT,
    FORMAT_ENCODED,
    FORMAT_OF_ANSWERS,
    FORMAT_ROUTED,
    FORMAT_WITH_STATE,
    MERGE,
    RECORD_FILE,
    ROUTED,
    STATE_FILE,
    Facts,
    Record,
    files_of,
    hash_of_all,
    plain,
    what_is_wrong,
)
from modular_experts.library.state import StoredState, write_state
from modular_experts.library.tensorfile import MappedTensors, Table, TensorFileWriter, damaged, read_table
from modular_experts.progress import Counted, Progress


class StoredExpert(TaskVector):
    """The deltas of an expert on disk by weight name; each access reads one, and the first access checks it.

    Attributes:
        path: Directory of the expert.
        name: Its name in the library.
        record: The content of `expert.json`.
        place: Where the user finds it: `path`, or the PEFT adapter that it was made of.
        base: The base that it was opened for, or None.
    """

    def __init__(self, path: Path, record: Record, base: object = None) -> None:
        self.path = path
        self.name = path.name
        self.record = record
        files = files_of(record)
        self.place: str | Path = path
        self.base = base
        self._table: Table = {}
        if DELTA_FILE in files:
            self._table, self._tensors = _read_table(path / DELTA_FILE)
        self._state = StoredState(path / STATE_FILE) if STATE_FILE in files else None
        self._shapes = {name: Size(self._table[name]["shape"]) for name in sorted(self._table)}
        self._checked = set[str]()
        self._padded = dict[str, int]()
        tensors = hash_of_tables(self._table, self._state.table if self._state else None)
        if hash_of_all(tensors, record) != record["content_hash"]:
            raise damaged(path / files[0], f"its content hash is not the one in {path / RECORD_FILE}")

    @property
    def content_hash(self) -> str:
        """SHA-256 over all that it does: equal hashes mean experts that act alike."""
        return self.record["content_hash"]

    def is_listed_as(self, parent: Facts) -> bool:
        """Return whether this is the expert that a record lists as a parent, by its content hash."""
        return bool(parent["content_hash"] == self.content_hash)

    @property
    def title(self) -> str:
        return self.name

    @property
    def mergeable(self) -> bool:
        """Whether its deltas are all that it does, so that it can be merged and applied."""
        return self.not_mergeable_because is None

    @property
    def not_mergeable_because(self) -> str | None:
        """The reason, as the end of a sentence, or None for an expert that is mergeable."""
        reason = self.record.get("not_mergeable_because")
        return reason or (None if self._table else "it holds a state and no deltas")

    @property
    def acts_on_answers(self) -> bool:
        """Whether it acts on answers alone, and leaves prompts to the base."""
        return self.record.get("acts_on") == ANSWER

    @property
    def is_routed(self) -> bool:
        """Whether it is a router with other experts, which lie beside it in the library."""
        return bool(self.record["kind"] == ROUTED)

    @property
    def is_merge(self) -> bool:
        """Whether it was made of other experts by a merge, and contains them."""
        return bool(self.record["kind"] == MERGE)

    def move_to(self, base: Facts, vocabulary: Iterable[str]) -> None:
        """Count from now on as an expert of a base whose vocabulary has more rows, which it leaves as they are.

        Args:
            base: What a record keeps about that base.
            vocabulary: The weights that have a row for each token.
        """
        self.record = self.record | {"base": dict(base)}
        rows: int = base["rows"]
        self._padded = dict.fromkeys(self._table.keys() & set(vocabulary), rows)
        self._shapes = self._shapes | {name: Size((rows, *self._shapes[name][1:])) for name in self._padded}

    @property
    def state_names(self) -> list[str]:
        """The names of the tensors of `state`, without reading them."""
        return [] if self._state is None else list(self._state.table)

    def state(self) -> dict[str, Tensor]:
        """Read the trained tensors of the type's own form, by `<weight>/<name>`; none for an expert of deltas alone."""
        return {} if self._state is None else self._state.read()

    @property
    def keeps_inputs(self) -> bool:
        """Whether inputs of its tasks lie beside it."""
        return self.record.get("inputs") is not None and (self.path / INPUTS_FILE).is_file()

    def inputs(self) -> dict[str, list[Prompt]]:
        """Read and check the inputs that it keeps, by task; none without them."""
        if not self.keeps_inputs:
            return {}
        check_file(self.path, self.path / INPUTS_FILE)
        return read_inputs(self.path / INPUTS_FILE, self.record["inputs"])

    @property
    def size_on_disk(self) -> int:
        """Number of bytes of its record and deltas or state, without statistics, kept inputs and trials."""
        names = [RECORD_FILE, *files_of(self.record)]
        return sum((self.path / name).stat().st_size for name in names)

    def shapes(self) -> dict[str, Size]:
        """Return the shape of each weight, without reading it."""
        return self._shapes

    def forms(self) -> dict[str, str]:
        """Return the form of each weight's delta (`Dense`, `LowRank`, `Sparse`, `BlockSparse`), without reading it."""
        return {name: self._table[name]["form"] for name in self}

    def stored_as(self) -> dict[str, str]:
        """Return form, rank and encoding of each weight's delta, such as `LowRank of rank 4 in int8`."""
        texts = {}
        for name, form in self.forms().items():
            entry = self._table[name]
            down = entry.get("sizes", {}).get("down") or entry["tensors"].get("down", {}).get("shape")
            texts[name] = f"{form}{f' of rank {down[0]}' if down else ''} in {entry.get('encoding', 'float32')}"
        return texts

    def tiles(self) -> dict[str, tuple[int, int]]:
        """Return height and width of the tiles of each weight that is kept in tiles, without reading it."""
        tables = {name: self._table[name] for name, form in self.forms().items() if form == "BlockSparse"}
        return {
            name: tuple((table.get("sizes", {}).get("values") or table["tensors"]["values"]["shape"])[1:])
            for name, table in tables.items()
        }

    def kept_entries(self) -> dict[str, int]:
        """Return how many entries of each weight are kept, of a dense delta all but the zeros, without reading it."""
        counts = {}
        for name in self:
            entry = self._table[name]
            size = math.prod(entry["shape"])
            values = entry["tensors"].get("values", {"shape": [size]})["shape"]
            counts[name] = entry.get("kept", min(size, math.prod(values)))  # older files do not count
        return counts

    @property
    def kept_share(self) -> float:
        """Share of the entries of its weights that it keeps."""
        total = sum(shape.numel() for shape in self.shapes().values())
        return sum(self.kept_entries().values()) / total if total else 0.0

    def verify(self) -> None:
        """Read and check everything once; raise ValueError if something is not what was written."""
        for name in self:
            self[name]
        self.state()
        self.inputs()

    def __getitem__(self, name: str) -> Delta:
        packed = self._as_stored(name)
        is_new = name not in self._checked
        for suffix, facts in self._table[name]["tensors"].items() if is_new else ():
            if self._tensors.sha256(f"{name}/{suffix}") != facts["sha256"]:
                raise damaged(self._tensors.file, f"the {suffix} of {name} are not what was written")
        try:
            delta = unpack(packed.stored, packed.tensors, check=is_new)
        except ValueError as error:
            raise damaged(self._tensors.file, f"{error} ({name})") from error
        self._checked.add(name)
        return delta.with_rows(self._padded[name]) if name in self._padded else delta

    def _as_stored(self, name: str) -> PackedDelta:
        entry = self._table[name]
        tensors = {suffix: self._tensors[f"{name}/{suffix}"] for suffix in entry["tensors"]}
        return PackedDelta(StoredValues.of_entry(entry), tensors)

    def packed(self, name: str) -> Delta | PackedDelta:
        """Return the delta of a weight as it is stored if its values take few bits, after the checks of a reading."""
        delta = self[name]
        few_bits = "sizes" in self._table[name] and not delta.is_empty and name not in self._padded
        return self._as_stored(name) if few_bits else delta

    def release(self, name: str | None = None) -> None:
        """Free the memory that a weight's delta, or all, was read into; a delta that is still held stays as it is."""
        if name is None:
            return self._tensors.release()
        for suffix in self._table[name]["tensors"]:
            self._tensors.release(f"{name}/{suffix}")

    def stored_bytes(self, places: bool = False) -> dict[str, int]:
        """Return how many bytes the delta of each weight, or its places alone, has in the file, without reading it."""
        sizes = dict.fromkeys(self, 0)
        for key, (dtype, shape) in self._tensors.layouts.items() if sizes else ():
            assert isinstance(dtype, torch.dtype), key
            name, _, suffix = key.rpartition("/")
            if suffix in NUMBERS or not places:
                sizes[name] += dtype.itemsize * math.prod(shape)
        return sizes

    def __repr__(self) -> str:
        return f"StoredExpert({str(self.path)!r}, kind={self.record['kind']!r}, weights={len(self)})"


def check_file(path: str | Path, file: Path) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{path} is not a complete expert: {file} is missing")
    if file.resolve().parent != file.parent.resolve():
        raise ValueError(f"{file} is a link that leads out of {file.parent}, so it is not followed")


def write_expert(
    path: str | Path,
    deltas: Iterable[tuple[str, Delta]] | Mapping[str, Delta],
    record: Facts,
    overwrite: bool = False,
    key: str | None = None,
    progress: Progress = iter,
    state: Mapping[str, Tensor] | None = None,
    encoding: str = "float32",
    inputs: Mapping[str, Sequence[Prompt]] | None = None,
) -> str:
    """Write an expert, one weight in memory at a time; its directory appears when it is complete.

    Args:
        path: Directory of the expert; its last part is the name.
        deltas: Name and delta of each weight, in any order. Shape and orientation follow the base's parameter.
        record: What `make_record` returns.
        overwrite: Replace an expert of this name.
        key: A text that identifies the deltas. With it, and deltas in a mapping, an interrupted call goes on where it
            stopped, and does not ask for the weights that it had written. What lookups in a `TaskVector` had put into
            its `noted` comes back.
        state: Tensors of a type whose delta is not all that it does, by `<weight>/<name>` (`injection.expert_state`);
            with them the expert may have no deltas.
        encoding: How values are stored: `float32`, `bfloat16`, `int8`, `int4`, `magnitudes4`, `magnitudes2` or `sign`.
            What is stored is the expert: it is read as the deltas that the stored values stand for.
        inputs: Prompts of each of its tasks, to be kept beside it.

    Returns:
        The content hash.

    Raises:
        FileExistsError: Something is there that may not be replaced.
        ValueError: A name comes twice, a value is not finite, or there is neither a delta nor a state.
    """
    target = check_target(path, overwrite)
    record = {name: value for name, value in record.items() if name not in ("files", "encoding", "inputs")}
    record["format"] = FORMAT
    if state:
        form = FORMAT_ROUTED if record["kind"] == ROUTED else FORMAT_WITH_STATE
        record |= {"format": form, "files": [STATE_FILE]}
    if encoding != "float32":
        check_encoding(encoding)
        record |= {"format": FORMAT_ENCODED, "files": [STATE_FILE] if state else [DELTA_FILE]}
        record["encoding"] = encoding
    if record.get("acts_on"):
        record |= {"format": FORMAT_OF_ANSWERS, "files": [STATE_FILE] if state else [DELTA_FILE]}
    if wrong := what_is_wrong(plain({**record, "content_hash": ""})):
        raise ValueError(f"the expert cannot be written: of its record {wrong}")
    with new_directory(target, overwrite, key=key) as directory:
        table = _write_deltas(directory / DELTA_FILE, deltas, progress, encoding)
        if not table and not state:
            raise ValueError("an expert that moves no weight cannot be stored without a state")
        states = write_state(directory / STATE_FILE, state) if state else None
        if state and table:
            record["files"] = [DELTA_FILE, STATE_FILE]
        if inputs:
            record["inputs"] = write_inputs(directory / INPUTS_FILE, inputs)
        content = plain({**record, "content_hash": hash_of_all(hash_of_tables(table, states), record)})
        (directory / RECORD_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return content["content_hash"]


def hash_of_tables(table: Facts, state: Facts | None = None) -> str:
    """Return the SHA-256 of a table of weights, and of a state's, whatever the order in which they were written."""
    content = table if state is None else {"state": state, "weights": table}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write_deltas(
    file: Path, deltas: Iterable[tuple[str, Delta]] | Mapping[str, Delta], progress: Progress, encoding: str
) -> Table:
    """Write the file of deltas, after those that an interrupted call left whole; return its table of weights."""
    noted = (deltas.noted if isinstance(deltas, TaskVector) else None) or {}
    with TensorFileWriter(file) as writer:
        table: Table = {}
        for name, entry, *more in writer.resumed:
            table[name] = entry
            noted.update(*more)
        pairs: Iterable[tuple[str, Delta]] = () if isinstance(deltas, Mapping) else deltas
        if isinstance(deltas, Mapping):
            left = Counted([name for name in deltas if name not in table], "weights")
            pairs = ((name, deltas[name]) for name in progress(left))
        for name, delta in pairs:
            if name in table:
                raise ValueError(f"the weight {name} was given twice")
            try:
                packed, values = pack(delta, encoding)
            except ValueError as error:
                raise ValueError(f"the delta of {name} cannot be stored: {error}") from error
            tensors = {
                suffix: {"dtype": str(t.dtype), "shape": list(t.shape), "sha256": writer.write(f"{name}/{suffix}", t)}
                for suffix, t in packed.items()
            }
            kept = int(packed["dense"].count_nonzero()) if "dense" in packed else delta.support_size
            form = type(delta).__name__
            shape = list(delta.shape)
            table[name] = {"form": form, "shape": shape, "kept": kept, "tensors": tensors, **values.entry()}
            writer.note([name, table[name], noted])
        form = FORMAT if encoding == "float32" else FORMAT_ENCODED
        writer.finish(json.dumps({"format": form, "weights": table}, sort_keys=True))
    if not table:
        file.unlink()
    return table


def _read_table(file: Path) -> tuple[Table, MappedTensors]:
    """Return the table of weights and the tensors, once it is known that the file holds just those that it names."""
    table, tensors = read_table(file, "weights", FORMAT, FORMAT_ENCODED)
    try:
        stored = {f"{name}/{suffix}" for name, entry in table.items() for suffix in entry["tensors"]}
        if stored != tensors.layouts.keys():
            raise ValueError("its tensors are not those that its metadata names")
        for name, entry in table.items():
            layout = {suffix: tensors.layouts[f"{name}/{suffix}"] for suffix in entry["tensors"]}
            check_layout(StoredValues.of_entry(entry), layout)
            if not isinstance(entry.get("kept", 0), int):
                raise ValueError(f"its number of kept entries of {name} is not a whole number")
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(file, f"its metadata does not describe its weights ({error!r})") from error
    except ValueError as error:
        raise damaged(file, str(error)) from error
    return table, tensors


def stored_experts_of(vectors: Iterable[Mapping[str, Delta]]) -> list[StoredExpert]:
    """Return the stored experts that task vectors are made of, each once; other mappings are made of none."""
    experts: dict[Path, StoredExpert] = {}
    for vector in vectors:
        for leaf in vector.leaves() if isinstance(vector, TaskVector) else ():
            if isinstance(leaf, StoredExpert):
                experts.setdefault(leaf.path.resolve(), leaf)
    return list(experts.values())
