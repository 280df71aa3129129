"""Write an expert as a PEFT adapter, with a manifest, and verify it by loading it again before it takes its place."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from inspect import isabstract
from pathlib import Path
from pydoc import locate
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.classifier import POOLED
from modular_experts.base.files import MANIFEST, quiet_transformers, write_manifest
from modular_experts.base.structure import Structure, split_slice
from modular_experts.base.verify import difference, fixed_prompts, logits
from modular_experts.deltas import Delta
from modular_experts.discovery import import_systems
from modular_experts.injection.task_heads import head_state
from modular_experts.interop.peft.files import CONFIG_FILE, PREFIX, TENSOR_FILE, import_peft
from modular_experts.interop.peft.formats import EncodedWeight, LoraFormat, PeftFormat, matrices
from modular_experts.language_model import is_classifier, renamed
from modular_experts.library import StoredExpert, as_parents, check_target, new_directory, open_experts
from modular_experts.library.record import Record, plain
from modular_experts.library.state import task_of_head
from modular_experts.progress import Progress
from modular_experts.text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Encoded = Mapping[str, EncodedWeight]


@dataclass(frozen=True)
class WrittenAdapter:
    """An adapter that was written: each weight as it stores it, and how it compared when PEFT loaded it again."""

    weights: Encoded
    check: "AdapterCheck | None"

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the part that the adapter lacks, as a share of the norm of the whole task vector."""
        energy = sum(weight.energy for weight in self.weights.values())
        return math.sqrt(sum(weight.lost for weight in self.weights.values()) / energy) if energy else 0.0

    @property
    def rank(self) -> int:
        """The largest rank of its factors, if it is a LoRA."""
        return max(weight.delta.rank for weight in self.weights.values())  # type: ignore[attr-defined]

    @property
    def padding(self) -> int:
        return sum(weight.padding for weight in self.weights.values())


def export(
    expert: str | Path | StoredExpert,
    out: str | Path,
    form: str | PeftFormat = "lora",
    rank: int | None = None,
    base: str | Path | Base | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
    write: Callable[[Path, Base, PeftFormat, Encoded], None] | None = None,
    wrapper: bool = False,
) -> WrittenAdapter:
    """Write an expert as a PEFT adapter, and verify it by loading it again with PEFT.

    The whole adapter and the base in float32 are in memory.

    Args:
        expert: Directory of the expert, or an opened expert.
        out: Directory of the adapter.
        form: A `PeftFormat`, PEFT's type of the adapter in small letters, such as `lora`, `supertuning` or `shira`,
            or the dotted path of a `PeftFormat` of your own.
        rank: Largest rank of a LoRA; without it only low-rank experts can be written as one.
        base: The base's directory or hub id; what the expert's record names if not given.
        tolerance: Largest accepted difference of a logit between the reloaded adapter and the deltas that it stands
            for. What an approximation costs is reported and not limited.
        overwrite: Replace an adapter of ours that is there.
        write: Writes the files of another program into the directory, instead of PEFT's, and checks them.
        wrapper: Name the layers as the whole model of the base's files does, with its vision tower, and not as the
            language model that `AutoModelForCausalLM` takes out of it, such as Qwen3.5's.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The format is unknown or takes no rank, the expert was trained on another base, the format cannot
            store a weight, PEFT is not installed, or the reloaded adapter differs; nothing is written then.
    """
    format = find_format(form, rank) if isinstance(form, str) else form
    target = check_target(out, overwrite, MANIFEST)
    if not write:
        import_peft("PEFT checks each adapter, and is not installed: pip install 'modular-experts[peft]'")
        from peft import PeftType

        if format.peft_type not in PeftType.__members__:
            raise ValueError(f"peft {metadata.version('peft')} knows no {format.peft_type}: pip install -U peft")
    (opened,) = open_experts([expert], base=base)
    if isinstance(format, LoraFormat):
        # Before the base or a delta is read, which takes minutes.
        format.check_forms(opened.forms())
    opened_base = Base.open(base, [opened])
    if wrapper and opened_base.wrapper is None:
        raise ValueError(
            f"wrapper is for a base whose files hold more than the language model that is loaded, and "
            f"{opened_base.place} is loaded whole; leave it out"
        )
    modules = _moved_modules(opened, format, opened_base)
    format = format.fit_to(opened, list(modules))
    encoded = {name: format.encode(name, modules[name], opened[name]) for name in progress(list(modules))}
    with new_directory(target, overwrite, MANIFEST) as directory:
        check = None if write else _write_peft(directory, opened_base, format, encoded, opened, tolerance)
        if wrapper and not write:
            whole = Structure(cast("PreTrainedModel", opened_base.wrapper))
            as_whole = {renamed(name, opened_base.structure.model, whole.model): encoded[name] for name in encoded}
            _write_files(directory, opened_base, whole, format, as_whole)
        head = _head_of(opened, opened_base)
        if head and not write:
            _write_files(directory, opened_base, opened_base.structure, format, encoded, head)
        if write:
            write(directory, opened_base, format, encoded)
        written = WrittenAdapter(encoded, check)
        identity = {"id": opened_base.place, "revision": opened_base.revision, "fingerprint": opened_base.fingerprint}
        origin = {"base": identity, "experts": as_parents([opened])}
        account = {"adapter": _account(format, written), "check": asdict(check) if check else None}
        write_manifest(directory, origin | account)
    return written


