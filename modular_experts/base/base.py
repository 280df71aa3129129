"""Find, fetch, check, read and write base checkpoints: `Base.open` is where to start."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from modular_experts.base.auto_class import auto_class
from modular_experts.base.files import (
    MANIFEST,
    copy_companions,
    fetch,
    fingerprint,
    open_tensors,
    quiet_transformers,
    read_layouts,
    usage_facts,
    write_manifest,
)
from modular_experts.base.quantised import Quantise, keep_order, quantisation_facts, quantiser
from modular_experts.base.streaming import Rounding, StreamedSum
from modular_experts.base.structure import StoredWeights, Structure, is_rounded, split_slice, weight_of
from modular_experts.base.tied import untie, untied_from
from modular_experts.base.verify import Check, check_reloaded, fixed_prompts, logits
from modular_experts.deltas import Delta
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.language_model import is_classifier, reads_prompts_apart
from modular_experts.library import StoredExpert, check_fingerprint, check_target, new_directory
from modular_experts.library.record import Facts, Record, package_versions, read_json
from modular_experts.library.tensorfile import MappedTensors
from modular_experts.progress import Counted, Progress
from modular_experts.text import block_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["float32", "bfloat16", "float16", "float64"]

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


class Origin(NamedTuple):
    """Where the deltas of a checkpoint come from.

    Attributes:
        entries: What the manifest records about it.
        key: A text that changes with anything that the deltas depend on; an interrupted checkpoint goes on if its key
            is the same.
    """

    entries: Facts
    key: str


class Base:
    """A pretrained causal language model on disk; `Base.open` finds one.

    Attributes:
        place: Directory or hub id, as the user or an expert's record names it.
        directory: Where its files are.
        revision: Branch, tag or commit of a hub id.
        quantise: The form in which `load` quantises its linear layers, or None; all else is of its files.
    """

    def __init__(
        self, place: str, directory: Path, revision: str | None = None, quantise: Quantise | None = None
    ) -> None:
        self.place = place
        self.directory = directory
        self.revision = revision
        self.quantise = quantise

    @classmethod
    def open(
        cls,
        place: "str | Path | Base | None" = None,
        experts: Sequence[StoredExpert] = (),
        revision: str | None = None,
        quantise: Quantise | None = None,
    ) -> "Base":
        """Find a base, fetch what is not on this machine, and check that it is the one the experts were trained on.

        Args:
            place: A directory with `config.json` and safetensors weights, a hub id such as
                `HuggingFaceTB/SmolLM2-135M`, or an opened base; what the experts' records name if not given.
            experts: The experts that will be put on it.
            revision: Branch, tag or commit of a hub id; the experts' own where the place is.
            quantise: The form in which `load` quantises it; an opened base has its own.

        Raises:
            FileNotFoundError: There is no such directory, and the hub does not give it.
            TypeError: It is something else, such as a model in memory.
            ValueError: It is not a causal language model in safetensors, or an expert was trained on another base.
        """
        if isinstance(place, Base):
            base = place
        elif place and not isinstance(place, str | Path):
            kind = type(place).__name__
            raise TypeError(f"a base is a directory, a hub id or an opened Base, and not a {kind}; give its directory")
        else:
            if not place:
                if not experts:
                    raise ValueError("no base is named; give the directory of a model, or a hub id")
                place = find_base(experts)
                revision = revision or _of_copies_first(experts)[0].record["base"].get("revision")
            base = cls(str(place), fetch(place, revision), revision, quantise)
        base.adopt(experts)
        # An untied copy of a tied base that stores its head has the fingerprint of this.
        unsure = []
        for expert in experts:
            recorded = expert.record["base"]
            moves_head = "untied" not in recorded and any(block_of(name) is None for name in expert)
            if moves_head or recorded["fingerprint"] != base.fingerprint:
                unsure.append(expert)
        check_fingerprint(unsure, base.fingerprint, base.place, base.untied_from if unsure else None)
        return base

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and stored bytes of its tensors."""
        return fingerprint(self.directory)

    @cached_property
    def untied_from(self) -> dict[str, str] | None:
        """The tied base that this one is an untied copy of, as a record keeps it; None for any other base."""
        return untied_from(self)

    @property
    def rows(self) -> int:
        """How many rows its embeddings have."""
        return self.structure.model.get_input_embeddings().get_parameter("weight").shape[0]

    def adopt(self, experts: Sequence[StoredExpert]) -> None:
        """Let experts count as trained on this base if theirs is the same with fewer rows of the vocabulary.

        Its embeddings, head and the head's bias may have further rows, which such experts leave as they are; all else
        must be the same, bit for bit.
        """
        others = [other for other in experts if other.record["base"]["fingerprint"] != self.fingerprint]
        for expert in others:
            theirs = expert.record["base"]
            names = self.structure.vocabulary
            rows = {key: theirs.get("rows") or self.rows for key, name in self._stored.items() if name in names}
            if max(rows.values()) < self.rows and fingerprint(self.directory, rows=rows) == theirs["fingerprint"]:
                text = "%s was trained on %s; %s is the same with %d more rows of the vocabulary, which it leaves alone"
                log.warning(text, expert.name, theirs["id"], self.place, self.rows - theirs["rows"])
                expert.move_to(self.facts, names)

    @property
    def facts(self) -> Record:
        """What the record of an expert keeps about its base."""
        facts: Record = {"id": self.place, "revision": self.revision, "fingerprint": self.fingerprint}
        facts["rows"] = self.rows
        return facts | ({"untied": self.untied_from} if self.untied_from else {})

    @property
    def identity(self) -> str:
        """SHA-256 over all that its outputs depend on: its weights, its configuration and its tokenizer's files."""
        content = [self.fingerprint, usage_facts(self.directory)]
        if self.quantise:
            content.append(self.quantise)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def structure(self) -> Structure:
        """Its weights and layers without their numbers, from its configuration."""
        from transformers import AutoConfig

        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
            model = auto_class(self.directory).from_config(config, trust_remote_code=False)
        return Structure(model, str(self.directory))

    @cached_property
    def wrapper(self) -> "PreTrainedModel | None":
        """The whole model of its files without its numbers, if `load` takes the language model out of them."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        if is_classifier(self.structure.model):
            return None
        if self.structure.architecture in (self._config.get("architectures") or [self.structure.architecture]):
            return None
        with quiet_transformers(), torch.device("meta"):
            whole = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
            return cast("PreTrainedModel", AutoModelForImageTextToText.from_config(whole, trust_remote_code=False))

    @cached_property
    def weights(self) -> StoredWeights:
        """Its stored weights by name, for readers of many weights; raises what `StoredWeights` does."""
        return StoredWeights(read_layouts(self.directory), self.structure)

    @cached_property
    def quantisation(self) -> Record | None:
        """Settings of the quantiser if its files hold quantised weights, else None."""
        return self._config.get("quantization_config")

    def quantised_facts(self, dtype: DType) -> Record:
        """Return how the loaded base is quantised, by the key `quantised` of a record, or nothing."""
        facts = quantisation_facts(self.quantise, getattr(torch, dtype)) if self.quantise else self.quantisation
        return {"quantised": facts} if facts else {}

    def load(self, dtype: DType | None = None) -> "PreTrainedModel":
        """Load the model in evaluation mode, in a dtype or as stored; one that is quantised now, in float32 or a dtype.

        Raises:
            ImportError: The library that quantises is not installed.
            ValueError: The files lack weights, or hold quantised ones although a form is given.
        """
        more: Record = {}
        if self.quantise and self.quantisation:
            raise ValueError(f"the weights in {self.directory} are quantised already; leave out {self.quantise}")
        if self.quantise or self.quantisation:
            more["device_map"] = {"": "cpu"}
        if self.quantise:
            dtype = dtype or "float32"
            more["quantization_config"] = quantiser(self.quantise, getattr(torch, dtype))
        with quiet_transformers():
            loaded: Any = auto_class(self.directory).from_pretrained(
                self.directory,
                dtype=getattr(torch, dtype) if dtype else "auto",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported with the missing ones, in one sentence
                **more,
            )
        model, report = loaded
        absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if absent:
            raise ValueError(
                f"the files in {self.directory} do not hold these weights of {type(model).__name__} in the right "
                f"shape: {', '.join(absent[:4])}{f' and {len(absent) - 4} more' if len(absent) > 4 else ''}"
            )
        keep_order(model)
        text_config = model.config.get_text_config()
        if is_classifier(model) and text_config.pad_token_id is None:
            text_config.pad_token_id = self.tokenizer().pad_token_id
        return model

    def check_loaded(self, model: nn.Module) -> None:
        """Raise ValueError if a model in memory lacks a weight of this base, or holds it with other values."""
        in_memory = dict(model.named_parameters(remove_duplicate=False))
        for name, _, stored in self.sample(sorted(set(self._stored.values())), entries=sys.maxsize):
            if name not in in_memory:
                raise ValueError(f"the model has no weight {name}, which its base {self.place} has")
            held = in_memory[name].detach()
            layer = model.get_submodule(name.rpartition(".")[0])
            rounded = is_rounded(layer, stored) if stored.is_floating_point() else None
            if not (torch.equal(held, stored.to(held)) if rounded is None else rounded):
                raise ValueError(
                    f"{name} of the model is not that of its base {self.place}, so a delta against the base would be "
                    "wrong; save the model and name the new directory as the base"
                )

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load its tokenizer, with a padding token that is not the end-of-sequence token where the vocabulary has one.

        Raises:
            FileNotFoundError: It has no tokenizer.
            ValueError: The tokenizer has no end-of-sequence token.
        """
        from transformers import AutoTokenizer

        if not any((self.directory / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{self.directory} has no tokenizer, such as tokenizer.json; copy the tokenizer's files into it"
            )
        tokenizer = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)
        model = self.structure.model
        # An encoder was trained with the special tokens that its tokenizer adds to a text.
        tokenizer.adds_to_prompts = reads_prompts_apart(model)
        tokenizer.classifies = is_classifier(model)
        eos = tokenizer.eos_token
        if tokenizer.classifies and tokenizer.pad_token_id is not None:
            return tokenizer
        if eos is None:
            raise ValueError(
                f"the tokenizer in {self.directory} has no eos_token (end of sequence); add it in tokenizer_config.json"
            )
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            known = tokenizer.get_vocab()
            usual = (token for token in (*_PAD_TOKENS, tokenizer.unk_token) if token in known and token != eos)
            tokenizer.pad_token = next(usual, eos)
        return tokenizer

    def weight(self, name: str) -> Tensor:
        """Return one weight, named as in the loaded model, as it is stored; raise ValueError for a wrong name.

        A weight that only transformers can put together costs loading the model.
        """
        whole, number = split_slice(name)
        if number is not None:
            return self.weight(whole)[number]
        key = self.stored_name(name)
        if key is None:
            return self._plain.load().get_parameter(name).detach()
        with open_tensors(self._files[key]) as tensors:
            return tensors.get_tensor(key)

    def sample(self, names: Iterable[str], entries: int = 2**16) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the name of each weight, a step, and every step-th stored row of it, at most about `entries` entries.

        Weights that only transformers can put together are left out.
        """
        keys: dict[str, str] = {}
        for name in names:
            stored_as = self.stored_name(name)
            if stored_as is not None:
                keys[name] = stored_as
        # One file is open at a time, as a checkpoint may have more than a process may open.
        for file in sorted({self._files[key] for key in keys.values()}):
            tensors = MappedTensors(file)
            for name, key in keys.items():
                if self._files[key] == file:
                    stored = tensors[key]
                    rows = max(1, entries // max(1, stored[:1].numel()))
                    step = max(1, -(-stored.shape[0] // rows))
                    yield name, step, stored[::step]

    @property
    def _plain(self) -> "Base":
        return Base(self.place, self.directory, self.revision)

    def untie(self, out: str | Path, overwrite: bool = False) -> "Base":
        """Write it with a head of its own, as `tied.untie` does, and return the copy."""
        return Base.open(untie(self, out, overwrite))

    def stored_name(self, name: str) -> str | None:
        """Return under which name the files hold a weight, or None if only transformers can put it together."""
        if name in self._files:
            return name
        if name not in self.structure.owners:
            raise ValueError(f"the base in {self.directory} has no weight {name}")
        owner = self.structure.owners[name]
        return next((key for key, weight in self._stored.items() if weight == owner), None)

    @cached_property
    def _config(self) -> Record:
        return read_json(self.directory / "config.json", "so it is not the directory of a model")

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {key: file for file, layout in read_layouts(self.directory).items() for key in layout}

    @cached_property
    def _stored(self) -> dict[str, str]:
        """The first name in the model of each stored tensor that is a weight of it."""
        names = {key: self.structure.name_of(key) for key in self._files}
        return {key: self.structure.owners[name] for key, name in names.items() if name is not None}

    def write(
        self,
        deltas: TaskVector,
        out: str | Path,
        dtype: DType | None = None,
        verify: bool = True,
        tolerance: float = 1e-3,
        overwrite: bool = False,
        progress: Progress = iter,
        origin: Origin | None = None,
    ) -> Check | None:
        """Write the base plus deltas as an ordinary Hugging Face checkpoint, and verify it by loading it again.

        Args:
            deltas: The delta of each weight, read once, and its `shapes()`: a sum, a merge, an opened expert.
            out: Directory of the checkpoint.
            dtype: Data type of the checkpoint; the base's own if not given.
            verify: Load the model and the result to compare them; without it, one weight at a time is in memory.
            tolerance: Largest accepted difference of a logit.
            overwrite: Replace a checkpoint of ours that is there.
            progress: Iterator wrapper, e.g. `tqdm`.
            origin: Where the deltas come from. With it, interrupted writing goes on with the file where it stopped.

        Raises:
            FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
            ValueError: The deltas are not all that an expert does, a weight does not fit, or the reloaded checkpoint
                differs; nothing is written then.
        """
        if reason := deltas.not_mergeable_because:
            raise ValueError(f"{deltas!r} cannot be added to its base, because {reason}")
        target = check_target(out, overwrite, MANIFEST)
        kind = getattr(torch, dtype) if dtype else None
        if self.quantisation:
            raise ValueError(
                f"the weights in {self.directory} are quantised, and deltas cannot be added to them exactly; train on "
                "the base from before it was quantised, with quantise, and apply the expert to that"
            )
        self.structure.check_fit(deltas.shapes())
        entries, key = origin or ({}, None)
        work = json.dumps([key, self.fingerprint, dtype, package_versions()])
        resume = hashlib.sha256(work.encode()).hexdigest() if key else None
        # Tensors that transformers cuts or joins while it loads need the model in memory.
        streams = set(deltas) <= set(self._stored.values())
        model = self._plain.load() if verify or not streams else None
        with new_directory(target, overwrite, MANIFEST, resume) as temporary, quiet_transformers():
            if streams:
                rounding = self._write_streamed(deltas, temporary, dtype, progress, model)
            else:
                assert model is not None
                _add_in_memory(deltas, model, kind, progress)
                whole = self.load_wrapper(model) if self.wrapper else model
                whole.save_pretrained(temporary, max_shard_size="5GB")
                rounding = Rounding()
            copy_companions(self.directory, temporary)
            check = None
            if verify and model is not None:
                checked = iter(progress(Counted(["in memory", "on disk"], "models checked")))
                next(checked)
                prompts = fixed_prompts(model)
                for weight in _all_weights(model).values():  # `model.to` would round the tables of positions too
                    weight.data = weight.to(kind) if kind else weight.data
                reference = logits(model, prompts)
                del model, weight  # before the second model comes
                next(checked)
                check = check_reloaded(temporary, prompts, reference, tolerance, rounding)
                next(checked, None)
            base = {"id": self.place, "revision": self.revision, "fingerprint": self.fingerprint}
            write_manifest(temporary, {"base": base, **entries, "check": asdict(check) if check else None})
        return check

    def load_wrapper(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the whole model of its files, with the numbers of a language model that `load` took out of them."""
        from transformers import AutoModelForImageTextToText

        with quiet_transformers():
            whole = AutoModelForImageTextToText.from_pretrained(
                self.directory, dtype=model.dtype, trust_remote_code=False, use_safetensors=True
            )
        whole.get_decoder().load_state_dict(model.get_decoder().state_dict())
        whole.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
        return cast("PreTrainedModel", whole)

    def _write_streamed(
        self,
        deltas: TaskVector,
        directory: Path,
        dtype: DType | None,
        progress: Progress,
        model: "PreTrainedModel | None",
    ) -> Rounding:
        """Write each weight plus its delta, and the configuration; add the deltas to a model in memory, if given."""
        kind = getattr(torch, dtype) if dtype else None
        weights = _all_weights(model) if model is not None else {}
        stream = StreamedSum(self.directory, self.structure, deltas, directory, kind, progress)
        for name, delta in stream:
            if model is not None:
                _add(delta, weights[name], kind)
        config = dict(self._config)
        if dtype:
            config.pop("torch_dtype", None)  # the older name of the same key
            config["dtype"] = dtype
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return stream.rounding


