"""Writing PEFT adapters: an expert as a directory that PEFT loads onto the base, and that has proved itself.

The adapter is loaded again before it takes its place (`proof.py`). Beside PEFT's two files it holds a manifest with
what was written, from which expert, for which base, and what an approximation lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn

from modular_experts.base import Base
from modular_experts.base.files import MANIFEST, write_manifest
from modular_experts.interop.peft.files import CONFIG_FILE, PREFIX, TENSOR_FILE
from modular_experts.interop.peft.formats import (
    Carried,
    LoraForm,
    PeftForm,
    ShiraForm,
    SupertuningForm,
    total_error,
)
from modular_experts.interop.peft.verify import AdapterCheck, prove
from modular_experts.library import StoredExpert, as_parents, check_target, new_directory, open_experts
from modular_experts.library.record import plain
from modular_experts.progress import Progress
from modular_experts.text import did_you_mean

__all__ = ["WrittenAdapter", "export", "write_peft"]


@dataclass(frozen=True)
class WrittenAdapter:
    """What was written.

    Attributes:
        weights: How each weight is carried, by its name.
        check: What loading it again showed.
    """

    weights: Mapping[str, Carried]
    check: AdapterCheck

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what the adapter lacks, as a share of that of the whole task vector."""
        return total_error(self.weights)

    @property
    def kept_energy(self) -> float:
        """Share of the task vector's squared Frobenius norm that is carried, in [0, 1]."""
        return 1.0 - self.relative_error**2

    @property
    def padding(self) -> int:
        """Number of zeros that only the format asks for."""
        return sum(weight.padding for weight in self.weights.values())


def export(
    expert: str | Path,
    out: str | Path,
    form: Literal["lora", "supertuning", "shira"],
    rank: int | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
) -> WrittenAdapter:
    """Write an expert as a PEFT adapter whose form is given by its name; `write_peft` explains the other arguments.

    Args:
        form: `lora`, `supertuning` or `shira`.
        rank: Largest rank of a LoRA; without it only low-rank experts can be written as one.

    Raises:
        ValueError: The form does not exist or takes no rank, or `write_peft` refuses the expert.
    """
    forms: dict[str, PeftForm] = {"lora": LoraForm(rank), "supertuning": SupertuningForm(), "shira": ShiraForm()}
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
    if rank is not None and form != "lora":
        raise ValueError(f"rank={rank} is a setting of form lora, and form is {form}; leave rank out")
    return write_peft(expert, out, forms[form], base, revision, tolerance, overwrite, progress)


def write_peft(
    expert: str | Path,
    out: str | Path,
    form: PeftForm,
    base: str | Path | Base | None = None,
    revision: str | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
) -> WrittenAdapter:
    """Write an expert as a PEFT adapter, and check it by loading it again.

    The whole adapter and the base in float32 are in memory.

    Args:
        expert: Directory of the expert.
        out: Directory of the adapter.
        form: The kind of adapter: `LoraForm`, `SupertuningForm` or `ShiraForm`.
        base: The base's directory or hub id; from the expert's record if none is given.
        revision: Branch, tag or commit of a hub id; from the record too where the base is.
        tolerance: Largest accepted difference of a logit between the reloaded adapter and the deltas it stands for.
            What an approximation costs is reported and not limited.
        overwrite: Whether an adapter of ours that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The base is another one than the expert was trained on, the form cannot carry a weight, or the
            reloaded adapter differs; nothing is written then.
    """
    target = check_target(out, overwrite, MANIFEST)
    (opened,) = open_experts([expert])
    found = Base.open(base, [opened], revision)
    modules = _modules(opened, form, found)
    form = form.settle((name, opened[name]) for name in modules)
    carried = {name: form.carry(name, modules[name], opened[name]) for name in progress(list(modules))}
    with new_directory(target, overwrite, MANIFEST) as directory:
        _write_files(directory, _configuration(form, found, modules, carried), carried)
        deltas = {name: weight.delta for name, weight in carried.items()}
        approximated = opened if total_error(carried) else None
        check = prove(found, directory, form.peft_type, deltas, approximated, tolerance)
        written = WrittenAdapter(carried, check)
        write_manifest(directory, _account(opened, found, form, written))
    return written


def _modules(expert: StoredExpert, form: PeftForm, base: Base) -> dict[str, nn.Module]:
    """Return the module of each weight that the expert moves, by the weight's name.

    Raises:
        ValueError: It moves a weight that the form cannot carry or that the base does not have or ties, or none.
    """
    structure, known = base.structure, base.structure.shapes
    moved = [name for name in expert if not expert[name].is_empty]
    unknown = [name for name in moved if name not in known]
    tied = sorted(name for name in moved if name in known and len(structure.twins(name)) > 1)
    if not moved:
        raise ValueError(f"{expert.name} moves nothing, so there is no adapter to write")
    if unknown:
        raise ValueError(f"the base in {base.directory} has no weight {unknown[0]}{did_you_mean(unknown[0], known)}")
    if tied:
        raise ValueError(
            f"{expert.name} moves {tied[0]}, which the base ties to another weight, and an adapter moves only one of "
            "the two places; export an expert that leaves it alone"
        )
    others = [name for name in moved if not (name.endswith(".weight") and form.takes(structure.layer(name)))]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise ValueError(
            f"a {form.peft_type} adapter moves the weight of a {form.carries} only, and {expert.name} moves {shown} "
            "too; write a full checkpoint with modular-experts apply"
        )
    return {name: structure.layer(name) for name in moved}


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _configuration(
    form: PeftForm,
    base: Base,
    modules: Mapping[str, nn.Module],
    carried: Mapping[str, Carried],
) -> dict[str, Any]:
    return {
        "peft_type": form.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.place,
        "revision": base.revision,
        "inference_mode": True,
        "target_modules": [_module(name) for name in carried],
        "modules_to_save": None,
        **form.configuration(modules, carried),
    }


def _write_files(directory: Path, config: Mapping[str, Any], carried: Mapping[str, Carried]) -> None:
    text = json.dumps(plain(config), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {
        f"{PREFIX}{_module(name)}.{suffix}": tensor.contiguous()
        for name, weight in carried.items()
        for suffix, tensor in weight.tensors.items()
    }
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})


def _account(expert: StoredExpert, base: Base, form: PeftForm, written: WrittenAdapter) -> dict[str, Any]:
    return {
        "base": {"id": base.place, "revision": base.revision, "fingerprint": base.fingerprint},
        "experts": as_parents([expert]),
        "adapter": {
            "peft_type": form.peft_type,
            "settings": {name: value for name, value in vars(form).items() if not name.startswith("_")},
            "kept_energy": written.kept_energy,
            "relative_error": written.relative_error,
            "padding": written.padding,
            "weights": {name: weight.numbers() for name, weight in written.weights.items()},
        },
        "check": asdict(written.check),
    }