def _write_peft(
    directory: Path, base: Base, format: PeftFormat, encoded: Encoded, expert: StoredExpert, tolerance: float
) -> "AdapterCheck":
    _write_files(directory, base, base.structure, format, encoded)
    deltas = {name: weight.delta for name, weight in encoded.items()}
    approximated = expert if any(weight.lost for weight in encoded.values()) else None
    return _verify(base, directory, deltas, approximated, tolerance)


def _head_of(expert: StoredExpert, base: Base) -> dict[str, Tensor]:
    """Return weight and bias of the one task head that an adapter can have, by their names in the model of PEFT."""
    state = head_state([expert])
    tasks = list(dict.fromkeys(task_of_head(name) for name in state))
    model = base.structure.model
    if not tasks:
        return {}
    if len(tasks) > 1 or model.head_place == POOLED:
        text = "the adapter goes without task heads: PEFT has a place for one, on a class such as %s"
        log.warning(text, "LlamaForSequenceClassification")
        return {}
    of_head = {name.rpartition(".")[2]: tensor for name, tensor in state.items()}
    names = ", ".join(json.loads(bytes(of_head.pop("classes").tolist())))
    log.warning("the adapter's task head gives the logits of these classes: %s", names)
    return {f"{model.head_place}.{name}": tensor for name, tensor in of_head.items()}


def _task_type(model: Any) -> str:
    """Return what PEFT calls the task of a base."""
    if is_classifier(model):
        return "FEATURE_EXTRACTION" if model.head_place == POOLED else "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _write_files(
    directory: Path,
    base: Base,
    structure: Structure,
    format: PeftFormat,
    encoded: Encoded,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    config = {
        "peft_type": format.peft_type,
        "task_type": _task_type(structure.model),
        "base_model_name_or_path": base.place,
        "revision": base.revision,
        "inference_mode": True,
        "target_modules": list(dict.fromkeys(_module_of(n) for n in encoded if split_slice(n)[1] is None)),
        "modules_to_save": sorted({_module_of(name).rpartition(".")[2] for name in head}) if head else None,
        **format.configuration({name: structure.layer(name) for name in encoded}, encoded),
    }
    text = json.dumps(plain(config), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {
        f"{PREFIX}{_module_of(name)}.{suffix}": tensor.contiguous()
        for name, weight in encoded.items()
        for suffix, tensor in weight.tensors.items()
    }
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in (head or {}).items()}
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in matrices(encoded, structure).items()}
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})


def find_format(form: str, rank: int | None) -> PeftFormat:
    import_systems("peft")
    kinds: list[Any] = [PeftFormat]
    for kind in kinds:
        kinds += kind.__subclasses__()
    # A format of a user's own, which may be of the same type, is found by its path.
    ours = [kind for kind in kinds if kind.__module__.startswith("modular_experts.") and not isabstract(kind)]
    formats = {kind.peft_type.lower(): kind for kind in ours}
    kind = formats.get(form) or (locate(form) if "." in form else None)
    if not (isinstance(kind, type) and issubclass(kind, PeftFormat)):
        raise ValueError(
            f"form must be one of {', '.join(formats)}, or the dotted path of a PeftFormat, got "
            f"{form!r}{did_you_mean(form, formats)}"
        )
    if rank is not None and kind is not LoraFormat:
        raise ValueError(f"rank={rank} is a setting of form lora, and form is {form}; leave rank out")
    return LoraFormat(rank) if kind is LoraFormat else kind()