def find_base(experts: Sequence[StoredExpert]) -> str:
    """Return where a record names the experts' base, or the same path or name beside the library if that is there.

    If some experts have an untied copy of the others' base, that copy is theirs all.
    """
    experts = _of_copies_first(experts)
    for expert in experts:
        recorded = str(expert.record["base"].get("id") or "")
        if recorded and (place := directory_of(recorded, expert)):
            return str(place)
    named = experts[0].record["base"].get("id")
    if not named:
        raise ValueError(f"the record of {experts[0].place} does not name its base; give its directory or hub id")
    return str(named)


def directory_of(recorded: str, expert: StoredExpert) -> Path | None:
    """Return the directory that an expert's record names, or the same path or name beside the library; None if neither.

    A name of a hub is kept as it is.
    """
    beside = expert.path.parent.parent
    places = (Path(recorded).expanduser(), beside / recorded, beside / Path(recorded).name)
    return next((place for place in places if place.is_dir()), None)


def adopt_smaller(experts: Sequence[StoredExpert]) -> None:
    """Let the base with most rows of a vocabulary, if it is on this machine, adopt the experts of the others."""
    if len({expert.record["base"].get("rows") for expert in experts}) > 1:
        place = find_base(experts)
        base = _of_copies_first(experts)[0].record["base"]
        with suppress(OSError, ValueError):  # the experts have different bases then
            Base(place, fetch(place, base["revision"], local_only=True), base["revision"]).adopt(experts)


def _of_copies_first(experts: Sequence[StoredExpert]) -> list[StoredExpert]:
    """Return the experts in an order that begins with an untied copy of a base, and with most rows of a vocabulary."""
    bases = [(expert, expert.record["base"]) for expert in experts]
    bases.sort(key=lambda pair: ("untied" not in pair[1], -(pair[1].get("rows") or 0)))
    return [expert for expert, _ in bases]


def _all_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _add_in_memory(deltas: TaskVector, model: nn.Module, dtype: torch.dtype | None, progress: Progress) -> None:
    """Add deltas to the weights of a model, which then have the dtype, or the one that they had."""
    weights = _all_weights(model).values()
    for weight in weights:
        weight.data = weight.to(torch.promote_types(weight.dtype, dtype) if dtype else weight.dtype)
    for name in progress(sorted(deltas)):
        _add(deltas[name], weight_of(model, name), None)
    # Only now, so that a sum is rounded once.
    for weight in weights:
        weight.data = weight.to(dtype or weight.dtype)


@torch.no_grad()
def _add(delta: Delta, weight: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is None or dtype == weight.dtype:
        delta.add_to(weight)
    else:
        weight.data = delta.add_to(weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)).to(dtype)