def _account(format: PeftFormat, written: WrittenAdapter) -> Record:
    weights = {
        name: {
            "form": type(weight.delta).__name__,
            "kept": getattr(weight.delta, "rank", weight.delta.support_size),
            "padding": weight.padding,
            "relative_error": weight.relative_error,
        }
        for name, weight in written.weights.items()
    }
    return {
        "peft_type": format.peft_type,
        "settings": {name: value for name, value in vars(format).items() if not name.startswith("_")},
        "relative_error": written.relative_error,
        "padding": written.padding,
        "weights": weights,
    }


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _moved_modules(expert: StoredExpert, format: PeftFormat, base: Base) -> dict[str, nn.Module]:
    structure = base.structure
    moved = [name for name in expert if not expert[name].is_empty]
    if not moved:
        raise ValueError(f"{expert.name} moves nothing, so an adapter would be empty")
    for name in moved:
        structure.check(name, expert[name].shape, expert.name)
        if len(structure.twins(name)) > 1:
            raise ValueError(
                f"{expert.name} moves {name}, which the base ties to another weight, and an adapter moves only one of "
                "the two; export an expert that leaves it alone"
            )
    others = [name for name in moved if not _can_move(format, name, structure.layer(name))]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        way_out = "write a full checkpoint with `apply`"
        if all(_can_move(LoraFormat(), name, structure.layer(name)) for name in moved):
            way_out += ", or approximate it as lora with a rank"
        raise ValueError(
            f"a {format.peft_type} adapter can only move the {' and '.join(format.parameters)} of a {format.modules}, "
            f"and {expert.name} also moves {shown}; {way_out}"
        )
    modules = {_module_of(name) for name in moved}
    kept = [name for name in expert if _module_of(name) in modules and _can_move(format, name, structure.layer(name))]
    return {name: structure.layer(name) for name in kept}


def _can_move(format: PeftFormat, name: str, module: nn.Module) -> bool:
    if split_slice(name)[1] is not None:
        return format.moves_matrices
    return name.rpartition(".")[2] in format.parameters and format.supports(module)


@dataclass(frozen=True)
class AdapterCheck:
    """Largest and mean absolute differences of a logit over fixed prompts, of shape `(rows, tokens)`.

    A difference is between the reloaded adapter and the deltas that it was written from; an approximation is between
    the adapter and the expert itself, and 0 if the adapter is lossless.
    """

    largest_difference: float
    mean_difference: float
    tolerance: float
    prompts: tuple[int, int]
    loaded_with: str
    largest_approximation: float
    mean_approximation: float


def _verify(
    base: Base, directory: Path, encoded: Mapping[str, Delta], expert: Mapping[str, Delta] | None, tolerance: float
) -> AdapterCheck:
    """Load an adapter with PEFT, and compare it with the deltas `encoded` that it stands for, on a float32 base."""
    from peft import PeftModel

    model = base.load("float32")
    prompts = fixed_prompts(model)
    with applied(model, [encoded]):
        reference = logits(model, prompts)
    approximation = (0.0, 0.0)
    if expert is not None:
        with applied(model, expert, check=False):
            approximation = difference(logits(model, prompts), reference)
    # PEFT warns of many things; only one warning means that the adapter lacks what PEFT looks for.
    with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reloaded = logits(PeftModel.from_pretrained(model, directory), prompts)
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"the adapter was not written: PEFT warns: {warning.message}")
    largest, mean = difference(reloaded, reference)
    loader = f"peft {metadata.version('peft')}"
    if not largest <= tolerance:  # written so that NaN is refused too
        raise ValueError(
            f"the adapter was not written: loaded again with {loader}, its logits differ by {largest:.3g} from those "
            f"of base plus deltas in memory, and the tolerance is {tolerance:.3g}"
        )
    return AdapterCheck(largest, mean, tolerance, (prompts.shape[0], prompts.shape[1]), loader, *approximation)
